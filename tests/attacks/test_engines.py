"""Attacks by files that other programs left on the machine."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import processes
import pytest
from attacks import ground
from attacks.attack import refused, survived, test_of
from attacks.changes import exists
from distributed.crowd import ENVIRONMENTS

pytest.importorskip("deepspeed")

ZERO = {**ENVIRONMENTS["zero3"], "ACCELERATE_USE_CPU": "1"}


def tiny_run(folder: Path) -> Sequence[str]:
    shutil.copytree(Path(__file__).parents[2] / "ds_configs", folder / "ds_configs")
    ground.shards(folder)
    return ground.pretrain(folder)


def lock_of_a_killed_compilation(folder: Path) -> Sequence[str]:
    for version in ("", "py310_cpu", "py311_cpu", "py312_cpu", "py313_cpu"):
        place = folder / "extensions" / version / "deepspeed_shm_comm"
        place.mkdir(parents=True)
        (place / "lock").touch()
    return tiny_run(folder)


ATTACKS = [
    survived(
        "the lock of a compilation that was killed, which DeepSpeed would wait for",
        lock_of_a_killed_compilation,
        check=exists("run/DONE"),
        environment={**ZERO, **processes.rank_environments(1)[0], "TORCH_EXTENSIONS_DIR": "extensions"},
    ),
    refused("ZeRO without a launcher", tiny_run, "ZeRO", "accelerate launch", environment=ZERO, alone=True),
]

test_attack = test_of(ATTACKS)
