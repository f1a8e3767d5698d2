"""Attacks on a search: its words, the pictures that it looks through, and what lies where its files will be."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from attacks import ground
from attacks.attack import Attack, Ended, hold
from attacks.test_runs import obeys_nothing
from PIL import Image

SCRIPT = "</script><script>alert(1)</script>\x1b[2J"


def _search(*arguments: str, change: Callable[[Path], object] = lambda folder: None) -> Callable[[Path], list[str]]:
    """A search in four pictures after `change` to their folder's parent."""

    def make(folder: Path) -> list[str]:
        ground.model(folder)
        (folder / "pictures").mkdir()
        for number in range(4):
            _picture(folder, f"{number}.png", number)
        change(folder)
        return ["search", "model", "pictures", *arguments]

    return make


def _picture(folder: Path, name: str, number: int = 9) -> None:
    Image.new("RGB", (32, 32), (number * 20, 0, 0)).save(folder / "pictures" / name, "PNG")


def _names(folder: Path) -> None:
    for name in (
        "<script>alert(1)<_script>\x1b[2J.png",
        '"><img src=x onerror=alert(1)>.png',
        "a\nb.png",
        "\udcff.png",
    ):
        _picture(folder, name)


def _no_files(folder: Path) -> None:
    os.mkfifo(folder / "pictures/pipe.png")
    (folder / "pictures/out.png").symlink_to("/etc/passwd")
    (folder / "pictures/loop").symlink_to(".")


def runs_nothing(folder: Path, ended: Ended) -> None:
    obeys_nothing(folder, ended)
    page = (folder / "search.html").read_text()
    assert not any(code in page for code in ("<script>alert", "<img src=x", "\x1b"))


def _beside(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "search.npz").write_bytes(content)


def _numbers(folder: Path) -> None:
    np.savez(folder / "search.npz", mine=np.arange(3))


def is_kept(folder: Path, ended: Ended) -> None:
    assert not (folder / "search.html").exists()
    assert (folder / "search.npz").exists()


_THEIRS = ("search.npz exists, and no search wrote it; name another page",)
ATTACKS = [
    Attack(
        "queries that are a pipe",
        _search("--queries", "q", change=lambda f: os.mkfifo(f / "q")),
        2,
        ("q, which is not a file",),
    ),
    Attack("words that are code", _search(SCRIPT), 0, ("1 query over 4 pictures",), runs_nothing),
    Attack("words of 100 kB", _search("a " * 50_000), 0, ("1 query over 4 pictures",)),
    Attack("words that are no text", _search("\udcff"), 2, ("is not UTF-8",)),
    Attack("names that are code", _search("a", change=_names), 0, ("1 of 8 pictures are damaged",), runs_nothing),
    Attack("pipes and links among pictures", _search("a", change=_no_files), 0, ("3 of 7 pictures are",), runs_nothing),
    Attack("numbers of the user's where embeddings go", _search("a", change=_numbers), 2, _THEIRS, is_kept),
    Attack("notes of the user's where embeddings go", _search("a", change=_beside(b"mine")), 2, _THEIRS, is_kept),
    Attack("a pipe where embeddings go", _search("a", change=lambda f: os.mkfifo(f / "search.npz")), 2, _THEIRS),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)
