"""The figures of several starts, the report of `flipscale bench gpu`, and its command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from benchmarks.gpu_step import draw, unlike
from flipscale.checks import node, steps
from flipscale.checks.node import Bench
from flipscale.checks.nodes import Nodes
from flipscale.checks.report import PROFILE, check_nodes, write_report
from flipscale.checks.steps import ALONE, check_plan
from flipscale.checks.timing import over_starts
from flipscale.cli import main
from flipscale.io.errors import UserError
from flipscale.recipe.recipe import Recipe
from flipscale.start.complete_recipe import parse_recipe


def row(times: list[float], joules: float | None = 1300.0, **others: object) -> node.Row:
    return {"pairs": 100, "times": times, "joules": joules, "mhz": 1500, "peak_s": 0.5, **others}


def test_a_row_has_the_slowest_rank_of_each_start() -> None:
    starts = [[row([1.0, 1.0]), row([1.0, 2.0])], [row([1.0, 1.0]), row([1.0, 1.0])]]
    found = over_starts(starts)
    assert found["times"] == [[1.0, 2.0], [1.0, 1.0]]
    assert (found["seconds"], found["medians"]) == (1.0, [1.5, 1.0])
    assert found["quartiles"] == [1.0, 1.25]
    # 5,200 joules of two GPUs in nine seconds of a GPU.
    assert found["watts"] == pytest.approx(5200 / 9)
    assert found["pairs_per_joule"] == pytest.approx(100 / (5200 / 9))
    assert (found["pairs_per_s"], found["mfu"], found["mhz"]) == (100.0, 0.5, 1500.0)


def test_a_report_has_a_table_of_each_measurement(tmp_path: Path) -> None:
    bench = Bench(8, tmp_path, ["l16"], 100, ["l16"], starts=3, timed_steps=50)
    bench.figures["machine"] = {
        "versions": {"flipscale": "1.0", "commit": "abc"},
        "gpus": [{"name": "H100", "driver_version": "570", "clocks.max.sm": "1980", "power.limit": "700"}],
    }
    common = {"recipe": "l16", "gpus": 8}
    both = [
        common | {"code": code, "mask_ratio": 0.5} | over_starts([[row([seconds] * 50)] for _ in range(3)])
        for code, seconds in (("flipscale", 1.0), ("open_clip", 1.25))
    ]
    lost = {**common, "code": "open_clip", "mask_ratio": 0.0, "out_of_memory": True}
    bench.figures["open_clip"] = [*both, lost]
    bench.figures["steps"] = [common | over_starts([[row([2.0], compiled=True, recomputes=True)]]) | {"engine": "ddp"}]
    bench.add("products l16", "fine")
    write_report([bench], tmp_path / "report.md")
    page = (tmp_path / "report.md").read_text()
    assert PROFILE in page
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line]
    cells = {label: others for label, *others in lines}
    assert cells["l16 flipscale 50%"][:2] == ["8", "800"]
    assert cells["l16 open_clip 50%"][1:3] == ["640", "640 to 640"]
    assert cells["l16 open_clip 0%"][1] == "out of memory"
    assert cells["l16 ddp compiled recomputes"][5:] == ["25.0%", "1500", "650", "0.08"]
    draw(bench.figures["open_clip"], tmp_path / "report.png")
    assert (tmp_path / "report.png").exists()


@pytest.mark.parametrize("quick", [False, True])
def test_any_recipe_and_any_field_can_be_benched(
    quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Bench] = []
    recipes: list[Recipe] = []

    def measure(bench: Bench) -> None:
        bench.add("step", "measured")
        seen.append(bench)
        recipes.extend(parse_recipe(["--config", name]) for name in bench.recipes)
        row = {"recipe": bench.recipes[0], "engine": ALONE, "gpus": 1, "pairs": 8, "compiled": False}
        times = {"times": [0.1], "seconds": 0.1, "quartiles": [0.1, 0.1], "medians": [0.1], "flops": 1e9}
        loads = {"mfu": None, "mhz": None, "watts": None, "pairs_per_joule": None, "peak_bytes": 1, "recomputes": False}
        bench.figures["steps"] = [row | times | loads]

    monkeypatch.setattr("flipscale.checks.report.CHECKS", [measure])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.chdir(tmp_path)
    flags = ["--config", "b16_cc12m", "--mask.kind", "grid", "--data.pack_captions", "false"]
    main(["bench", "gpu", *flags, *["--quick"] * quick])
    assert [(one.model.size, one.mask.kind) for one in recipes] == [("b16", "grid")]
    (bench,) = seen
    assert list(bench.trained) == ([] if quick else bench.recipes)
    assert (bench.starts, bench.timed_steps) == ((1, 10) if quick else (3, 50))
    assert json.loads((tmp_path / "gpu.json").read_text())["num_gpus"] == 2
    assert "nsys profile" in capsys.readouterr().out
    assert (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [(["--mask.knd", "grid"], "--mask.knd"), (["--config", "b16_cc12m", "--config", "b16_cc12m"], "b16_cc12m twice")],
)
def test_a_wrong_command_is_refused_before_all_checks(
    flags: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit):
        main(["bench", "gpu", *flags])
    assert named in capsys.readouterr().err


def silent(*given: object) -> None:
    raise UserError("b did not answer in 1 s")


def ended(bench: Bench) -> None:
    raise SystemExit(1)


@pytest.mark.parametrize(("checks", "all_nodes"), [([], silent), ([ended], check_nodes)])
def test_an_end_loses_no_results(
    checks: list[Callable], all_nodes: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flipscale.checks.nodes.meet", lambda environment: Nodes(hosts=["a", "b"]))
    monkeypatch.setattr("flipscale.checks.report.CHECKS", [lambda bench: bench.add("own", "fine"), *checks])
    monkeypatch.setattr("flipscale.checks.report.check_nodes", all_nodes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["bench", "gpu", "--quick"])
    assert [one["name"] for one in json.loads((tmp_path / "gpu.json").read_text())["findings"]] == ["own"]
    assert (tmp_path / "report.md").exists()


def test_the_plan_of_many_long_rows_is_asked(tmp_path: Path) -> None:
    """All rows and their times are longer than an argument of a command may be, 131,072 bytes."""
    given: dict[str, Any] = {}
    row = {"recipe": "h14_laion2b", "variables": {"ACCELERATE_MIXED_PRECISION": "bf16"}, "pairs": 256, "compiled": True}
    row |= {
        "engine": ALONE,
        "recomputes": False,
        "peak_bytes": 1,
        "seconds": 1.0,
        "flops": 1e12,
        "times": [1 / 3] * 150,
    }

    def asked(bench: Bench, function: object, **arguments: Any) -> list[list[node.Row]]:
        given.update(arguments)
        return [[{"bytes": 1, "seconds": 1.0}] * 60]

    bench = Bench(8, tmp_path, ["h14_laion2b"], 256, figures={"steps": [row] * 60})
    with patch.object(Bench, "run", asked), patch.object(steps, "planning_figures", lambda bench: {}):
        check_plan(bench)
    assert len(json.dumps(given)) < 2**17 < len(json.dumps(bench.figures))


def test_another_task_is_not_compared() -> None:
    recipe = ["--config", "l16_laion400m"]
    assert unlike(parse_recipe(recipe)) == ""
    changed = ["--loss.kind", "sigmoid", "--stages.0.text_mask_ratio", "0.5"]
    assert unlike(parse_recipe([*recipe, *changed])) == "loss.kind sigmoid, text_mask_ratio"
