"""Attacks on `flipscale prepare`: lists, folders and archives that nobody would write, and a machine that fails."""

import io
import json
import os
import signal
import socket
import struct
import tarfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
from attacks import ground
from attacks.attack import Attack, Ended, children, hold
from conftest import add_member
from PIL import Image

from flipscale.data.sources.tar_source import TarSource
from flipscale.preparation.demo_emoji import slug
from flipscale.preparation.icons.collection import PACKAGE

SUFFIXES = (".bmp", ".jpg", ".png")


def picture(number: int, kind: str = "JPEG", width: int = 60, height: int = 40) -> bytes:
    """A picture that is like no other."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def images(folder: Path, count: int = 4) -> None:
    """`0.jpg`, `1.jpg`, ... in `folder/in`."""
    (folder / "in").mkdir()
    for number in range(count):
        (folder / f"in/{number}.jpg").write_bytes(picture(number))


def command(source: str, *flags: str) -> list[str]:
    """The command that writes the shards `out`."""
    return ["prepare", "shards", source, "out", "--num_workers", "1", *flags]


def table(content: bytes | str, name: str = "list.csv", *flags: str) -> Callable[[Path], list[str]]:
    """Writes a table beside four images."""

    def make(folder: Path) -> list[str]:
        images(folder)
        (folder / "in" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return command(f"in/{name}", *flags)

    return make


def beside(spoil: Callable[[Path], object], *flags: str) -> Callable[[Path], list[str]]:
    """Writes four images with captions beside them, then spoils the folder."""

    def make(folder: Path) -> list[str]:
        images(folder)
        for number in range(4):
            (folder / f"in/{number}.txt").write_text(f"picture {number}\n")
        spoil(folder / "in")
        return command("in", *flags)

    return make


def keeps(written: int, **causes: int) -> Callable[[Path, Ended], None]:
    """Asserts how many pairs were written, and how many were left out for each cause; each is named."""

    def check(folder: Path, ended: Ended) -> None:
        report = json.loads((folder / "out/report.json").read_text())
        assert (report["written"], report["left_out"]) == (written, causes)
        assert len(TarSource(str(folder / "out"))) == written
        lines = [json.loads(line) for line in (folder / "out/left_out.jsonl").read_text().splitlines()]
        assert len(lines) == sum(causes.values())
        assert all(line["key"] and line["detail"] for line in lines)
        for cause, count in causes.items():
            row = next(line for line in ended.stdout.splitlines() if line.strip().startswith(cause))
            assert f"{count:,}" in row
            assert "such as" in row

    return check


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


def _pipe(folder: Path) -> None:
    (folder / "0.jpg").unlink()
    os.mkfifo(folder / "0.jpg")


def _socket(folder: Path) -> None:
    (folder / "0.jpg").unlink()
    before = os.getcwd()
    os.chdir(folder)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("0.jpg")
    os.chdir(before)


def _link_out(folder: Path) -> None:
    (folder.parent / "secret.jpg").write_bytes(picture(9))
    (folder / "0.jpg").unlink()
    (folder / "0.jpg").symlink_to("../secret.jpg")


def _caption_link_out(folder: Path) -> None:
    (folder.parent / "secret").write_text("password")
    (folder / "0.txt").unlink()
    (folder / "0.txt").symlink_to("../secret")


def _loop(folder: Path) -> None:
    (folder / "0.jpg").unlink()
    (folder / "0.jpg").symlink_to("0.jpg")


def _endless(folder: Path) -> None:
    (folder / "0.jpg").unlink()
    (folder / "0.jpg").symlink_to("/dev/zero")


def _huge(folder: Path) -> None:
    with open(folder / "0.jpg", "ab") as file:
        file.truncate(1 << 34)


def _huge_caption(folder: Path) -> None:
    with open(folder / "0.txt", "ab") as file:
        file.truncate(1 << 33)


def _odd_name(folder: Path) -> None:
    os.rename(folder / "0.jpg", os.fsencode(folder) + b"/caf\xe9.jpg")
    os.rename(folder / "0.txt", os.fsencode(folder) + b"/caf\xe9.txt")


def _wide_bmp(folder: Path) -> None:
    (folder / "0.jpg").write_bytes(picture(0, "BMP", 70_000, 1))
    (folder / "1.jpg").write_bytes(picture(0, "BMP", 70_000, 3))


def _claimed_bmp(folder: Path) -> None:
    header = b"BM" + struct.pack("<IHHI", 54 + 100, 0, 0, 54)
    header += struct.pack("<IiiHHIIiiII", 40, 70_000, 70_000, 1, 24, 0, 0, 0, 0, 0, 0)
    (folder / "0.jpg").write_bytes(header + bytes(100))


def _gif_bomb(folder: Path) -> None:
    frame = Image.new("P", (4000, 4000))
    frame.save(folder / "0.jpg", "GIF", save_all=True, append_images=[frame] * 3)


def _folder_as_image(folder: Path) -> None:
    (folder / "0.jpg").unlink()
    (folder / "0.jpg").mkdir()


def _json_bomb(folder: Path) -> None:
    (folder / "0.txt").unlink()
    (folder / "0.json").write_text('{"caption": ' + "[" * 100_000 + "]" * 100_000 + "}")


def _dotted(folder: Path) -> None:
    for number, name in enumerate(("a.b.jpg", ".c.jpg", "sub/d e.jpg", "A.B.JPG")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{number}.jpg").rename(folder / name)
        (folder / f"{number}.txt").rename((folder / name).with_suffix(".txt"))


def _two_kinds(folder: Path) -> None:
    (folder / "0.png").write_bytes(picture(7, "PNG"))


def _classes(folder: Path) -> None:
    """Folders of classes: some named from right to left, with a bell, in no UTF-8, and one that is no folder."""
    for number, name in enumerate((b"a class", "\u202e\u05d0 \u0007".encode(), b"caf\xe9", b"c")):
        (folder / f"{number}.txt").unlink()
        place = os.fsencode(folder) + b"/" + name
        os.mkdir(place)
        os.rename(folder / f"{number}.jpg", place + b"/0.jpg")
    (folder / "d.jpg").symlink_to("/dev/zero")


def _no_captions(folder: Path) -> None:
    for number in range(4):
        (folder / f"{number}.txt").unlink()


def _to_a_file(folder: Path) -> list[str]:
    images(folder)
    (folder / "in/list.csv").write_text(HEAD + GOOD)
    (folder / "out").write_text("mine")
    return command("in/list.csv")


def _to_its_source(folder: Path) -> list[str]:
    make = beside(lambda folder: None)
    make(folder)
    return ["prepare", "shards", "in", "in", "--num_workers", "1"]


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


def _of_shards(*arguments: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        ground.shards(folder)
        (folder / "file").write_text("mine")
        (folder / "empty").mkdir()
        return ["prepare", *arguments]

    return make


def _mine_stays(folder: Path, ended: Ended) -> None:
    assert (folder / "file").read_text() == "mine"


def _odd_shard_name(folder: Path) -> list[str]:
    data = folder / "data"
    _greek_shard(data)
    os.rename(data / "good.tar", os.fsencode(data) + b"/caf\xe9.tar")
    with tarfile.open(os.fsencode(data) + b"/\xe9.tar", "w") as tar:
        add_member(tar, "0.jpg", b"no picture")
        add_member(tar, "0.txt", b"a caption")
    return ["prepare", "audit", "data", "--num_workers", "1"]


def _photos_over_mine(folder: Path) -> list[str]:
    (folder / "photos/500x400").mkdir(parents=True)
    (folder / "photos/500x400/holiday.jpg").write_bytes(picture(1))
    return ["prepare", "photos", "photos"]


def _demo_over_mine(folder: Path) -> list[str]:
    (folder / "demo").mkdir()
    (folder / "demo/report.json").write_text('{"made_by": "flipscale prepare demo", "parts": []}')
    (folder / "demo/notes.txt").write_text("mine")
    return ["prepare", "demo", "demo", "--with_roles"]


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


def _exists(path: Path) -> None:
    assert path.exists()


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
    Attack("a pipe among the images", beside(_pipe), check=keeps(3, unreadable_file=1)),
    Attack("a socket among the images", beside(_socket), check=keeps(3, unreadable_file=1)),
    Attack("a link out of the folder", beside(_link_out), check=keeps(3, outside_folder=1)),
    Attack("a caption that is a link out of the folder", beside(_caption_link_out), check=keeps(3, outside_folder=1)),
    Attack("a link to itself", beside(_loop), check=keeps(3, unreadable_file=1)),
    Attack("a link to /dev/zero", beside(_endless, "--allow_outside"), check=keeps(3, unreadable_file=1)),
    Attack("an image of 16 GB", beside(_huge), check=keeps(3, sample_too_large=1)),
    Attack("a caption of 8 GB", beside(_huge_caption), check=keeps(3, sample_too_large=1)),
    Attack("a name that is no UTF-8", beside(_odd_name), check=keeps(3, unreadable_file=1)),
    Attack("BMPs of 70,000 x 1 pixels", beside(_wide_bmp), check=keeps(2, undecodable_image=2)),
    Attack("an animation of 16 million pixels a frame", beside(_gif_bomb), check=keeps(4)),
    Attack("a BMP that says it has 70,000 x 70,000 pixels", beside(_claimed_bmp), check=keeps(3, image_too_large=1)),
    Attack("a folder that is called like an image", beside(_folder_as_image), check=keeps(3, unreadable_file=1)),
    Attack("captions nested 100,000 deep beside an image", beside(_json_bomb), check=keeps(3, undecodable_caption=1)),
    Attack("names with dots, blanks and capitals", beside(_dotted), check=keeps(4)),
    Attack(
        "folders of classes with odd names", beside(_classes), check=keeps(3, undecodable_caption=1, missing_caption=1)
    ),
    Attack("pictures without captions", beside(_no_captions), code=2, says=("4 images and no captions",)),
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
    Attack("a path that is misspelled", lambda folder: command("no/such/folder"), code=2, says=("does not exist",)),
    Attack("a JPEG and a PNG of one name", beside(_two_kinds), check=keeps(5)),
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
    Attack("shards to their source", _to_its_source, code=2, says=("`prepare shards` did not write",)),
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
        _of_shards("audit", "data", "--tests", "empty"),
        code=2,
        says=("no test set in empty",),
    ),
    Attack(
        "an audit to a file",
        _of_shards("audit", "data", "--output_dir", "file"),
        code=2,
        says=("file is a file: name another folder",),
        check=_mine_stays,
    ),
    Attack(
        "a contact sheet in no folder",
        _of_shards("inspect", "data", "--sheet", "no/sheet.png"),
        code=2,
        says=("--sheet no/sheet.png cannot be written",),
    ),
    Attack(
        "a contact sheet over a text",
        _of_shards("inspect", "data", "--sheet", "file"),
        code=2,
        says=("name a PNG file",),
        check=_mine_stays,
    ),
    Attack("an index of an empty folder", _of_shards("index", "empty"), code=2, says=("no shards at 'empty'",)),
    Attack("digits over a folder", _of_shards("digits", "empty"), code=2, says=("empty is there already",)),
    Attack(
        "tasks to a file",
        _of_shards("tasks", "file", "--only", "mnist"),
        code=2,
        says=("file is a file: name another folder",),
    ),
    Attack(
        "photos over one's own",
        _photos_over_mine,
        code=2,
        says=("500x400 holds something that `prepare photos` did not write",),
        check=lambda folder, ended: _exists(folder / "photos/500x400/holiday.jpg"),
    ),
    Attack(
        "a demo made anew over one's own file",
        _demo_over_mine,
        code=2,
        says=("holds notes.txt; move that away",),
        check=lambda folder, ended: _exists(folder / "demo/notes.txt"),
    ),
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
        _of_shards("icons", "file"),
        code=2,
        says=("file is a file: name another folder",),
        check=_mine_stays,
    ),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)
