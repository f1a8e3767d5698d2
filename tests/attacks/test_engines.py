"""Attacks by what other programs left on the machine."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from attacks import ground
from attacks.attack import Attack, Ended, hold
from distributed.crowd import ENVIRONMENTS

pytest.importorskip("deepspeed")


def _lock_of_a_killed_compilation(folder: Path) -> Sequence[str]:
    ground.shards(folder)
    for version in ("", "py310_cpu", "py311_cpu", "py312_cpu", "py313_cpu"):
        place = folder / "extensions" / version / "deepspeed_shm_comm"
        place.mkdir(parents=True)
        (place / "lock").touch()
    return ground.pretrain(folder)


def _is_done(folder: Path, ended: Ended) -> None:
    assert (folder / "run/DONE").exists()


ATTACKS = [
    Attack(
        "the lock of a compilation that was killed, which DeepSpeed would wait for",
        _lock_of_a_killed_compilation,
        check=_is_done,
        environment={**ENVIRONMENTS["zero3"], "ACCELERATE_USE_CPU": "1", "TORCH_EXTENSIONS_DIR": "extensions"},
    )
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)
