"""A step that is late on one rank is written down with every rank's times; one that never ends, ends the run."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
from clock import Clock
from conftest import launch

from flipscale.engines import watchdog
from flipscale.engines.slow_steps import StepWatch

# Rank 1 waits two seconds for the data of step 15, and for ever for those of step 18.
LATE = """
import sys, time, torch
from types import SimpleNamespace
from pathlib import Path
from accelerate import Accelerator
from flipscale.engines.checkpoint import CheckpointWriter
from flipscale.recipe.outputs import SaveRecipe
from flipscale.training.preemption import StopRequest
from flipscale.training.schedule import Schedule, plan_stages
from flipscale.recipe.optim import StageRecipe
from flipscale.training.step import StepLoss
from flipscale.training.sync import StepSync
from flipscale.engines.slow_steps import StepWatch

accelerator = Accelerator(cpu=True)

def batches():
    for step in range(30):
        if accelerator.process_index == 1 and step in (15, 18):
            time.sleep(2 if step == 15 else 1000)
        yield SimpleNamespace(step=schedule.step(step, step, step - 1))

watch = StepWatch(accelerator, Path(sys.argv[1]), hang_seconds=6)
checkpoints = CheckpointWriter(accelerator, Path(sys.argv[1]), SaveRecipe(), None)
sync = StepSync(accelerator, checkpoints, watch, StopRequest(watches_file=False))
schedule = Schedule(tuple(plan_stages([StageRecipe("only", 300, base_lr=0.1)], 10)))
with watch:
    for batch in watch.timed(batches(), 0):
        sync.start(batch.step, StepLoss(torch.tensor(1.0), {}), torch.tensor(1.0), [])
        for result in sync.settle(wait=False).results:
            assert result.step.number == batch.step.number - 1
"""


@pytest.fixture(scope="module")
def late_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run directory of two processes of which one hangs, and what they printed."""
    folder = tmp_path_factory.mktemp("late")
    (folder / "late.py").write_text(LATE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = launch([*launcher, str(folder / "late.py"), str(folder)])
    assert done.returncode == 1
    return folder, done.stderr


def test_a_slow_step_is_written_with_every_rank_s_times(late_run: tuple[Path, str]) -> None:
    folder, printed = late_run
    records = [json.loads(line) for line in (folder / "slow_steps.jsonl").read_text().splitlines()]
    # Beside other work another step may be slow too.
    (record,) = [record for record in records if record["step"] == 15]
    assert record["step_s"] > 5 * record["usual_s"]
    assert (record["late_rank"], record["phase"]) == (1, "data")
    assert [rank["rank"] for rank in record["ranks"]] == [0, 1]
    assert record["ranks"][0]["data_s"] < 1.9 < record["ranks"][1]["data_s"]
    assert "step 15 took " in printed
    assert " s late, in data, before " in printed


def test_a_step_that_never_ends_leaves_stacks_and_ends_the_run(late_run: tuple[Path, str]) -> None:
    folder, printed = late_run
    stacks = [(folder / f"stacks/rank-{rank:05d}.txt").read_text() for rank in (0, 1)]
    assert all(text.startswith("step 18 on ") for text in stacks)
    assert "in start" in stacks[0]
    assert "in batches" in stacks[1]
    assert "flipscale: error: step 18 has not finished on rank 0 after 6 s (log.hang_seconds)" in printed
    assert "start the run again to resume from its last checkpoint" in printed


def step_watch(folder: str) -> tuple[StepWatch, Clock]:
    """A watch of one process with a limit of a second of its own clock."""
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
    process = processes.start(hang, str(tmp_path), doing, signs)
    process.join(300)
    assert process.exitcode == 1
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
    process = processes.start(work, str(tmp_path))
    process.join(300)
    assert process.exitcode == 0
