"""Attacks on reports about shards, and by files in the way."""

import json
import os
import tarfile
from pathlib import Path

from attacks.attack import Attack, Ended, refused, survived, test_of
from attacks.changes import kept
from attacks.preparing import on_shards, picture
from conftest import add_member, write_tar

# Right to left, a bell, a line separator of Unicode, and a person.
ODD = "\u202e\u05d0 \u0007\u2028 \U0001f9d1"


def greek_shard(data: Path) -> None:
    """Three pairs in Greek, because an audit of Latin letters loads the models of forty languages."""
    captions = (f"ένας κόκκινος δίσκος, {number}".encode() for number in range(3))
    write_tar(data / "good.tar", ({"jpg": picture(number), "txt": text} for number, text in enumerate(captions)))


def long_captions(folder: Path, verb: str = "audit") -> list[str]:
    """A caption of 1 MB in one word, 70,000 captions of one image, and odd captions."""
    greek_shard(folder / "data")
    captions = ("μακρ".encode() * 125_000, ODD.encode(), b"\xff\xfe")
    odd = [{"jpg": picture(number), "txt": caption} for number, caption in enumerate(captions)]
    many = {"jpg": picture(9), "json": json.dumps({"captions": [f"{n}" for n in range(70_000)]}).encode()}
    write_tar(folder / "data/odd.tar", [*odd, many])
    return ["prepare", verb, "data", *(["--num_workers", "1"] if verb == "audit" else [])]


def counts_them(folder: Path, ended: Ended) -> None:
    figures = json.loads((folder / "audit/audit.json").read_text())
    assert figures["samples"] == 3 + 4
    assert figures["captions"]["captions"] == 3 + 2 + 70_000
    assert figures["unusable"]["undecodable_caption"]["count"] == 1


def odd_shard_names(folder: Path) -> list[str]:
    data = folder / "data"
    greek_shard(data)
    os.rename(data / "good.tar", os.fsencode(data) + b"/caf\xe9.tar")
    with tarfile.open(os.fsencode(data) + b"/\xe9.tar", "w") as tar:
        add_member(tar, "0.jpg", b"no picture")
        add_member(tar, "0.txt", b"a caption")
    return ["prepare", "audit", "data", "--num_workers", "1"]


LARGE = {"megabytes": 3000, "alone": True}
ATTACKS: list[Attack] = [
    survived(
        "an audit of captions of 1 MB, of 70,000 in one sample, and of odd letters",
        long_captions, check=counts_them, long=True, **LARGE,
    ),
    survived("captions of 1 MB in a contact sheet", lambda f: long_captions(f, "inspect"), "undecodable_caption"),
    survived("names of shards that are no UTF-8", odd_shard_names, "audit", long=True, **LARGE),
    refused("an audit without test sets", on_shards("audit", "data", "--tests", "empty"), "empty"),
    refused("an audit to a file", on_shards("audit", "data", "--output_dir", "file"), "file", check=kept("file")),
    refused("a contact sheet in no folder", on_shards("inspect", "data", "--sheet", "no/sheet.png"), "no/sheet.png"),
    refused("a contact sheet over a text", on_shards("inspect", "data", "--sheet", "file"), "PNG", check=kept("file")),
    refused("an index of an empty folder", on_shards("index", "empty"), "'empty'"),
    refused("tasks to a file", on_shards("tasks", "file", "--only", "mnist"), "file", "folder"),
]  # fmt: skip

test_attack = test_of(ATTACKS)
