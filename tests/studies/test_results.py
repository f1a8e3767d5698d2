"""`flipscale study report` of a grid of losses and masks with made-up runs. Some configurations lack some results."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import write_tokenizer
from matplotlib import pyplot
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from flipscale.cli import main
from flipscale.evaluation.results import Result, append_results
from flipscale.recipe.recipe import to_yaml
from flipscale.studies import figures as study_figures
from flipscale.studies.design import write_plan
from flipscale.studies.figures import draw_grid, draw_rows
from flipscale.studies.runs import StudyRun

pytestmark = pytest.mark.usefixtures("real_figures")

AXES = {
    "loss": {"contrastive": {}, "both": {"loss.caption_weight": 2.0}, "captions": {"loss.kind": "captioning"}},
    "mask": {"mask0": {"stages.0.mask_ratio": 0.0}, "mask50": {"stages.0.mask_ratio": 0.5}, "mask75": {}},
}
# Final results at a mask of 0 by loss, in the order of evaluations.
ZERO_SHOT = Result("zero_shot", "zero_shot", "top1", 30.0, 96, 28.0, 32.0, chance=6.25)
PROBE = Result("probe", "probe", "top1", 60.0, 96, chance=10.0)
CIDER = Result("captioning", "captioning", "cider", 120.0, 96, unit="", label="CIDEr")
LIKELIHOOD = Result("likelihood", "likelihood", "top1", 25.0, 96, chance=6.25)
ENDS = {
    "contrastive": [ZERO_SHOT, PROBE],
    "both": [ZERO_SHOT, PROBE, CIDER, LIKELIHOOD],
    "captions": [PROBE, CIDER, LIKELIHOOD],
}


def made(result: Result, gain: float) -> Result:
    return Result(**{**vars(result), "value": result.value + gain})


def make_up(run: StudyRun, results: list[Result]) -> None:
    """Write the files of a finished run that the report reads."""
    run.run_dir.mkdir(parents=True)
    (run.run_dir / "recipe.yaml").write_text(to_yaml(run.recipe))
    (run.run_dir / "environment.json").write_text(json.dumps({"num_parameters": 20_000, "data_samples": 96}))
    record = {"step": 8, "samples_seen": 64, "trained_seconds": 60.0, "stage": run.recipe.stages[0].name, "loss": 2.0}
    (run.run_dir / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    append_results(run.run_dir, results, 8, 64, 60.0)
    (run.run_dir / "DONE").touch()


def write_study(folder: Path, recipe: dict, **fields: object) -> Path:
    tokenizer = write_tokenizer(folder / "tokenizer", bos_token="<s>", eos_token="</s>")
    base = {**recipe, "data": {**recipe["data"], "tokenizer": str(tokenizer)}}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    file = folder / "study.yaml"
    study = {"base": str(folder / "base.yaml"), "axes": AXES, "design": "grid", "seeds": [0, 1, 2], **fields}
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    return file


def cells(table: str) -> dict[str, list[str]]:
    """The rows of the first table of a page, by their first cells."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.long
def test_a_grid_with_missing_results(tmp_path: Path, recipe: dict) -> None:
    out = tmp_path / "out"
    runs = {run.name: run for run in write_plan(write_study(tmp_path, recipe), out)}
    assert list(runs)[:4] == [
        "contrastive+mask75-seed0", "contrastive+mask0-seed0", "contrastive+mask50-seed0", "both+mask75-seed0",
    ]  # fmt: skip
    for name, run in runs.items():
        loss, mask = name.split("-")[0].split("+")
        gain = {"mask75": 0.0, "mask50": 3.0, "mask0": 5.0}[mask] + run.recipe.seed * (1 + len(loss) / 10)
        if name != "captions+mask50-seed2":
            make_up(run, [made(result, gain) for result in ENDS[loss]])
    main(["study", "report", str(out), "--resamples", "10"])
    report = (out / "report.md").read_text()
    assert "base.yaml`, called `contrastive+mask75` below." in report
    assert "Not finished: captions+mask50-seed2." in report
    rows = cells(report)
    assert rows[""][5:] == ["zero_shot top-1", "probe top-1", "CIDEr", "likelihood top-1"]
    assert rows["contrastive+mask75"][-4:] == ["32.1 % (26.9 to 37.3)", "62.1 % (56.9 to 67.3)", "-", "-"]
    assert rows["captions+mask0"][-4:-2] == ["-", "66.8 % (62.3 to 71.3)"]
    assert report.count("It is no percentage of right answers") == 1
    transfer = (out / "transfer.md").read_text()
    assert cells(transfer.split("\n\n## ")[0])["loss: captions"] == ["-", "-0.3 (-1.0 to +0.4)"]
    assert "\n\nNo result of the base to compare with: CIDEr, likelihood top-1.\n\n" in transfer
    for name in ("scaling", "accuracy", "transfer", "results"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The drawn figures, which are not written."""
    drawn: list[Figure] = []
    monkeypatch.setattr(study_figures, "save_figure", lambda figure, path: drawn.append(figure))
    yield drawn
    for figure in drawn:
        pyplot.close(figure)


def ends(loss: str, *seeds: float) -> dict[str, list[Result]]:
    return {result.name: [made(result, gain) for gain in seeds] for result in ENDS[loss]}


def bars_of(line: ErrorbarContainer) -> list[np.ndarray]:
    """The ends of a line's bars, `(2, 2)` each."""
    return [ends for ends in line.lines[2][0].get_segments() if len(ends) == 2 and np.isfinite(ends).all()]


def test_a_figure_of_two_axes(figures: list[Figure]) -> None:
    found = {
        ("contrastive", "mask0"): ends("contrastive", -1.0, 0.0, 1.0),
        ("captions", "mask50"): ends("captions", 5.0),
    }
    draw_grid(found, {"loss": ["contrastive", "captions"], "mask": ["mask0", "mask50"]}, Path())
    zero_shot, probe, cider, likelihood = figures[0].axes
    assert [label.get_text() for label in probe.get_xticklabels()] == ["mask0", "mask50"]
    assert zero_shot.get_ylim()[0] == likelihood.get_ylim()[0] == cider.get_ylim()[0] == 0
    first, second = probe.containers
    assert first.lines[0].get_ydata().tolist() == pytest.approx([60.0, float("nan")], nan_ok=True)
    assert second.lines[0].get_ydata().tolist() == pytest.approx([float("nan"), 65.0], nan_ok=True)
    (bar,), no_bar = bars_of(first), bars_of(second)
    assert bar[:, 1].tolist() == pytest.approx([60 - 4.302653 / 3**0.5, 60 + 4.302653 / 3**0.5])
    assert no_bar == []


def test_a_figure_of_rows(figures: list[Figure]) -> None:
    draw_rows({"contrastive+mask0": ends("contrastive", 0.0), "captions+mask50": ends("captions", 5.0)}, Path())
    zero_shot, probe, cider, _ = figures[0].axes
    assert [label.get_text() for label in zero_shot.get_yticklabels()] == ["contrastive+mask0", "captions+mask50"]
    assert [bars.lines[0].get_xdata().tolist() for bars in probe.containers] == [[60.0], [65.0]]
    assert zero_shot.get_xlim()[0] == cider.get_xlim()[0] == 0
