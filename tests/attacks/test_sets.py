"""Attacks on reports about shards, and on folders and files that are in the way."""

import json
import os
import tarfile
from pathlib import Path

import pytest
from attacks.attack import Attack, Ended, hold
from attacks.preparing import mine_stays, of_shards, picture
from conftest import add_member

# Right to left, a bell, an end of line of Unicode, and a person.
_ODD = "\u202e\u05d0 \u0007\u2028 \U0001f9d1"


def _greek_shard(data: Path) -> None:
    """Three pairs. One language has these letters; for Latin ones an audit loads the models of forty."""
    data.mkdir()
    with tarfile.open(data / "good.tar", "w") as tar:
        for number in range(3):
            add_member(tar, f"{number}.jpg", picture(number))
            add_member(tar, f"{number}.txt", f"ένας κόκκινος δίσκος, {number}".encode())


def _long_caption(folder: Path) -> list[str]:
    """A caption of 1 MB, of one word, 70,000 captions of one image, and odd ones, in a shard of their own."""
    _greek_shard(folder / "data")
    with tarfile.open(folder / "data/odd.tar", "w") as tar:
        for number, caption in enumerate(("μακρ".encode() * 125_000, _ODD.encode(), b"\xff\xfe")):
            add_member(tar, f"{number}.jpg", picture(number))
            add_member(tar, f"{number}.txt", caption)
        add_member(tar, "many.jpg", picture(9))
        add_member(tar, "many.json", json.dumps({"captions": [f"{n}" for n in range(70_000)]}).encode())
    return ["prepare", "audit", "data", "--num_workers", "1"]


def _audited(folder: Path, ended: Ended) -> None:
    figures = json.loads((folder / "audit/audit.json").read_text())
    assert figures["samples"] == 3 + 4
    assert figures["captions"]["captions"] == 3 + 2 + 70_000
    assert figures["unusable"]["undecodable_caption"]["count"] == 1


def _inspect_odd(folder: Path) -> list[str]:
    _long_caption(folder)
    return ["prepare", "inspect", "data"]


def _odd_shard_name(folder: Path) -> list[str]:
    data = folder / "data"
    _greek_shard(data)
    os.rename(data / "good.tar", os.fsencode(data) + b"/caf\xe9.tar")
    with tarfile.open(os.fsencode(data) + b"/\xe9.tar", "w") as tar:
        add_member(tar, "0.jpg", b"no picture")
        add_member(tar, "0.txt", b"a caption")
    return ["prepare", "audit", "data", "--num_workers", "1"]


ATTACKS: list[Attack] = [
    Attack(
        "an audit of captions of 1 MB, of 70,000 in one sample, and of odd letters",
        _long_caption,
        check=_audited,
        megabytes=3000,
    ),
    Attack("captions of 1 MB in a contact sheet", _inspect_odd, says=("undecodable_caption",)),
    Attack(
        "names of shards that are no UTF-8",
        _odd_shard_name,
        says=("the whole audit is in",),
        megabytes=3000,
    ),
    Attack(
        "an audit without test sets",
        of_shards("audit", "data", "--tests", "empty"),
        code=2,
        says=("no test set in empty",),
    ),
    Attack(
        "an audit to a file",
        of_shards("audit", "data", "--output_dir", "file"),
        code=2,
        says=("file is a file: name another folder",),
        check=mine_stays,
    ),
    Attack(
        "a contact sheet in no folder",
        of_shards("inspect", "data", "--sheet", "no/sheet.png"),
        code=2,
        says=("--sheet no/sheet.png cannot be written",),
    ),
    Attack(
        "a contact sheet over a text",
        of_shards("inspect", "data", "--sheet", "file"),
        code=2,
        says=("name a PNG file",),
        check=mine_stays,
    ),
    Attack("an index of an empty folder", of_shards("index", "empty"), code=2, says=("no shards at 'empty'",)),
    Attack(
        "tasks to a file",
        of_shards("tasks", "file", "--only", "mnist"),
        code=2,
        says=("file is a file: name another folder",),
    ),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)
