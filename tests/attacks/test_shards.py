"""Attacks by a shard, its index or the manifest, and by other files in the place of a shard."""

import gzip
import io
import os
import shutil
import struct
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from attacks import ground
from attacks.attack import Attack, Change, Ended, Make, later, refused, survived, test_of
from attacks.changes import unix_socket
from conftest import add_member

from flipscale.data.sources.manifest import write_manifest
from flipscale.data.sources.shard_index import ShardIndex, index_path
from flipscale.data.sources.tar import TarSource


def tar(*files: tuple[str, bytes], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of these files."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=kind, encoding="latin1") as archive:
        for name, content in files:
            add_member(archive, name, content)
    return written.getvalue()


def pairs(*keys: str) -> list[tuple[str, bytes]]:
    """Files of a picture and its caption for each key."""
    return [file for key in keys for file in ((f"{key}.jpg", b"picture of " + key.encode()), (f"{key}.txt", b"a disc"))]


def header(name: str, size: int, kind: bytes = b"0", size_field: bytes | None = None) -> bytes:
    """The tar header of a file."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = b"%011o\0" % size if size_field is None else size_field.ljust(12, b"\0")
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def about(kind: bytes, content: bytes) -> bytes:
    """A header about the file that follows it."""
    return header("about", len(content), kind) + content + bytes(-len(content) % 512)


GOOD = tar(*pairs("a", "b", "c"))
END = bytes(1024)
BODY = GOOD[: 6 * 1024]  # without the end mark
Z = tar(*pairs("z"))


def row(name: str, content: bytes | Change, samples: int, *says: str, alone: bool = False) -> Attack:
    """A shard to index, with its number of samples and words about the rest."""

    def make(folder: Path) -> list[str]:
        shard = folder / "data/00000.tar"
        shard.parent.mkdir()
        shard.write_bytes(content) if isinstance(content, bytes) else content(shard)
        return ["prepare", "index", str(shard.parent)]

    return survived(name, make, f"{samples} samples", *says, megabytes=300, alone=alone)


@later
def trained(folder: Path, spoil: Change, max_bad_fraction: float = 0.3) -> list[str]:
    """A run on four shards in `data` after `spoil`."""
    spoil(ground.shards(folder))
    return ground.pretrain(folder, data={"max_bad_fraction": max_bad_fraction})


def no_fault(folder: Path, ended: Ended) -> None:
    assert "_shard: " not in ended.stdout + ended.stderr


@later
def records(folder: Path, ended: Ended, *names: str) -> None:
    """Assert that the run's record of bad samples names these shards or causes."""
    lines = (folder / "run/bad_samples.jsonl").read_text()
    assert all(name in lines for name in names), lines


@later
def sparse(shard: Path, size: int) -> None:
    """A good tar before a hole."""
    shard.write_bytes(GOOD)
    os.truncate(shard, size)


def strange(data: Path) -> None:
    """Put a folder, a FIFO, a socket and links to nowhere next to the shards."""
    (data / "a.tar").mkdir()
    os.mkfifo(data / "b.tar")
    unix_socket(data / "c.tar")
    (data / "d.tar").symlink_to("nowhere")
    (data / "e.tar").symlink_to("e.tar")


@later
def replaced(data: Path, keep_time: bool) -> None:
    """Index a shard, then replace it by an older one of its length with longer captions."""
    TarSource(str(data))
    shard = data / "00001.tar"
    state = shard.stat()
    with tarfile.open(shard) as archive:
        files = [(m.name, archive.extractfile(m).read()) for m in archive]
    longer = tar(*((name, content * 3 if name.endswith("txt") else content) for name, content in files))
    assert len(longer) == state.st_size
    shard.write_bytes(longer)
    time = state.st_mtime_ns if keep_time else state.st_mtime_ns - 10**12
    os.utime(shard, ns=(time, time))


def edited_index(data: Path) -> None:
    """Point an index to the captions of other samples, without a digest."""
    TarSource(str(data))
    path = index_path(data / "00000.tar")
    rows = np.load(path)
    rows[:, 1] = np.roll(rows[:, 1], 1, axis=0)
    np.save(path, rows)
    (data / MANIFEST).unlink()


def leads_out(data: Path) -> None:
    """Write a manifest with the right digest that names a file elsewhere."""
    secret = data.parent / "secret.tar"
    shutil.copy2(data / "00000.tar", secret)
    state = secret.stat()
    index = ShardIndex(np.zeros((30, 3, 2), np.uint32), "", state.st_size, 0)
    with suppress(ValueError):  # of the writer, who reads what it wrote
        write_manifest(data / MANIFEST, "*.tar", [("../secret.tar", index)], [], rows=True)
    assert (data / MANIFEST).exists()


def begins_behind_its_end(data: Path) -> None:
    """Write a manifest whose JSON object begins behind its end."""
    TarSource(str(data))
    file = data / MANIFEST
    content = file.read_bytes()
    file.write_bytes(content[:-24] + struct.pack("<q", len(content) - 8) + content[-16:])


@later
def damaged(data: Path, shard: str, change: Callable[[bytes], bytes]) -> None:
    (data / shard).write_bytes(change((data / shard).read_bytes()))


def with_header_broken(content: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        offset = archive.getmembers()[30].offset
    return content[: offset + 100] + b"XX" + content[offset + 102 :]


def pickled(path: Path) -> None:
    np.save(path, np.array([print], object), allow_pickle=True)


def billion(path: Path) -> None:
    shape = b"{'descr': '<u4', 'fortran_order': False, 'shape': (1000000000, 3, 2)}"
    path.write_bytes(b"\x93NUMPY\x02\0\x60\0\0\0" + shape.ljust(95) + b"\n")


def in_place_of(name: str, make: Change) -> Make:
    """A run on indexed shards with something else in the place of a file next to them."""

    def spoil(data: Path) -> None:
        TarSource(str(data))
        if name == INDEX:
            (data / MANIFEST).unlink()
        (data / name).unlink()
        make(data / name)

    return trained(spoil)


def sized(size: bytes) -> bytes:
    """A good tar whose last file has this field for its size."""
    return BODY + header("z.jpg", 0, size_field=size) + END


INDEX, MANIFEST = "00000.tar.index.npy", "shards.manifest"
BAD_NAME = ("no tar header at byte",)
QUICK = [
    row("a pax header of a million digits", BODY + about(b"x", b"1" * 10**6) + Z, 3, *BAD_NAME),
    row("a pax header of 30 MB", BODY + about(b"x", b"9" * 30_000_000) + Z, 3, *BAD_NAME, alone=True),
    row("a pax record of length 0", BODY + about(b"x", b"0 a=b\n") + Z, 3, *BAD_NAME),
    row("a pax size that is a word", BODY + about(b"x", b"12 size=abc\n") + Z, 3, *BAD_NAME),
    row("a pax size below 0", BODY + about(b"x", b"11 size=-5\n") + Z, 3, *BAD_NAME),
    row("a pax size of 5,000 digits", BODY + about(b"x", b"5011 size=" + b"7" * 5000 + b"\n") + Z, 3, *BAD_NAME),
    row("a pax size of terabytes", BODY + about(b"x", b"22 size=9999999999999\n") + Z, 3, "goes on to 1000"),
    row("a pax size other than the header's", BODY + about(b"x", b"9 size=9\n") + Z, 3, "sizes", "left out: 1"),
    row("a pax size for all files", about(b"g", b"9 size=1\n") + GOOD, 0, "pax header"),
    row("a long name of 2 MB", BODY + about(b"L", b"n" * 2_000_000) + Z, 3, "byte 6144"),
    row("a name of 5,000 letters", BODY + about(b"L", b"n" * 4990 + b".jpg") + Z, 3, "left out: 1"),
    row("a sparse file of GNU", BODY + header("z.jpg", 0, b"S") + END, 3, "left out: 1", "z.jpg"),
    row("a sparse file of pax", BODY + about(b"x", b"22 GNU.sparse.major=1\n") + Z, 3, "left out: 1"),
    row("pictures that are links", BODY + header("z.jpg", 0, b"1") + header("y.png", 0, b"2") + END, 3, "left out: 2"),
    row("folders and devices with a size", BODY + header("d/", 999, b"5") + header("null", 77, b"3") + Z, 4),
    row("two tars in one file", GOOD + tar(*pairs("d", "e")), 5),
    row("one block of zeros, then more files", BODY + bytes(512) + tar(*pairs("d")), 4),
    row("two tars of the same keys", GOOD + tar(*pairs("a", "b")), 5),
    row("two samples of one key side by side", tar(*pairs("a", "a")), 2),
    row(
        "files of one key that cannot be told apart",
        tar(*pairs("a"), ("b.jpg", b"1"), ("b.jpg", b"2"), ("b.txt", b"3")), 1, "left out: 1", "the first b",
    ),
    row("names that differ in bytes that are not UTF-8", tar(*pairs("a"), ("\xe9.jpg", b"1"), ("\xe8.jpg", b"2")), 3),
    row(
        "names that lead out, and none",
        tar(("../../z.jpg", b"1"), ("/etc/z.jpg", b"2"), ("", b"3"), (".", b"4"), ("..", b"5")), 2,
    ),
    row(
        "a name with line breaks and colours",
        tar(*pairs("a"))[:2048] + header("x\n\x1b[31m.jpg", 0, b"2") + END, 1, "x\\n\\x1b[31m.jpg",
    ),
    row("a size below 0", sized(b"-0000000007"), 3, "byte 6144"),
    row("a binary size below 0", sized(b"\xff" * 12), 3, "byte 6144"),
    row("a binary size of 2^80", sized(b"\x80" + b"\x01" * 11), 3, "goes on to"),
    row("a size in octal with spaces", sized(b"       0 "), 4),
    row("no end mark", BODY, 3, "byte 6144"),
    row("a shard that was cut and filled with zeros", BODY[:3072] + bytes(60_000), 2, "zeros from byte"),
    row("a hole of a terabyte", sparse(10**12), 3, "zeros from byte", alone=True),
    row("a text behind the end", GOOD + b"the end".ljust(512), 3, "byte 10240"),
    row("an empty shard", b"", 0, "unreadable_shard", "empty"),
    row("a gzip that is called .tar", gzip.compress(GOOD, 0), 0, "\\x1f\\x8b"),
    row("100,000 empty files", tar(*((f"{n}.md", b"") for n in range(100_000))), 0, alone=True),
    survived(
        "a header that is broken in the middle", trained(damaged("00003.tar", with_header_broken)),
        "truncated_shard", "00003.tar", check=records("00003.tar"),
    ),
    survived(
        "a web page in a shard's place", trained(damaged("00002.tar", lambda _: b"<html>404</html>" * 99)),
        "b'<html>404</html>'", check=records("00002.tar"),
    ),
    refused(
        "more web pages than may be bad", trained(damaged("00002.tar", lambda _: b"<html>"), 0.05),
        "1 of 4 shards", "data.max_bad_fraction", "0.05",
    ),
    survived(
        "a folder, a FIFO, a socket and links as shards", trained(strange, 0.6), "folder", "FIFO", "socket", "link",
        check=records("a.tar", "b.tar", "c.tar", "d.tar", "e.tar"),
    ),
    refused("a FIFO in the place of the manifest", in_place_of(MANIFEST, os.mkfifo), MANIFEST, "FIFO"),
    refused("a folder in the place of the manifest", in_place_of(MANIFEST, os.mkdir), MANIFEST, "folder"),
    refused("a manifest of nothing", trained(begins_behind_its_end), MANIFEST),
    refused("a manifest that leads out of its folder", trained(leads_out), MANIFEST),
    refused(
        "a range of a trillion shards", lambda f: ["prepare", "index", f"{f}/{{0..999999999999}}.tar"], "10000000",
    ),
]  # fmt: skip
# Each of these trains a model to its end.
RUNS = [
    survived("a shard replaced by an older one of its length", trained(replaced(keep_time=False)), check=no_fault),
    survived(
        "a shard replaced by one of its length and time", trained(replaced(keep_time=True)),
        check=records("stale_index"),
    ),
    survived("an index edited by hand", trained(edited_index), check=no_fault),
    survived("a FIFO in the place of an index", in_place_of(INDEX, os.mkfifo), check=no_fault),
    survived("a pickle in the place of an index", in_place_of(INDEX, pickled), check=no_fault),
    survived("an index that says a billion samples", in_place_of(INDEX, billion), check=no_fault),
    survived(
        "a shard's name that is not UTF-8",
        trained(lambda data: os.rename(data / "00003.tar", os.fsencode(data) + b"/\xe9.tar")),
    ),
]  # fmt: skip
ATTACKS = [*QUICK, *RUNS]

test_attack = test_of(QUICK)
test_attack_on_a_run = pytest.mark.long(test_of(RUNS))
