"""kill -9 of a process at any instant: the run continues from its last whole checkpoint to the same numbers.

Every start draws its engine, its number of processes, whom to kill and when.
"""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
from conftest import losses, trained
from distributed.crowd import ENVIRONMENTS, start_ranks

from flipscale.engines.checkpoint import list_checkpoints, require_valid, step_of

# FLIPSCALE_KILLS=200 for a long look: about twenty minutes on two cores.
KILLS = int(os.environ.get("FLIPSCALE_KILLS", "3"))
ENGINES = ("ddp", "fsdp2", "zero3")
INSTANTS = ("any", "training", "saving", "evaluating")
# Of a start that nobody kills, from its first breath to its model; an instant is drawn from it.
LONGEST_SECONDS = 5.0
# On a free machine they take eleven; what they would wait for otherwise takes minutes.
ALL_END_WITHIN_SECONDS = 120.0


class Launch:
    """The processes of a start of a run; what they print goes to `output`."""

    def __init__(self, file: Path, engine: str, world: int, output: Path):
        output.mkdir()
        self.output = output
        arguments = ("flipscale.pretrain", ["--config", str(file)], str(output))
        environment = {"ACCELERATE_USE_CPU": "1", **ENVIRONMENTS[engine]}
        self.ranks = start_ranks(world, processes.call_main, *arguments, **environment)

    @property
    def has_ended(self) -> bool:
        return all(rank.exitcode is not None for rank in self.ranks)

    def join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for rank in self.ranks:
            rank.join(max(deadline - time.monotonic(), 0.0))
        assert self.has_ended, f"still there after {seconds} s: {self.printed()}"

    def kill(self, draw: random.Random, have_met: bool) -> None:
        """Kill one process; then all others, as a launcher does, or see that they end by themselves, as they do once
        they have met."""
        draw.choice(self.ranks).kill()  # unless it has ended meanwhile
        if draw.random() < 0.9 or not have_met:
            time.sleep(draw.uniform(0.0, 0.2))
            for rank in self.ranks:
                rank.kill()
        self.join(ALL_END_WITHIN_SECONDS)

    def printed(self) -> str:
        return "".join((self.output / name).read_text() for name in ("stdout", "stderr"))


def phase(run_dir: Path) -> str:
    """Return the phase of a run, by its files."""
    if list(run_dir.glob("checkpoints/.*.partial")):
        return "saving"
    try:
        said = json.loads((run_dir / "heartbeat.json").read_text())["phase"]
    except (OSError, ValueError):
        return "starting"
    return "evaluating" if said == "evaluating or saving" else said


def wait_for(instant: str, launch: Launch, run_dir: Path, draw: random.Random) -> None:
    """Return at the instant to kill: any one, or as soon as the run is seen in a phase, and a little later."""
    if instant == "any":
        launch.ranks[0].join(draw.uniform(0.0, LONGEST_SECONDS))
        return
    num_starts, started = len(_lines(run_dir / "starts.jsonl")), time.monotonic()
    while not launch.has_ended and time.monotonic() < started + 60:
        if len(_lines(run_dir / "starts.jsonl")) > num_starts and phase(run_dir) == instant:
            time.sleep(draw.uniform(0.0, 0.3 if instant == "training" else 0.02))
            return
        time.sleep(0.001)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def killed_run(file: Path, run_dir: Path, kills: int, draw: random.Random, outputs: Path) -> Iterator[str]:
    """Start a run again and again until it is done; yield what it was doing at each of up to `kills` kills."""
    newest = 0
    for number in range(kills + 1):
        world = draw.choice((1, 2, 3))
        engine = draw.choice(ENGINES) if world > 1 else "ddp"
        num_starts = len(_lines(run_dir / "starts.jsonl"))
        launch = Launch(file, engine, world, outputs / f"{run_dir.name}-{number}")
        if number < kills:
            wait_for(draw.choice(INSTANTS), launch, run_dir, draw)
        if number == kills or launch.has_ended:
            launch.join(300)
            assert [rank.exitcode for rank in launch.ranks] == [0] * world, launch.printed()
            return
        seen = phase(run_dir)
        launch.kill(draw, have_met=len(_lines(run_dir / "starts.jsonl")) > num_starts)
        assert "Traceback" not in launch.printed(), launch.printed()
        for checkpoint in list_checkpoints(run_dir):
            require_valid(checkpoint)
        steps = [step_of(checkpoint) for checkpoint in list_checkpoints(run_dir)]
        assert max(steps, default=0) >= newest, "a checkpoint was lost"
        newest = max(steps, default=0)
        yield seen


@pytest.mark.long
@pytest.mark.timeout(600 + 20 * KILLS)
def test_killed_at_any_instant(write_recipe, shards: Path, tmp_path: Path) -> None:
    tasks = [{"kind": "zero_shot", "data": str(shards), "every_samples": 96}]
    stages = [
        {"name": "masked", "samples": 288, "mask_ratio": 0.75, "base_lr": 0.012, "warmup_samples": 48},
        {"name": "unmasked", "samples": 192, "base_lr": 0.006},
    ]
    changes = {
        "data": {"global_batch_size": 12},
        "log": {"every_samples": 12},
        "eval": {"tasks": tasks, "num_workers": 0},
        "save": {"every_samples": 24, "total_limit": 2},
        "stages": stages,
    }
    whole, draw = tmp_path / "whole", random.Random(0)
    trained(write_recipe(whole, **changes))
    seen: Counter[str] = Counter()
    furthest = 0.0
    while seen.total() < KILLS:
        run_dir = tmp_path / f"killed-{seen.total()}"
        file = write_recipe(run_dir, **changes)
        seen.update(killed_run(file, run_dir, min(KILLS - seen.total(), 25), draw, tmp_path))
        whole_losses, killed_losses = losses(whole), losses(run_dir)
        assert len(whole_losses) == 40
        furthest = max(furthest, *(abs(a - b) for a, b in zip(whole_losses, killed_losses, strict=True)))
        assert furthest < 1e-5
        print(f"{seen.total()} kills, losses at most {furthest:.1e} apart", flush=True)
    print(f"{dict(seen)} at the kills")
