"""Parts of pages: texts, pictures, masks, and the facts of a run."""

import re
from pathlib import Path

from flipscale.data.samples import evenly
from flipscale.io.text_table import rounded
from flipscale.pages.page import listed, rendered, shortened
from flipscale.training.run_summary import Energy, RunSummary


def test_texts_and_numbers() -> None:
    assert shortened("two  arrows\nin a circle", 40) == "two arrows in a circle"
    assert shortened("two arrows in a circle", 15) == "two arrows in…"
    assert shortened("twoarrowsinacircle", 10) == "twoarrows…"
    assert [listed(names) for names in ([], ["a"], ["a", "b", "c"])] == ["", "a", "a, b and c"]
    assert [evenly(count, 3) for count in (0, 2, 101)] == [[], [0, 1], [0, 50, 100]]
    assert [rounded(value) for value in (0.00043, 0.5, 12.345, 1234.5)] == ["0.00043", "0.50", "12.35", "1,234"]


def test_a_page_has_no_tag_control_or_half_of_a_letter_from_outside() -> None:
    empty: dict[str, object] = {name: {} for name in ("searches", "shown", "asked", "names", "number")}
    values = {"model": "<i>\x00\ud800</i>", "place": "a&b", "num_pictures": 1, "num_damaged": 2}
    values |= {"top": 8, "dim": 4, "embeds": "", "tower": None}
    text = rendered("search.html", **empty, **values)
    assert "&lt;i&gt;\\ud800&lt;/i&gt;" in text
    assert "<h1>a&amp;b</h1>" in text
    assert "2 more could not be read" in text


class Run(RunSummary):
    """A run without files: its properties are set."""

    def __init__(self, **values: object):
        super().__init__(Path("run"))
        self.__dict__.update(values)


def facts(run: RunSummary) -> dict[str, str]:
    return dict(re.findall(r"<th [^>]*>(.*?)</th><td>(.*?)</td>", rendered("facts.html", run=run)))


def test_cost_of_a_run() -> None:
    record = {"step": 10, "samples_seen": 1280, "trained_seconds": 7200.0, "images_per_s": 3.0, "num_replaced": 2}
    known = {
        "recipe": {
            "data": {"shards": "/somewhere/mine/train", "sources": []},
            "stages": [{"mask_ratio": 0.5}],
            "cost": {"device_hour_dollars": 2.5, "kwh_co2_grams": 400.0},
        },
        "environment": {"num_parameters": 1_500_000, "mixed_precision": "no", "torch": "2.13"},
        "kept_starts": [{"step": 0, "trained_seconds": 0.0, "num_processes": 2, "device": "a GPU", "engine": "ddp"}],
        "records": [record],
    }
    assert facts(Run(**known, energy=Energy())) == {
        "machine": "2 x a GPU",
        "engine": "ddp",
        "precision": "fp32",
        "training": "2 h 0 min, without evaluations and saves",
        "device hours": "4.00",
        "cost": "10.00 dollars at 2.5 an hour",
        "bad samples": "2 replaced",
        "skipped steps": "none",
        "versions": "torch 2.13",
    }
    measured = facts(Run(**known, energy=Energy({"GPUs": 1.25, "processors": 0.25}, 2, 2)))
    assert measured["energy"] == "1.50 kWh, measured: GPUs and processors"
    assert measured["emissions"] == "0.60 kg of CO2 at 400 g a kWh"
