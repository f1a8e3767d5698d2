"""Attacks on `flipscale prepare shards` of lists: tables that nobody would write, and a machine that fails."""

import json
import os
import signal
import tarfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import processes
import pytest
from attacks.attack import Attack, Ended, children, hold
from attacks.preparing import command, images, keeps, picture


def table(content: bytes | str, name: str = "list.csv", *flags: str) -> Callable[[Path], list[str]]:
    """Writes a table beside four images."""

    def make(folder: Path) -> list[str]:
        images(folder)
        (folder / "in" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return command(f"in/{name}", *flags)

    return make


def of_samples(expected: dict[str, str]) -> Callable[[Path, Ended], None]:
    """Asserts which images were written with which captions."""

    def check(folder: Path, ended: Ended) -> None:
        found = {}
        for path in sorted((folder / "out").glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar.getmembers():
                    if member.name.endswith(".json"):
                        key = json.load(tar.extractfile(member))["key"]  # type: ignore[arg-type]
                        caption = tar.extractfile(member.name.replace(".json", ".txt"))
                        found[key] = caption.read().decode()  # type: ignore[union-attr]
        assert found == expected

    return check


HEAD = "file_name,caption\n"
GOOD = "0.jpg,first\n1.jpg,second\n"


def _to_a_file(folder: Path) -> list[str]:
    images(folder)
    (folder / "in/list.csv").write_text(HEAD + GOOD)
    (folder / "out").write_text("mine")
    return command("in/list.csv")


def _kill_workers(folder: Path, pids: list[int]) -> None:
    """Kill the first worker as soon as there is one, as the kernel does when memory is short."""

    def kill() -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            for child in children(pids[0]):
                with suppress(OSError):
                    if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                        os.kill(child, signal.SIGKILL)
                        return
            time.sleep(0.02)

    threading.Thread(target=kill, daemon=True).start()


def _parquet(columns: dict[str, Any], spoil: Callable[[bytes], bytes] = bytes, **how: Any) -> Callable:
    def make(folder: Path) -> list[str]:
        import pyarrow
        import pyarrow.parquet

        images(folder)
        path = folder / "in/list.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path, **how)
        path.write_bytes(spoil(path.read_bytes()))
        return command("in/list.parquet")

    return make


def _spoil_group(content: bytes) -> bytes:
    """Zeros in the first column chunk, which follows the four letters at the start."""
    return content[:30] + bytes(100) + content[130:]


def _many_rows(folder: Path) -> list[str]:
    images(folder)
    with open(folder / "in/list.csv", "w") as file:
        file.write("file_name,caption,source,licence\n")
        for number in range(30_000):
            file.write(
                f'{number % 3}/missing-{number:09d}.jpg,"a caption, rather long, of picture {number}",web,none\n'
            )
        file.write("0.jpg,first,web,none\n")
    return command("in/list.csv", "--max_bad_fraction", "1")


def _shards_again(folder: Path, ended: Ended) -> None:
    """Asserts that the same command goes on after a failure, with nothing taken for whole that is not."""
    assert "the same command goes on where it stopped" in ended.stderr
    assert not list((folder / "out").glob("*.tar"))


def _odd_manifest(folder: Path) -> list[str]:
    table(HEAD + GOOD)(folder)
    run_well(command("in/list.csv"), folder)
    manifest = folder / "out/manifest.jsonl"
    lines = manifest.read_text().splitlines()
    odd = ['{"shard": 0}', '{"shard": "x", "tar_bytes": 1}', "[]", '{"shard": 99, "tar_bytes": 5}', '{"half']
    manifest.write_text("\n".join([lines[0], *odd, *lines[1:]]))
    return command("in/list.csv")


def run_well(arguments: list[str], folder: Path) -> None:
    """Run a command that ends well in `folder`."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        ended = processes.run("flipscale.cli", arguments)
    finally:
        os.chdir(before)
    assert ended.returncode == 0, ended.stderr


def _locked(folder: Path) -> list[str]:
    from filelock import FileLock

    table(HEAD + GOOD)(folder)
    (folder / "out").mkdir()
    _HELD.append(FileLock(folder / "out/.lock"))
    _HELD[-1].acquire()
    return command("in/list.csv")


_HELD: list[Any] = []


def _killed_and_again(folder: Path) -> list[str]:
    """What a kill left: a lock, a shard aside, a shard without its line, half of a line."""
    table(HEAD + GOOD + "2.jpg,third\n3.jpg,fourth\n")(folder)
    run_well([*command("in/list.csv"), "--pairs_per_shard", "1"], folder)
    (folder / "whole").mkdir()
    for path in sorted((folder / "out").glob("*.tar")):
        (folder / "whole" / path.name).write_bytes(path.read_bytes())
    manifest = folder / "out/manifest.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    (folder / "out/.lock").write_text("")
    (folder / "out/.00003.tar.partial.host.1.1").write_bytes(b"half")
    (folder / "out/00003.tar").write_bytes(b"half")
    return [*command("in/list.csv"), "--pairs_per_shard", "1"]


def _as_whole(folder: Path, ended: Ended) -> None:
    keeps(4)(folder, ended)
    for path in (folder / "whole").iterdir():
        assert path.read_bytes() == (folder / "out" / path.name).read_bytes()
    assert not list((folder / "out").glob(".*.partial*"))


ATTACKS: list[Attack] = [
    Attack(
        "a quote of a CSV that is never closed",
        table(HEAD + '0.jpg,"first\n1.jpg,second\n2.jpg,"third, and more"\n3.jpg,fourth\n'),
        check=keeps(3, malformed_row=1),
    ),
    Attack(
        "two quotes of a CSV that look like one long caption",
        table(HEAD + '0.jpg,"first\n1.jpg,second\n2.jpg,third"\n3.jpg,fourth\n'),
        check=of_samples({"1.jpg": "second", "2.jpg": 'third"', "3.jpg": "fourth"}),
    ),
    Attack(
        "captions of several lines in a CSV",
        table(HEAD + '0.jpg,"first, with\na ""second"" line\n\nand more"\r\n1.jpg,second\r\n'),
        check=of_samples({"0.jpg": 'first, with\na "second" line\n\nand more', "1.jpg": "second"}),
    ),
    Attack(
        "short and long rows of a CSV",
        table(HEAD + GOOD + "2.jpg\n3.jpg,fourth,too,many\n,\n"),
        check=keeps(2, malformed_row=2, missing_caption=1),
    ),
    Attack(
        "NUL in a CSV",
        table(HEAD + GOOD + "2.jpg,a\0b\n3\0.jpg,fourth\n\0\0\0\n"),
        check=keeps(2, undecodable_caption=1, unreadable_file=1, malformed_row=1),
    ),
    Attack(
        "a CSV of several encodings",
        table(HEAD.encode() + GOOD.encode() + "2.jpg,café\n".encode("latin-1") + "3.jpg,café\n".encode()),
        check=keeps(3, malformed_row=1),
    ),
    Attack(
        "a CSV with the mark of UTF-8 and ends of lines of Windows",
        table(b"\xef\xbb\xbf" + (HEAD + GOOD).replace("\n", "\r\n").encode()),
        check=of_samples({"0.jpg": "first", "1.jpg": "second"}),
    ),
    Attack("a CSV in UTF-16", table((HEAD + GOOD).encode("utf-16")), code=2, says=("list.csv", "save it as UTF-8")),
    Attack(
        "a field of 200 kB, and a row of 5 MB",
        table(HEAD + "0.jpg," + "long " * 40_000 + '\n1.jpg,"' + "longer " * 700_000 + '"\n2.jpg,third\n'),
        check=keeps(1, caption_too_long=1, malformed_row=1),
    ),
    Attack("a CSV of one endless line", table("file_name,caption" * 500_000), code=2, says=("list.csv",)),
    Attack("an empty CSV", table(""), code=2, says=("in/list.csv has no column",)),
    Attack("a CSV of a header", table(HEAD), code=2, says=("in/list.csv has no rows",)),
    Attack("two columns of one name", table("file_name,caption,caption\n0.jpg,a,b\n"), code=2, says=("two columns",)),
    Attack(
        "JSON lines of all kinds",
        table(
            '{"file_name": "0.jpg", "caption": "first"}\n[]\n"text"\n7\nnull\n{"file_name": "1.jpg"}\n'
            '{"caption": "no file"}\n{"file_name": 7, "caption": "x"}\n{"file_name": "1.jpg", "caption": NaN}\n'
            '{"file_name": "1.jpg", "caption": 5}\n{"file_name": "1.jpg", "caption": "\\ud800"}\n'
            '{"file_name": "\\udce9.jpg", "caption": "x"}\n{"file_name": "1.jpg", "caption": ["", "second", null]}\n'
            '{"file_name": "1.jpg", "caption": {"a": 1}}\n{"file_name": "2.jpg", "cap\n\n'
            '{"file_name": "1.jpg", "caption": ' + "[" * 200_000 + "\n",
            "list.jsonl",
        ),
        check=keeps(2, malformed_row=6, undecodable_caption=4, unreadable_file=3, missing_caption=1),
    ),
    Attack(
        "JSON lines whose first are none",
        table('{"other": 1}\nbroken\n{"file_name": "0.jpg", "caption": "first"}\n', "list.jsonl"),
        check=keeps(1, malformed_row=1, missing_caption=1),
    ),
    Attack("JSON lines that are a picture", table(picture(1), "list.jsonl"), code=2, says=("is no JSONL table",)),
    Attack(
        "paths outside the folder of the list",
        table(HEAD + GOOD + "../secret.jpg,x\n/etc/hostname,x\nsub/../../in/2.jpg,x\n/dev/zero,x\n"),
        check=keeps(2, outside_folder=3, unreadable_file=1),
    ),
    Attack("a list whose images all lie elsewhere", table(HEAD + "/etc/hostname,x\n"), code=2, says=("--allow_out",)),
    Attack(
        "paths outside the folder that are asked for",
        table(HEAD + "0.jpg,first\n../in/1.jpg,second\n/etc/hostname,x\n", "list.csv", "--allow_outside"),
        check=keeps(2, undecodable_image=1),
    ),
    Attack(
        "files of a list that are missing, empty, cut, text, a device, or too long a name",
        table(HEAD + GOOD + f"no.jpg,x\n.,x\nlist.csv,x\n{'a' * 300}.jpg,x\n0.jpg/1.jpg,x\n,x\n"),
        check=keeps(2, unreadable_file=4, outside_folder=1, undecodable_image=1),
    ),
    Attack(
        "classes of a column that is blank",
        table("file_name,caption,kind\n0.jpg,a,\n1.jpg,b,\n", "list.csv", "--labels", "kind"),
        code=2,
        says=("no pair of in/list.csv has a class",),
    ),
    Attack(
        "classes of odd names, some missing",
        table(
            "file_name,caption,kind\n0.jpg,a,\u202e\u05d0\n1.jpg,b,\n2.jpg,c,\x07\n3.jpg,d,a  class\n",
            "list.csv",
            "--labels",
            "kind",
        ),
        check=keeps(1, missing_label=3),
    ),
    Attack(
        "a parquet file of odd rows",
        _parquet({"path": ["0.jpg", None, "../x.jpg", "1.jpg"], "text": ["first", "x", "x", None]}),
        check=keeps(1, unreadable_file=1, outside_folder=1, missing_caption=1),
    ),
    Attack(
        "a parquet file of images without bytes, with wrong ones, and with paths",
        _parquet(
            {
                "image": [{"bytes": picture(1)}, {"bytes": None}, {"bytes": b"no"}, {"bytes": b""}],
                "caption": ["first", "x", "x", "x"],
            }
        ),
        check=keeps(1, unreadable_file=2, undecodable_image=1),
    ),
    Attack(
        "a parquet file of numbers",
        _parquet({"path": [1, 2], "text": [0.5, float("nan")]}),
        code=2,
        says=("2 of 2 pairs of in/list.parquet cannot be used, which leaves none: 2 for undecodable_caption",),
    ),
    Attack(
        "a parquet file with a damaged row group",
        _parquet(
            {"path": ["2.jpg", "3.jpg", "0.jpg", "1.jpg"], "text": ["a", "b", "c", "d"]}, _spoil_group, row_group_size=2
        ),
        check=keeps(2, unreadable_file=2),
    ),
    Attack("a parquet file cut short", _parquet({"path": ["0.jpg"], "text": ["a"]}, lambda b: b[:-20]), code=2),
    Attack("a parquet file without rows", _parquet({"path": [], "text": []}), code=2, says=("has no rows",)),
    Attack("a parquet file without captions", _parquet({"path": ["0.jpg"]}), code=2, says=("--caption_column",)),
    Attack(
        "many thousand rows whose images are missing",
        _many_rows,
        check=keeps(1, unreadable_file=30_000),
        megabytes=300,
    ),
    Attack("shards to a file", _to_a_file, code=2, says=("out is a file: name another folder",)),
    Attack("two that write to one folder", _locked, code=2, says=("another process writes to out",)),
    Attack("a manifest of odd lines", _odd_manifest, check=keeps(2)),
    Attack(
        "a worker killed by the kernel",
        table(HEAD + GOOD),
        code=1,
        says=("a worker died",),
        during=_kill_workers,
        check=_shards_again,
    ),
    Attack("what a kill in the middle leaves", _killed_and_again, check=_as_whole),
    Attack(
        "a fraction that is none",
        table(HEAD + GOOD, "list.csv", "--max_bad_fraction", "nan"),
        code=2,
        says=("max_bad_fraction is nan",),
    ),
    Attack(
        "more bad rows than may be",
        table(HEAD + GOOD + "no.jpg,x\n" * 2, "list.csv", "--max_bad_fraction", "0.4"),
        code=2,
        says=("2 of 4 pairs of in/list.csv cannot be used, more than --max_bad_fraction 0.4: 2 for unreadable_file",),
    ),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)
