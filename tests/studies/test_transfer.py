"""Effects of axes: Table 8 of the paper gives the paper's own conclusions."""

import csv
from pathlib import Path

import pytest

from flipscale.studies.transfer import Arm, beyond, effects, interactions, transfer_report

# FLIP (arXiv 2212.00794), Table 8.
TABLE8 = Path(__file__).parents[1] / "fixtures/table8.csv"
LEVELS = {"model": "h14", "data": "2B", "schedule": "2x"}


@pytest.fixture(scope="module")
def table8() -> list[Arm]:
    with TABLE8.open() as file:
        rows = list(csv.DictReader(file))
    return [
        Arm(
            {axis: LEVELS[axis] for axis in row.pop("levels").split("+") if axis},
            {task: {0: float(value)} for task, value in row.items()},
        )
        for row in rows
    ]


def rounded(table: dict, label: str, task: str) -> float:
    return round(table[label][task].mean, 1)


@pytest.mark.parametrize(
    ("task", "model", "data", "schedule"),
    [
        ("flickr_text_r1", 0.8, 3.3, 1.3),
        ("vqa", 1.6, 0.8, 0.3),
        ("imagenet", 1.2, 1.5, -0.4),
    ],
)
def test_effects_of_table_8(table8: list[Arm], task: str, model: float, data: float, schedule: float) -> None:
    found = effects(table8)
    assert [rounded(found, f"{axis}: {LEVELS[axis]}", task) for axis in LEVELS] == [model, data, schedule]
    assert all(effect.low is None for row in found.values() for effect in row.values())


def test_model_and_data_together(table8: list[Arm]) -> None:
    found = interactions(table8)
    assert rounded(found, "model: h14 + data: 2B", "imagenet") == 0.6
    assert rounded(found, "model: h14 + data: 2B", "coco_captions") == -1.1


def test_effects_beyond_imagenet(table8: list[Arm]) -> None:
    found = beyond(table8, "imagenet")
    assert found["data: 2B"]["flickr_text_r1"].mean > 0 > found["model: h14"]["flickr_text_r1"].mean
    assert rounded(found, "model: h14", "nocaps") > 3 * rounded(found, "data: 2B", "nocaps")
    assert rounded(found, "model: h14", "vqa") > 0 == rounded(found, "data: 2B", "vqa")
    assert "coco_captions" not in found["data: 2B"]  # CIDEr is not a percentage


def test_intervals_over_seeds() -> None:
    base = Arm({}, {"top1": {0: 10.0, 1: 12.0, 2: 11.0, 3: 50.0}})
    large = Arm({"model": "large"}, {"top1": {0: 13.0, 1: 14.0, 2: 15.0}})
    effect = effects([base, large])["model: large"]["top1"]
    assert effect.mean == pytest.approx(3.0)  # of the seeds that both have
    assert (effect.low, effect.high) == (pytest.approx(3 - 4.302653 / 3**0.5), pytest.approx(3 + 4.302653 / 3**0.5))
    assert "+3.0 (+0.5 to +5.5)" in transfer_report([base, large], "top1")


def test_results_without_the_base() -> None:
    base, both = Arm({}, {"top1": {0: 10.0}}), Arm({"loss": "both"}, {"top1": {0: 11.0}, "CIDEr": {0: 50.0}})
    text = transfer_report([base, both], "top1")
    assert "|            | top1 |" in text
    assert "\n\nNo result of the base to compare with: CIDEr.\n" in text
    other = Arm({"loss": "captions"}, {"CIDEr": {0: 50.0}})
    assert "No level alone has a result that the base has too" in transfer_report([base, other], "top1")
    with pytest.raises(ValueError, match="no run of the base is finished"):
        effects([other])
