"""Attacks by what a sample holds: its image and its captions."""

import io
import tarfile
from pathlib import Path

import pytest
from attacks import ground
from attacks.attack import Attack, hold
from conftest import add_member
from PIL import Image


def _long_png(folder: Path) -> list[str]:
    data, file = ground.shards(folder), io.BytesIO()
    Image.new("RGB", (1, 20_000)).save(file, "png")
    with tarfile.open(data / "00004.tar", "w") as tar:
        add_member(tar, "long.png", file.getvalue())
        add_member(tar, "long.txt", b"a red bar")
    return ground.pretrain(folder)


ATTACKS = [Attack("a PNG of 1 x 20,000 pixels", _long_png)]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)
