"""Results of a step are read a step late, in order, and once."""

import json
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import torch
from accelerate import Accelerator
from conftest import metrics
from safetensors.torch import load_file

from flipscale.data.samples import Fault
from flipscale.engines.checkpoint import CheckpointWriter
from flipscale.loop.step import StepLoss
from flipscale.loop.sync import StepSync
from flipscale.process.preemption import StopRequest
from flipscale.process.slow_steps import StepWatch
from flipscale.recipe.optim import StageRecipe
from flipscale.recipe.outputs import SaveRecipe
from flipscale.recipe.schedule import Schedule, schedule_stages

SCHEDULE = Schedule(tuple(schedule_stages([StageRecipe("only", samples=640, base_lr=0.1)], 16)))


class Synced:
    """The `StepSync` of one process."""

    def __init__(self, run_dir: Path, save: SaveRecipe = SaveRecipe()):  # noqa: B008
        accelerator = Accelerator(cpu=True)
        checkpoints = CheckpointWriter(accelerator, run_dir, save, None)
        self.request = StopRequest(watches_file=True)
        self.sync = StepSync(accelerator, checkpoints, StepWatch(accelerator, run_dir, 60.0), self.request)
        self.next = SCHEDULE.first({})

    def step(self, loss: float = 1.0, norm: float = 2.0, faults: list[Fault] | None = None) -> float:
        metrics = {"logit_scale": torch.tensor(14.3, dtype=torch.float64)}
        should_step = self.sync.start(
            self.next, StepLoss(torch.tensor(loss), metrics), torch.tensor(norm), faults or []
        )
        self.next = SCHEDULE.after(self.next, None)
        return should_step.item()


def test_half_minutes_end_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Synced(tmp_path)
    run.step()
    monkeypatch.setattr("flipscale.loop.sync._TICK_SECONDS", 1e-9)
    with run.sync._watch:  # its clock runs
        run.step()
    assert [result.ticked for result in run.sync.drain(wait=True).results] == [False, True]


def test_results_come_after_the_next_step_or_a_wait(tmp_path: Path) -> None:
    run, read = Synced(tmp_path), []
    for wait in (False, False, True, False, True, True):
        run.step()
        read.append([result.step.number for result in run.sync.drain(wait).results])
    assert read == [[], [0], [1, 2], [], [3, 4], [5]]


def test_a_result_is_of_its_own_step(tmp_path: Path) -> None:
    run = Synced(tmp_path)
    many = [Fault(7, "a.tar", 3, "key", "undecodable_image", "")] * 100_001
    assert run.step(loss=0.1, norm=3.0) == 1.0
    assert run.step(loss=0.7, norm=float("inf"), faults=many) == 0.0
    first, second = run.sync.drain(wait=True).results
    assert (first.loss, first.grad_norm) == (torch.tensor(0.1).item(), 3.0)
    assert (first.finite, first.num_done, first.num_replaced, first.faults) == (True, 1, 0, [])
    assert (second.finite, second.num_done, second.num_replaced, second.faults) == (False, 2, 100_001, many)
    assert second.metrics == {"logit_scale": 14.3}
    assert second.step.learning_rate == SCHEDULE.stages[0].learning_rate(1) < first.step.learning_rate
    assert first.clock.seconds <= second.clock.seconds


def test_a_request_is_known_a_step_later_and_waits(tmp_path: Path) -> None:
    run = Synced(tmp_path)
    run.step()
    run.request._receive(15, None)
    assert run.step() == 1.0
    assert not run.sync.drain(wait=False).stop
    run.step()
    settled = run.sync.drain(wait=False)
    assert ([result.step.number for result in settled.results], settled.stop, settled.save) == ([1, 2], True, False)

    saved = Synced(tmp_path, SaveRecipe(every_minutes=1e-9))
    saved.step()
    assert not saved.sync.drain(wait=False).results
    saved.step()
    settled = saved.sync.drain(wait=False)
    assert (len(settled.results), settled.stop, settled.save) == (2, False, True)


BAD = (6, 12, 13)
LEARNED = ("step", "loss", "lr", "grad_norm", "logit_scale", "num_skipped")


@pytest.fixture
def write_changed(write_recipe: Callable[..., Path], shards: Path) -> Callable[[Path], Path]:
    """Writes the recipe of 20 steps, every fifth saved and every tenth evaluated."""
    stages = [
        {"name": "masked", "samples": 200, "mask_ratio": 0.75, "base_lr": 0.012},
        {"name": "unmasked", "samples": 128, "base_lr": 0.006},
    ]
    evaluated = {"tasks": [{"kind": "zero_shot", "data": str(shards)}], "every_samples": 160, "batch_size": 48}
    save = {"every_samples": 80, "total_limit": 9}
    return lambda run_dir: write_recipe(run_dir, stages=stages, save=save, eval=evaluated)


def run_in_trouble(file: Path, world: int = 1, **trouble: int) -> int:
    flags = [text for name, step in trouble.items() for text in (f"--{name}", str(step))]
    poisoned = ["--poisoned", *map(str, BAD)]
    return processes.run("loop.troubled", ["--config", str(file), *flags, *poisoned], world).returncode


def learned(run_dir: Path) -> list[dict]:
    return [{name: record.get(name) for name in LEARNED} for record in metrics(run_dir)]


def test_a_run_goes_on_to_the_same_end_from_any_trouble(write_changed: Callable[[Path], Path], tmp_path: Path) -> None:
    """Three bad steps: without a break, killed between a bad step and its result, and asked to stop in a bad step."""
    whole, killed, stopped = (tmp_path / name for name in ("whole", "killed", "stopped"))
    assert run_in_trouble(write_changed(whole)) == 0
    records = learned(whole)
    assert [record["step"] for record in records] == [*range(1, 11), 10, *range(11, 21), 20], "each once, in order"
    trained = [record for record in records if record["lr"] is not None]
    assert [record["step"] - 1 for record in trained if record["num_skipped"]] == list(BAD)
    assert [record["step"] - 1 for record in trained if record["loss"] is None] == list(BAD)

    file = write_changed(killed)
    assert run_in_trouble(file, killed=12) == 9
    # Its device had begun with step 13 when it died; no record says anything of either.
    assert [record["step"] for record in learned(killed)][-1] == 12
    assert run_in_trouble(file) == 0
    assert learned(killed) == records

    file = write_changed(stopped)
    assert run_in_trouble(file, world=2, stopped=12) == 0
    folders = sorted((stopped / "checkpoints").iterdir())
    states = [json.loads((folder / "state.json").read_text()) for folder in folders]
    # Of ten steps one was bad, and so were both of the second stage.
    assert [(s["step"], s["optimizer_steps"]) for s in states] == [(5, 5), (10, 9), (14, 0)]
    assert not (stopped / "DONE").exists()
    assert run_in_trouble(file) == 0
    for ours, theirs in zip(learned(stopped), records, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)

    ends = [load_file(run / "checkpoints/step-00000020/part-00000.safetensors") for run in (whole, killed)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
