"""A step or a pause that never ends, ends the run, and signs of life prevent that."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from accelerate import Accelerator
from clock import Clock

from flipscale.process import watchdog
from flipscale.process.slow_steps import StepWatch


def wait_for_ever(folder: str) -> None:
    """Take steps on two processes; rank 1 waits for ever for the data of step 3."""
    accelerator = Accelerator(cpu=True)

    def batches() -> Iterator[SimpleNamespace]:
        for step in range(30):
            if accelerator.process_index == 1 and step == 3:
                time.sleep(1000)
            yield SimpleNamespace(step=SimpleNamespace(stage=None))

    watch = StepWatch(accelerator, Path(folder), hang_seconds=3)
    with open(f"{folder}/{accelerator.process_index}", "w") as sys.stderr, watch:
        for _ in watch.timed(batches(), 0):
            accelerator.reduce(torch.ones(1))


def test_a_step_that_never_ends_leaves_stacks_and_ends_the_run(tmp_path: Path) -> None:
    ranks = [
        processes.start(wait_for_ever, str(tmp_path), environment={**environment, "ACCELERATE_USE_CPU": "1"})
        for environment in processes.rank_environments(2)
    ]
    assert processes.exit_codes(ranks) == [1, 1]
    stacks = [(tmp_path / f"stacks/rank-{rank:05d}.txt").read_text() for rank in (0, 1)]
    assert all(text.startswith("step 3 on ") for text in stacks)
    assert "in reduce" in stacks[0]
    assert "in batches" in stacks[1]
    expected = "flipscale: error: step 3 has not finished on rank 0 after 3 s (log.hang_seconds)"
    assert (tmp_path / "0").read_text().count(expected) == 1


def step_watch(folder: str) -> tuple[StepWatch, Clock]:
    """A watch of one process with a limit of a second by its own clock."""
    watchdog.time = clock = Clock()
    return StepWatch(SimpleNamespace(is_main_process=True, process_index=0), Path(folder), hang_seconds=1), clock


def hang(folder: str, doing: str, signs: int) -> None:
    """A process that stops to give signs of life in a pause."""
    watch, clock = step_watch(folder)
    with open(f"{folder}/printed", "w") as sys.stderr, watch, watch.paused(doing):
        for _ in range(signs):
            clock.move(0.4)
            watch.alive()
            time.sleep(0.1)  # the watch looks every twentieth of a second
        Path(folder, "alive").touch()
        clock.start()
        time.sleep(600)


@pytest.mark.parametrize(("doing", "signs"), [("a save", 0), ("an evaluation", 15)])
def test_a_pause_that_never_ends_is_called_what_it_is(tmp_path: Path, doing: str, signs: int) -> None:
    assert processes.exit_codes([processes.start(hang, str(tmp_path), doing, signs)]) == [1]
    assert (tmp_path / "alive").exists(), "it was ended while it gave signs of life"
    assert (
        f"flipscale: error: {doing} after step 0 has not finished on rank 0 after 1 s"
        in (tmp_path / "printed").read_text()
    )
    assert (tmp_path / "stacks/rank-00000.txt").read_text().startswith(f"{doing} after step 0 on ")


def work(folder: str) -> None:
    """A process that gives no sign of life in a pause, but writes for some seconds of its clock."""
    watch, clock = step_watch(folder)
    with watch, watch.paused("a save"), open(f"{folder}/written", "wb", buffering=0) as file:
        for _ in range(20):
            file.write(bytes(1 << 20))
            clock.move(0.4)
            time.sleep(0.1)


def test_bytes_are_a_sign_of_life(tmp_path: Path) -> None:
    assert processes.exit_codes([processes.start(work, str(tmp_path))]) == [0]


def be_suspended(folder: str) -> None:
    """A process that does not look at its clock for an hour of a step."""
    watch, clock = step_watch(folder)
    with watch:
        watch.begin("step 0", is_step=True)
        clock.move(3600.0)
        time.sleep(0.3)  # the watch looks every twentieth of a second
        Path(folder, "trained").write_text(str(watch.trained_seconds))


def test_a_suspension_is_no_hang_and_no_training(tmp_path: Path) -> None:
    assert processes.exit_codes([processes.start(be_suspended, str(tmp_path))]) == [0]
    assert float((tmp_path / "trained").read_text()) < 1.0
