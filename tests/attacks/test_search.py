"""Attacks on a search: its words, its pictures, and files in the place of its own."""

import os
import re
from pathlib import Path

import numpy as np
from attacks import ground
from attacks.attack import Change, Ended, later, refused, survived, test_of
from attacks.changes import lacks, mine, nothing, obeys_nothing, pipe
from PIL import Image

SCRIPT = "</script><script>alert(1)</script>\x1b[2J"
ODD_NAMES = (
    "<script>alert(1)<_script>\x1b[2J.png", '"><img src=x onerror=alert(1)>.png', "a\nb.png", "\udcff.png",
)  # fmt: skip


@later
def search(folder: Path, *arguments: str, change: Change = nothing) -> list[str]:
    """A search in four pictures, after `change` to their parent folder."""
    ground.model(folder)
    (folder / "pictures").mkdir()
    for number in range(4):
        picture(folder, f"{number}.png", number)
    change(folder)
    return ["search", "model", "pictures", *arguments]


def picture(folder: Path, name: str, number: int = 9) -> None:
    Image.new("RGB", (32, 32), (number * 20, 0, 0)).save(folder / "pictures" / name, "PNG")


def odd_names(folder: Path) -> None:
    for name in ODD_NAMES:
        picture(folder, name)


def no_files(folder: Path) -> None:
    os.mkfifo(folder / "pictures/pipe.png")
    (folder / "pictures/out.png").symlink_to("/etc/passwd")
    (folder / "pictures/loop").symlink_to(".")


def links_out(folder: Path) -> None:
    """Link a picture and a caption out of the folder, each of which is readable."""
    (folder / "elsewhere").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "elsewhere/private.png")
    (folder / "elsewhere/private.txt").write_text("private words")
    (folder / "pictures/out.png").symlink_to(folder / "elsewhere/private.png")
    (folder / "pictures/linked").symlink_to(folder / "elsewhere")
    (folder / "pictures/0.txt").symlink_to(folder / "elsewhere/private.txt")
    (folder / "pictures/in.png").symlink_to("1.png")


def has_five(folder: Path, ended: Ended) -> None:
    page = (folder / "search.html").read_text()
    assert len(set(re.findall(r'<figure title="(\d|in)\.png"', page))) == 5
    assert "out.png" not in page
    assert "private" not in page


def finds_nothing(folder: Path, ended: Ended) -> None:
    assert "<figure title" not in (folder / "search.html").read_text()


def runs_nothing(folder: Path, ended: Ended) -> None:
    obeys_nothing(folder, ended)
    page = (folder / "search.html").read_text()
    assert not any(code in page for code in ("<script>alert", "<img src=x", "\x1b"))


def numbers(folder: Path) -> None:
    np.savez(folder / "search.npz", mine=np.arange(3))


NOTES = mine("search.npz")
IS_KEPT = lacks("search.html")
ATTACKS = [
    refused("queries that are a pipe", search("--queries", "q", change=pipe("q")), "q"),
    survived("words that are code", search(SCRIPT), "1 query", "4 pictures", check=runs_nothing),
    survived("words of 100 kB", search("a " * 50_000), "1 query", "4 pictures"),
    refused("words that are no text", search("\udcff"), "UTF-8"),
    survived("names that are code", search("a", change=odd_names), "1 of 8 pictures", check=runs_nothing),
    survived("pipes and links among pictures", search("a", change=no_files), "3 of 7 pictures", check=runs_nothing),
    survived("links out of the pictures", search("red", change=links_out), "2 of 7 pictures", check=has_five),
    survived("words that are tokens without a meaning", search("<pad>", "<unk>"), "2 queries", check=finds_nothing),
    refused("numbers of the user's where embeddings go", search("a", change=numbers), "search.npz", check=IS_KEPT),
    refused("notes of the user's where embeddings go", search("a", change=NOTES), "search.npz", check=IS_KEPT),
    refused("a pipe where embeddings go", search("a", change=pipe("search.npz")), "search.npz"),
]

test_attack = test_of(ATTACKS)
