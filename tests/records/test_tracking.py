"""Trackers get the project, the recipe and one run id; metrics survive a torn line."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flipscale.process.slow_steps import StepWatch
from flipscale.recipe.recipe import as_fields
from flipscale.records.tracking import StepResult, Tracker, open_trackers
from flipscale.start.complete_recipe import parse_recipe
from flipscale.start.setup import open_setup


class Recorder(GeneralTracker):
    """Stands where accelerate has W&B, which is not installed, and keeps what it is given."""

    name = "wandb"
    requires_logging_directory = False
    opened: list["Recorder"] = []  # noqa: RUF012

    def __init__(self, run_name: str, **options: str):
        super().__init__()
        self.project, self.options = run_name, options
        self.opened.append(self)

    @property
    def tracker(self) -> "Recorder":
        return self

    def store_init_configuration(self, values: dict) -> None:
        self.config = values

    def log(self, values: dict, step: int | None = None, **options: object) -> None:
        pass


def test_trackers_get_the_project_the_recipe_and_one_run_id(
    write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    run_dir = tmp_path / "h14"
    run_dir.mkdir()
    config = as_fields(parse_recipe(["--config", str(write_recipe(run_dir))]))
    for _ in range(2):
        accelerator = Accelerator(cpu=True, project_dir=run_dir)
        accelerator.log_with = ["wandb", "tensorboard"]
        open_trackers(accelerator, run_dir, config)
        accelerator.end_training()
    first, resumed = Recorder.opened
    assert first.project == resumed.project == "flipscale"
    assert first.options == resumed.options
    run_id = (run_dir / "tracker_run_id").read_text()
    assert first.options == {"id": run_id, "name": "h14", "resume": "allow", "dir": str(run_dir)}
    assert first.config["data.global_batch_size"] == 16
    assert first.config["stages.0.base_lr"] == 0.012
    assert "model.init_from" not in first.config
    files = list((run_dir / "tensorboard").iterdir())
    hparams = [EventAccumulator(str(file)).Reload() for file in files]
    assert [file.name[:6] for file in files] == ["events"] * len(files)
    assert any("_hparams_/session_start_info" in one.summary_metadata for one in hparams)


def test_mfu_counts_the_rows_of_packed_captions(write_recipe, tmp_path: Path) -> None:
    """A batch of four captions took three rows, so a pair took three quarters of a row."""
    plan = open_setup(parse_recipe(["--config", str(write_recipe(tmp_path))]))
    accelerator, batch = Accelerator(cpu=True), {"input_ids": torch.zeros(3, 8), "caption_ends": torch.zeros(4)}
    watch = StepWatch(accelerator, tmp_path, 60.0)
    packed = Tracker(plan.recipe, plan.schedule, accelerator, watch, {"masked": 100}, {"masked": 40})
    packed.look([batch, batch])
    assert packed._flops("masked") == 90
    padded = Tracker(plan.recipe, plan.schedule, accelerator, watch, {"masked": 100})
    padded.look([batch])
    assert padded._flops("masked") == 100


@pytest.mark.parametrize(
    ("length", "state", "places"),
    [
        ({"budget_minutes": 2.0}, {"step": 4, "budget_used": 0.25, "budget_before": 0.2}, [120, 30, 60, 120]),
        ({}, {"step": 4}, [96, 64, 80, 96]),
    ],
)
def test_the_bar_counts_pairs_or_the_seconds_of_a_budget(
    write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: dict, state: dict, places: list[float]
) -> None:
    """The places are the bar's total and its start after a checkpoint, then those after two steps."""
    share = {"share": 1.0} if length else {"samples": 96}
    stages = [{"name": "masked", "mask_ratio": 0.75, "base_lr": 0.012, **share}]
    recipe = parse_recipe(["--config", str(write_recipe(tmp_path, **length, stages=stages))])
    plan, accelerator = open_setup(recipe), Accelerator(cpu=True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    tracker = Tracker(
        plan.recipe, plan.schedule, accelerator, watch := StepWatch(accelerator, tmp_path, 60.0), {"masked": 100}
    )
    tracker.start(state)
    bar, step = tracker._bar, plan.schedule.first(state)
    seen = [bar.total, bar.n]
    for position in (0.5, 1.1):
        upcoming = plan.schedule.step(step.number + 1, position if length else step.number + 1, step.position)
        clock = watch.so_far()._replace(seconds=float(step.number))
        tracker.write([StepResult(step, [], clock, 1.0, 1.0, {}, True, 0, False)], upcoming)
        seen.append(bar.n)
        step = upcoming
    assert seen == pytest.approx(places)
