"""kill -9 of a process at any instant: the run goes on from its last whole checkpoint to the same numbers."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import metrics, pretrain
from distributed.crowd import ENVIRONMENTS

from flipscale.engines.checkpoint import list_checkpoints

# FLIPSCALE_KILLS=20 for a long look; every second one is aimed at a checkpoint that is being written.
KILLS = int(os.environ.get("FLIPSCALE_KILLS", "2"))
ENGINES = ("fsdp2", "ddp", "zero3")


def start(file: Path, engine: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", **ENVIRONMENTS[engine]}
    return subprocess.Popen(
        [*command, "-m", "flipscale.pretrain", "--config", str(file)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ranks(launcher: int) -> list[int]:
    """The launcher's processes that train."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(pid) for pid in children if b"flipscale.pretrain" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def records(run_dir: Path) -> int:
    return len(metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def wait_for_the_instant(process: subprocess.Popen, run_dir: Path, amid_a_save: bool, draw: random.Random) -> None:
    """Returns a few steps after the processes have begun to train, or as soon as a checkpoint is begun."""
    begun, steps = None, draw.randrange(1, 6)
    while process.poll() is None:
        time.sleep(0.0005 if amid_a_save else 0.01)
        begun = records(run_dir) if begun is None and len(ranks(process.pid)) == 2 else begun
        if amid_a_save and list(run_dir.glob("checkpoints/.*.partial")) and begun is not None:
            time.sleep(draw.uniform(0.0, 0.01))
            return
        if not amid_a_save and begun is not None and records(run_dir) != begun and records(run_dir) >= begun + steps:
            time.sleep(draw.uniform(0.0, 0.05))
            return


@pytest.mark.timeout(120 * (KILLS + 2))
def test_killed_at_any_instant(write_recipe, tmp_path: Path) -> None:
    save = {"every_samples": 32, "total_limit": 2}
    whole, run_dir = tmp_path / "whole", tmp_path / "killed"
    assert pretrain(write_recipe(whole, save=save)).returncode == 0
    file, draw, half_written, killed = write_recipe(run_dir, save=save), random.Random(0), 0, 0
    while killed < KILLS:
        process = start(file, ENGINES[killed % len(ENGINES)])
        wait_for_the_instant(process, run_dir, killed % 2 == 0, draw)
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            break
        victims = ranks(process.pid)
        os.kill(draw.choice(victims), signal.SIGKILL)
        assert process.wait(60) != 0
        killed += 1
        half_written += bool(list(run_dir.glob("checkpoints/.*.partial")))
        assert all((checkpoint / "state.json").stat().st_size for checkpoint in list_checkpoints(run_dir))
        for victim in victims:
            assert not Path(f"/proc/{victim}").exists()
    if not (run_dir / "DONE").exists():
        process = start(file, ENGINES[killed % len(ENGINES)])
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    print(f"{killed} kills, {half_written} of them amid a save")
    ends = [[r["loss"] for r in metrics(folder) if "loss" in r] for folder in (whole, run_dir)]
    assert len(ends[0]) == len(ends[1]) == 40
    assert max(abs(a - b) for a, b in zip(*ends, strict=True)) < 1e-5
