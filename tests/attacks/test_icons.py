"""Attacks on `flipscale prepare icons`: an npm that sends something else or nothing, and what lies in the way."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from attacks.attack import Attack, Ended, hold
from attacks.preparing import mine_stays, of_shards
from conftest import add_member

from flipscale.preparation.demo_emoji import slug
from flipscale.preparation.icons.collection import PACKAGE

_NO_ICONS = "icons holds something that is not the icons; name a new folder"


def _icons(npm: str, spoil: Callable[[Path], object] = lambda folder: None) -> Callable[[Path], list[str]]:
    """The icons, by an npm that does this; it is to write to the folder `$to`."""

    def make(folder: Path) -> list[str]:
        (folder / "bin").mkdir()
        to = 'while [ "$1" != --pack-destination ]; do shift; done; to=$2'
        (folder / "bin/npm").write_text(f"#!/bin/sh\n{to}\n{npm}\n")
        (folder / "bin/npm").chmod(0o755)
        spoil(folder)
        return ["prepare", "icons", "icons", "--num_workers", "1"]

    return make


def _odd_package(folder: Path) -> None:
    with tarfile.open(folder / "json.tgz", "w:gz") as tar:
        add_member(tar, "package/json/mdi.json", b'{"prefix": "mdi", "icons": [')


def _torn(folder: Path) -> None:
    """What a kill at any instant may leave, and a disk that fails."""
    work = folder / ".icons.partial"
    (work / ".drawn").mkdir(parents=True)
    (work / ".begun.json").write_bytes(b"\xff\0")
    (work / ".drawn/mdi.000.npy").write_bytes(b"\x93NUMPY")
    download = work / ".download" / slug(PACKAGE)
    download.mkdir(parents=True)
    os.mkfifo(download / "pipe.tgz")


def _icons_hold(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "icons").mkdir()
        make(folder / "icons" / name)

    return spoil


def _icons_end(name: str, make: Callable[[Path], list[str]], code: int, *says: str) -> Attack:
    """Nothing of the icons is there, or nothing but what was there."""

    def check(folder: Path, ended: Ended) -> None:
        assert not (folder / "icons").exists() or len(list((folder / "icons").iterdir())) == 1

    return Attack(name, make, code, says, check, environment={"PATH": f"bin:{os.environ['PATH']}"})


ATTACKS: list[Attack] = [
    _icons_end(
        "a package of icons whose JSON is none",
        _icons('cp json.tgz "$to"', _odd_package),
        1,
        "npm downloaded another package for @iconify/json",
    ),
    _icons_end(
        "a package of icons that is cut short",
        _icons('head -c 100 json.tgz > "$to/json.tgz"', _odd_package),
        1,
        "npm downloaded another package for @iconify/json",
    ),
    _icons_end("a registry that sends no icons", _icons("true"), 1, "npm downloaded nothing for @iconify/json"),
    _icons_end(
        "a registry of icons that is not there",
        _icons("echo 'npm error network request failed, reason: getaddrinfo ENOTFOUND' >&2; exit 1"),
        2,
        "npm could not download @iconify/json",
        "getaddrinfo ENOTFOUND; check that npm reaches its registry",
    ),
    _icons_end(
        "an npm that prints bytes and is killed",
        _icons("printf '\\377\\033[2J'; kill -9 $$"),
        2,
        "npm could not download @iconify/json",
    ),
    _icons_end(
        "what a kill leaves of icons, and a pipe",
        _icons("exit 1", _torn),
        2,
        "npm could not download @iconify/json",
    ),
    _icons_end(
        "a file where icons are made",
        _icons("exit 1", lambda folder: (folder / ".icons.partial").write_text("x")),
        2,
        "npm could not download @iconify/json",
    ),
    _icons_end("icons among one's own", _icons("true", _icons_hold("notes.txt", Path.touch)), 2, _NO_ICONS),
    _icons_end(
        "icons whose report is nested 100,000 deep",
        _icons("true", _icons_hold("report.json", lambda file: file.write_text("[" * 100_000))),
        2,
        _NO_ICONS,
    ),
    _icons_end("icons whose report is a pipe", _icons("true", _icons_hold("report.json", os.mkfifo)), 2, _NO_ICONS),
    Attack(
        "icons to a file",
        of_shards("icons", "file"),
        code=2,
        says=("file is a file: name another folder",),
        check=mine_stays,
    ),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)
