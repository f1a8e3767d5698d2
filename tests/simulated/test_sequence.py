"""All processes send the same messages in one order, whatever a step brings: else they wait for each other for ever."""

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from conftest import write_shards
from simulated.recorder import Recorder
from simulated.world import fake_processes

from flipscale.engines.build_engine import start_accelerator
from flipscale.engines.checkpoint import CheckpointWriter, list_checkpoints
from flipscale.engines.launch import Launch, launch_environment, read_launch_file
from flipscale.loop.inputs import Session
from flipscale.loop.loop import train
from flipscale.objectives.contrastive import Contrastive
from flipscale.planning.flops import pair_flops
from flipscale.process.preemption import StopRequest
from flipscale.process.slow_steps import StepWatch
from flipscale.start.complete_recipe import parse_recipe
from flipscale.start.evaluations import RunEvaluator, check_tasks
from flipscale.start.processes import resume
from flipscale.start.setup import open_setup

LAUNCH_FILES = Path(__file__).parents[2] / "ds_configs"
# Of the steps from 0: the loss of one is infinite, and in one a signal arrives. Step 2 is saved, step 4 evaluated.
INFINITE, SIGNALLED = 1, 5


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of the signals, as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def eventful_loss(true_loss: Callable) -> Callable:
    steps: list[int] = []

    def loss(self: Contrastive, *loss_inputs: torch.Tensor, **parameters: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        if len(steps) - 1 == SIGNALLED:
            os.kill(os.getpid(), signal.SIGUSR1)
        return true_loss(self, *loss_inputs, **parameters) * (float("inf") if len(steps) - 1 == INFINITE else 1.0)

    return loss


def partial_index(index: Callable) -> Callable:
    """The index of a checkpoint's parts, nothing where they do not make the whole: there is one part."""

    def found(self: CheckpointWriter, *arguments: object) -> dict:
        with contextlib.suppress(AssertionError):
            return index(self, *arguments)
        return {}

    return found


def messages(rank: int, world: int, engine_name: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What a run sends as process `rank`; its tensors have content, and are on the CPU."""
    launch = replace(read_launch_file(LAUNCH_FILES / f"{engine_name}.yaml", world), precision="no")
    recorder = Recorder()
    with contextlib.ExitStack() as stack:
        patches = stack.enter_context(monkeypatch.context())
        for name, value in launch_environment(LAUNCH_FILES / f"{engine_name}.yaml", world).items():
            patches.setenv(name, value)
        patches.setattr(Contrastive, "coupled_loss", eventful_loss(Contrastive.coupled_loss))
        # A part is on disk at another time on each process, which all of them learn by a sum; here there is no sum.
        patches.setattr(CheckpointWriter, "is_writing", False)
        patches.setattr(CheckpointWriter, "_index", partial_index(CheckpointWriter._index))
        stack.enter_context(fake_processes(rank, launch))
        recipe = parse_recipe(["--config", str(file)])
        for number in range(1, SIGNALLED + 3):  # process 0 makes the folders, and renames them
            Path(recipe.output_dir, "checkpoints", f".step-{number:08d}.partial").mkdir(parents=True)
        setup = open_setup(recipe)
        session = Session(start_accelerator([], recipe.output_dir), None, {})
        engine = resume(recipe, setup.schedule, session)
        with recorder:
            recorder.on = True
            watch = StepWatch(session.accelerator, Path(recipe.output_dir), recipe.log.hang_seconds)
            evaluator = RunEvaluator(check_tasks(recipe)[0], setup, session, engine, watch)
            with StopRequest(watches_file=False) as request, watch:
                flops = {"pair": pair_flops(recipe)}
                given = (setup, session, engine, watch, request, evaluator, flops)
                _, is_stopped = train(*given, on_checkpoint=lambda step: None)
            assert is_stopped
    found = [one.signature for one in recorder.collectives]
    assert all(rank in group for *_, group in found)
    # Objects are bytes, as many as their numbers have digits.
    return [(kind, dtype, 0 if dtype == torch.uint8 else size, group) for kind, dtype, size, group in found]


def shared(sent: list[tuple], *ranks: int) -> list[tuple]:
    """The messages of groups that have all `ranks`, which each of these must send in this order."""
    return [message for message in sent if set(ranks) <= set(message[-1])]


@pytest.mark.parametrize(
    ("engine", "world"),
    [
        ("ddp", 8),
        pytest.param("hsdp", 16, marks=pytest.mark.long),
        pytest.param("fsdp2", 256, marks=pytest.mark.long),
    ],
)
def test_ranks_send_alike(
    engine: str, world: int, recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, batch = {}, max(world, 16)
    write_shards(tmp_path / "test", [batch])  # an image a rank at least: no sum meets those of other ranks here
    changes = {
        "data": {**recipe["data"], "global_batch_size": batch},
        "stages": [{**stage, "samples": stage["samples"] // 16 * batch} for stage in recipe["stages"]],
        "save": {"every_samples": 3 * batch},
        "eval": {
            "tasks": [{"kind": "zero_shot", "data": str(tmp_path / "test")}],
            "every_samples": 5 * batch,
            "batch_size": 1,
        },
    }  # fmt: skip
    # Rank 8 has the shard of rank 0 in the next copy of the weights.
    ranks = sorted({0, 1, min(8, world - 1), world - 1})
    for rank in ranks:
        file = tmp_path / f"{rank}.yaml"
        file.write_text(yaml.safe_dump({**recipe, **changes, "output_dir": str(tmp_path / str(rank))}))
        found[rank] = messages(rank, world, engine, file, monkeypatch)
    for one, other in itertools.combinations(ranks, 2):
        assert shared(found[one], one, other) == shared(found[other], one, other)
    assert {message[:3] for message in found[0]} == {message[:3] for message in found[world - 1]}
    assert len(found[0]) > 6 * 4
    assert [path.name for path in list_checkpoints(tmp_path / "0")][-1:] == [f"step-{SIGNALLED + 1:08d}"]


def sums(rank: int, swapped: bool) -> list[tuple]:
    """The sums of a rank of 16 within its four neighbours, then over the four that have its place among theirs."""
    recorder = Recorder()
    with fake_processes(rank, Launch("fsdp2", 16, shard_size=4)):
        first, place = rank // 4 * 4, rank % 4
        groups = [dist.new_group(ranks) for ranks in (range(first, first + 4), range(place, 16, 4))]
        with recorder:
            recorder.on = True
            for size, group in zip((8, 2), reversed(groups) if swapped else groups, strict=True):
                dist.all_reduce(torch.ones(size), group=group)
    return [one.signature for one in recorder.collectives]


def test_swapped_groups_of_one_size_are_told_apart() -> None:
    right, wrong = sums(1, swapped=False), sums(1, swapped=True)
    assert [message[:3] for message in right] == [message[:3] for message in wrong]
    for other in (0, 13):
        assert shared(right, 1, other) == shared(sums(other, swapped=False), 1, other) != shared(wrong, 1, other)
