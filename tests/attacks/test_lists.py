"""Attacks on `flipscale prepare shards` of lists: odd tables, and a machine that fails."""

import json
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from attacks.attack import Attack, Ended, children, later, refused, survived, test_of
from attacks.preparing import command, images, keeps, picture

from flipscale.cli import main


@later
def table(folder: Path, content: bytes | str, name: str = "list.csv", *flags: str) -> list[str]:
    """A table beside four images."""
    images(folder)
    (folder / "in" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return command(f"in/{name}", *flags)


@later
def writes(folder: Path, ended: Ended, expected: dict[str, str]) -> None:
    """Check the written images and captions."""
    written = {}
    for path in sorted((folder / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".json"):
                    key = json.load(tar.extractfile(member))["key"]  # type: ignore[arg-type]
                    caption = tar.extractfile(member.name.replace(".json", ".txt"))
                    written[key] = caption.read().decode()  # type: ignore[union-attr]
    assert written == expected


HEAD = "file_name,caption\n"
GOOD = "0.jpg,first\n1.jpg,second\n"


def to_a_file(folder: Path) -> list[str]:
    (folder / "out").write_text("mine")
    return table(HEAD + GOOD)(folder)


def kill_workers(folder: Path, pids: list[int]) -> None:
    """Kill the first worker, as the kernel does when memory is short."""

    def kill() -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            for child in children(pids[0]):
                with suppress(psutil.Error):
                    if any("spawn_main" in word for word in child.cmdline()):
                        return child.kill()
            time.sleep(0.02)

    threading.Thread(target=kill, daemon=True).start()


@later
def parquet(folder: Path, columns: dict[str, Any], spoil: Callable[[bytes], bytes] = bytes, **how: Any) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    images(folder)
    path = folder / "in/list.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **how)
    path.write_bytes(spoil(path.read_bytes()))
    return command("in/list.parquet")


def spoil_group(content: bytes) -> bytes:
    """Write zeros to the first column chunk, after the four letters at the start."""
    return content[:30] + bytes(100) + content[130:]


def shards_again(folder: Path, ended: Ended) -> None:
    """Assert that the same command resumes after a failure, and that no shard looks whole."""
    assert "same command" in ended.stderr
    assert not list((folder / "out").glob("*.tar"))


def odd_manifest(folder: Path) -> list[str]:
    arguments = table(HEAD + GOOD)(folder)
    run_well(arguments, folder)
    manifest = folder / "out/manifest.jsonl"
    lines = manifest.read_text().splitlines()
    odd = ['{"shard": 0}', '{"shard": "x", "tar_bytes": 1}', "[]", '{"shard": 99, "tar_bytes": 5}', '{"half']
    manifest.write_text("\n".join([lines[0], *odd, *lines[1:]]))
    return arguments


def run_well(arguments: list[str], folder: Path) -> None:
    """Run a command in `folder`, which must end well."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        main(arguments)
    finally:
        os.chdir(before)


def locked(folder: Path) -> list[str]:
    from filelock import FileLock

    (folder / "out").mkdir()
    HELD.append(FileLock(folder / "out/.lock"))
    HELD[-1].acquire()
    return table(HEAD + GOOD)(folder)


HELD: list[Any] = []


def killed_and_again(folder: Path) -> list[str]:
    """Leave a lock, a partial shard, a shard without its line, and half of a line, as a kill may."""
    arguments = table(HEAD + GOOD + "2.jpg,third\n3.jpg,fourth\n", "list.csv", "--pairs_per_shard", "1")(folder)
    run_well(arguments, folder)
    shutil.copytree(folder / "out", folder / "whole")
    manifest = folder / "out/manifest.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    (folder / "out/.lock").write_text("")
    (folder / "out/.00003.tar.partial.host.1.1").write_bytes(b"half")
    (folder / "out/00003.tar").write_bytes(b"half")
    return arguments


def as_whole(folder: Path, ended: Ended) -> None:
    keeps(4)(folder, ended)
    for path in (folder / "whole").glob("*.tar"):
        assert path.read_bytes() == (folder / "out" / path.name).read_bytes()
    assert not list((folder / "out").glob(".*.partial*"))


JSON = "list.jsonl"
JSON_LINES = (
    '{"file_name": "0.jpg", "caption": "first"}\n[]\n"text"\n7\nnull\n{"file_name": "1.jpg"}\n'
    '{"caption": "no file"}\n{"file_name": 7, "caption": "x"}\n{"file_name": "1.jpg", "caption": NaN}\n'
    '{"file_name": "1.jpg", "caption": 5}\n{"file_name": "1.jpg", "caption": "\\ud800"}\n'
    '{"file_name": "\\udce9.jpg", "caption": "x"}\n{"file_name": "1.jpg", "caption": ["", "second", null]}\n'
    '{"file_name": "1.jpg", "caption": {"a": 1}}\n{"file_name": "2.jpg", "cap\n\n'
    '{"file_name": "1.jpg", "caption": ' + "[" * 200_000 + "\n"
)
ENCODINGS = HEAD.encode() + GOOD.encode() + "2.jpg,café\n".encode("latin-1") + "3.jpg,café\n".encode()
WINDOWS = b"\xef\xbb\xbf" + (HEAD + GOOD).replace("\n", "\r\n").encode()
LONG = HEAD + "0.jpg," + "long " * 40_000 + '\n1.jpg,"' + "longer " * 700_000 + '"\n2.jpg,third\n'
KINDS = "file_name,caption,kind\n"
ODD_KINDS = KINDS + "0.jpg,a,\u202e\u05d0\n1.jpg,b,\n2.jpg,c,\x07\n3.jpg,d,a  class\n"
LABELS = ("list.csv", "--labels", "kind")
FRACTION = ("list.csv", "--max_bad_fraction")
ROWS = "".join(f'{n % 3}/missing-{n:09d}.jpg,"a caption, rather long, of picture {n}",web\n' for n in range(30_000))
MANY = "file_name,caption,source\n" + ROWS + "0.jpg,first,web\n"
IMAGES = [{"bytes": picture(1)}, {"bytes": None}, {"bytes": b"no"}, {"bytes": b""}]
FOUR = {"path": ["2.jpg", "3.jpg", "0.jpg", "1.jpg"], "text": ["a", "b", "c", "d"]}
ATTACKS: list[Attack] = [
    survived(
        "a quote of a CSV that is never closed",
        table(HEAD + '0.jpg,"first\n1.jpg,second\n2.jpg,"third, and more"\n3.jpg,fourth\n'),
        check=keeps(3, malformed_row=1),
    ),
    survived(
        "two quotes of a CSV that look like one long caption",
        table(HEAD + '0.jpg,"first\n1.jpg,second\n2.jpg,third"\n3.jpg,fourth\n'),
        check=writes({"1.jpg": "second", "2.jpg": 'third"', "3.jpg": "fourth"}),
    ),
    survived(
        "captions of several lines in a CSV",
        table(HEAD + '0.jpg,"first, with\na ""second"" line\n\nand more"\r\n1.jpg,second\r\n'),
        check=writes({"0.jpg": 'first, with a "second" line and more', "1.jpg": "second"}),  # a line is a caption
    ),
    survived(
        "short and long rows of a CSV", table(HEAD + GOOD + "2.jpg\n3.jpg,fourth,too,many\n,\n"),
        check=keeps(2, malformed_row=2, missing_caption=1),
    ),
    survived(
        "NUL in a CSV", table(HEAD + GOOD + "2.jpg,a\0b\n3\0.jpg,fourth\n\0\0\0\n"),
        check=keeps(2, undecodable_caption=1, unreadable_file=1, malformed_row=1),
    ),
    survived("a CSV of several encodings", table(ENCODINGS), check=keeps(3, malformed_row=1)),
    survived(
        "a CSV with the mark of UTF-8 and ends of lines of Windows", table(WINDOWS),
        check=writes({"0.jpg": "first", "1.jpg": "second"}),
    ),
    refused("a CSV in UTF-16", table((HEAD + GOOD).encode("utf-16")), "list.csv", "UTF-8"),
    refused("a CSV in UTF-16 without its mark", table((HEAD + GOOD).encode("utf-16-le")), "list.csv", "is UTF-16"),
    refused("a CSV in big UTF-16 without its mark", table((HEAD + GOOD).encode("utf-16-be")), "list.csv", "is UTF-16"),
    survived("a field of 200 kB, and a row of 5 MB", table(LONG), check=keeps(1, caption_too_long=1, malformed_row=1)),
    refused("a CSV of one endless line", table("file_name,caption" * 500_000), "list.csv"),
    refused("an empty CSV", table(""), "list.csv"),
    refused("a CSV of a header", table(HEAD), "list.csv"),
    refused("two columns of one name", table("file_name,caption,caption\n0.jpg,a,b\n"), "caption"),
    survived(
        "JSON lines of all kinds", table(JSON_LINES, JSON),
        check=keeps(2, malformed_row=6, undecodable_caption=4, unreadable_file=3, missing_caption=1),
    ),
    survived(
        "JSON lines whose first are none",
        table('{"other": 1}\nbroken\n{"file_name": "0.jpg", "caption": "first"}\n', JSON),
        check=keeps(1, malformed_row=1, missing_caption=1),
    ),
    refused("JSON lines that are a picture", table(picture(1), JSON), JSON),
    survived(
        "paths outside the folder of the list",
        table(HEAD + GOOD + "../secret.jpg,x\n/etc/hostname,x\nsub/../../in/2.jpg,x\n/dev/zero,x\n"),
        check=keeps(2, outside_folder=3, unreadable_file=1),
    ),
    refused("a list whose images all lie elsewhere", table(HEAD + "/etc/hostname,x\n"), "--allow_outside"),
    survived(
        "paths outside the folder that are asked for",
        table(HEAD + "0.jpg,first\n../in/1.jpg,second\n/etc/hostname,x\n", "list.csv", "--allow_outside"),
        check=keeps(2, undecodable_image=1),
    ),
    survived(
        "files of a list that are missing, empty, cut, text, a device, or too long a name",
        table(HEAD + GOOD + f"no.jpg,x\n.,x\nlist.csv,x\n{'a' * 300}.jpg,x\n0.jpg/1.jpg,x\n,x\n"),
        check=keeps(2, unreadable_file=4, outside_folder=1, undecodable_image=1),
    ),
    refused("classes of a column that is blank", table(KINDS + "0.jpg,a,\n1.jpg,b,\n", *LABELS), "list.csv", "class"),
    survived("classes of odd names, some missing", table(ODD_KINDS, *LABELS), check=keeps(1, missing_label=3)),
    survived(
        "a parquet file of odd rows",
        parquet({"path": ["0.jpg", None, "../x.jpg", "1.jpg"], "text": ["first", "x", "x", None]}),
        check=keeps(1, unreadable_file=1, outside_folder=1, missing_caption=1),
    ),
    survived(
        "a parquet file of images without bytes, with wrong ones, and with paths",
        parquet({"image": IMAGES, "caption": ["first", "x", "x", "x"]}),
        check=keeps(1, unreadable_file=2, undecodable_image=1),
    ),
    refused(
        "a parquet file of numbers", parquet({"path": [1, 2], "text": [0.5, float("nan")]}),
        "2 of 2", "list.parquet", "undecodable_caption",
    ),
    survived(
        "a parquet file with a damaged row group", parquet(FOUR, spoil_group, row_group_size=2),
        check=keeps(2, unreadable_file=2),
    ),
    refused("a parquet file cut short", parquet({"path": ["0.jpg"], "text": ["a"]}, lambda content: content[:-20])),
    refused("a parquet file without rows", parquet({"path": [], "text": []}), "rows"),
    refused("a parquet file without captions", parquet({"path": ["0.jpg"]}), "--caption_column"),
    survived(
        "many thousand rows whose images are missing", table(MANY, *FRACTION, "1"),
        check=keeps(1, unreadable_file=30_000),
        megabytes=300, alone=True,
    ),
    refused("shards to a file", to_a_file, "out", "folder"),
    refused("two that write to one folder", locked, "another process", "out", alone=True),
    survived("a manifest of odd lines", odd_manifest, check=keeps(2)),
    Attack(
        "a worker killed by the kernel", table(HEAD + GOOD), 1, ("worker",), shards_again, during=kill_workers,
    ),
    survived("what a kill in the middle leaves", killed_and_again, check=as_whole),
    refused("a fraction that is none", table(HEAD + GOOD, *FRACTION, "nan"), "max_bad_fraction is nan"),
    refused(
        "more bad rows than may be", table(HEAD + GOOD + "no.jpg,x\n" * 2, *FRACTION, "0.4"),
        "2 of 4", "--max_bad_fraction 0.4", "unreadable_file",
    ),
]  # fmt: skip

test_attack = test_of(ATTACKS)
