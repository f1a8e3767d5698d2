"""Launches of two real processes by accelerate."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import launch, losses, trained
from processes import free_port

from flipscale.records.run_summary import RunSummary


@pytest.mark.long
@pytest.mark.parametrize("engine", ["hsdp", "zero3"])
def test_launch_file_over_two_machines(write_recipe, tmp_path: Path, engine: str) -> None:
    """The README's multi-node command, as torch and as DeepSpeed shard: two launchers, one process each, in bf16."""
    stages = [{"name": "masked", "samples": 160, "mask_ratio": 0.75, "base_lr": 0.012, "warmup_samples": 64}]
    file = write_recipe(tmp_path / "nodes", stages=stages)
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
    trained(write_recipe(tmp_path / "one", stages=stages))
    assert len(losses(tmp_path / "nodes")) == 10
    assert losses(tmp_path / "nodes") == pytest.approx(losses(tmp_path / "one"), abs=0.05)
