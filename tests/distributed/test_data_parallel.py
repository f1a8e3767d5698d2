"""Launches of two real processes by accelerate."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import launch, losses, trained
from processes import free_port

from flipscale.training.run_summary import RunSummary

FLAGS = ["--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]


def test_a_launcher_that_starts_fewer_than_it_promised_is_refused(write_recipe, tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "alone")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *FLAGS, "-m", "flipscale.pretrain"]
    done = launch([*command, "--config", str(file)])
    assert done.returncode != 0
    assert "flipscale: error: the launcher promised 2 or more processes, 1 started" in done.stderr


LONG = [pytest.param(engine, marks=pytest.mark.long) for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3")]


@pytest.mark.long
@pytest.mark.parametrize("engine", ["hsdp", *LONG])
def test_launch_file_over_two_machines(write_recipe, tmp_path: Path, engine: str) -> None:
    """The README's multi-node command with every launch file: two launchers, one process each, in bf16."""
    file = write_recipe(tmp_path / "nodes")
    flags = ["--config_file", f"ds_configs/{engine}.yaml", "--num_machines", "2", "--num_processes", "2"]
    flags += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    if engine == "hsdp":
        flags += ["--parallelism_config_dp_shard_size", "1", "--parallelism_config_dp_replicate_size", "2"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags]
    tail = ["-m", "flipscale.pretrain", "--config", str(file)]
    with ThreadPoolExecutor() as pool:
        nodes = pool.map(
            lambda rank: launch([*command, "--machine_rank", rank, *tail], ACCELERATE_USE_CPU="1"), ["0", "1"]
        )
        for done in nodes:
            assert done.returncode == 0, done.stderr
    (start,) = RunSummary(tmp_path / "nodes").kept_starts
    assert (start["engine"], start["num_processes"]) == (engine, 2)
    assert json.loads((tmp_path / "nodes/environment.json").read_text())["mixed_precision"] == "bf16"
    trained(write_recipe(tmp_path / "one"))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "nodes")
    assert len(two) == 40
    assert max(abs(a - b) for a, b in zip(two, one, strict=True)) < 0.05
