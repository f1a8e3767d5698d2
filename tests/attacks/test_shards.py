"""Attacks by what a shard, its index or the manifest holds, and by what lies where a shard should."""

import gzip
import io
import os
import shutil
import socket
import struct
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from attacks import ground
from attacks.attack import Attack, Ended, hold
from conftest import add_member

Made = Callable[[Path], object]


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


def indexed(content: bytes | Made) -> Callable[[Path], list[str]]:
    """The command that indexes one shard of this content, or made by this function."""

    def make(folder: Path) -> list[str]:
        shard = folder / "data/00000.tar"
        shard.parent.mkdir()
        shard.write_bytes(content) if isinstance(content, bytes) else content(shard)
        return ["prepare", "index", str(shard.parent)]

    return make


def trained(spoil: Made, max_bad_fraction: float = 0.3) -> Callable[[Path], list[str]]:
    """The command that trains on four shards in `data`, which were spoilt by this function."""

    def make(folder: Path) -> list[str]:
        spoil(ground.shards(folder))
        return ground.pretrain(folder, data={"max_bad_fraction": max_bad_fraction})

    return make


def row(name: str, content: bytes | Made, samples: int, *says: str) -> Attack:
    """A shard that is indexed: so many samples, and what is said of the rest."""
    return Attack(name, indexed(content), says=(f"{samples} samples in 1 shards", *says), megabytes=300)


def no_fault(folder: Path, ended: Ended) -> None:
    assert "_shard: " not in ended.stdout + ended.stderr


def recorded_as(*names: str) -> Callable[[Path, Ended], None]:
    """The run's record of what is bad names every one of these shards or causes."""

    def check(folder: Path, ended: Ended) -> None:
        lines = (folder / "run/bad_samples.jsonl").read_text()
        assert all(name in lines for name in names), lines

    return check


def sparse(size: int) -> Made:
    """A good tar with a hole behind it."""

    def make(shard: Path) -> None:
        shard.write_bytes(GOOD)
        os.truncate(shard, size)

    return make


def strange(data: Path) -> None:
    """Beside the shards: a folder, a FIFO, a socket, links to nowhere and to themselves."""
    (data / "a.tar").mkdir()
    os.mkfifo(data / "b.tar")
    here = os.getcwd()
    os.chdir(data)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("c.tar")
    os.chdir(here)
    (data / "d.tar").symlink_to("nowhere")
    (data / "e.tar").symlink_to("e.tar")


def beside(data: Path, name: str, make: Made) -> None:
    """Index the shards, then replace a file beside them."""
    from flipscale.data.sources.tar import TarSource

    TarSource(str(data))
    for manifest in data.glob("*.manifest") if name.endswith(".npy") else ():
        manifest.unlink()
    (data / name).unlink()
    make(data / name)


def replaced(keep_time: bool) -> Made:
    """A shard is indexed and then replaced by an older one of the same length, with longer captions."""

    def spoil(data: Path) -> None:
        from flipscale.data.sources.tar import TarSource

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

    return spoil


def edited_index(data: Path) -> None:
    """Captions of other samples, by numpy and without a digest."""
    from flipscale.data.sources.shard_index import index_path
    from flipscale.data.sources.tar import TarSource

    TarSource(str(data))
    path = index_path(data / "00000.tar")
    rows = np.load(path)
    rows[:, 1] = np.roll(rows[:, 1], 1, axis=0)
    np.save(path, rows)
    for manifest in data.glob("*.manifest"):
        manifest.unlink()


def leads_out(data: Path) -> None:
    """A manifest, its digest right, that names a file elsewhere."""
    from flipscale.data.sources.manifest import ShardEntry, write_manifest

    secret = data.parent / "secret.tar"
    shutil.copy2(data / "00000.tar", secret)
    state = secret.stat()
    rows = np.zeros((30, 3, 2), np.uint32)
    write_manifest(
        data / "shards.manifest", "*.tar", [ShardEntry("../secret.tar", rows, "", state.st_size, 0)], [], rows=True
    )


def begins_behind_its_end(data: Path) -> None:
    """A manifest whose last bytes say that its table begins among them."""
    from flipscale.data.sources.tar import TarSource

    TarSource(str(data))
    file = data / "shards.manifest"
    content = file.read_bytes()
    file.write_bytes(content[:-32] + struct.pack("<q", len(content) - 8) + content[-24:])


def damaged(shard: str, change: Callable[[bytes], bytes]) -> Made:
    def spoil(data: Path) -> None:
        (data / shard).write_bytes(change((data / shard).read_bytes()))

    return spoil


def with_header_broken(content: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        offset = archive.getmembers()[30].offset
    return content[: offset + 100] + b"XX" + content[offset + 102 :]


def many(files: Iterable[tuple[str, bytes]]) -> bytes:
    return tar(*files)


BAD_PAX = "there is no tar header at byte"
LINKS = "links, sparse files and devices are left out"
ATTACKS = [
    row("a pax header of a million digits", BODY + about(b"x", b"1" * 10**6) + tar(*pairs("z")), 3, BAD_PAX),
    row("a pax header of 30 MB", BODY + about(b"x", b"9" * 30_000_000) + tar(*pairs("z")), 3, BAD_PAX),
    row("a pax record of length 0", BODY + about(b"x", b"0 a=b\n") + tar(*pairs("z")), 3, BAD_PAX),
    row("a pax size that is a word", BODY + about(b"x", b"12 size=abc\n") + tar(*pairs("z")), 3, BAD_PAX),
    row("a pax size below 0", BODY + about(b"x", b"11 size=-5\n") + tar(*pairs("z")), 3, BAD_PAX),
    row(
        "a pax size of 5,000 digits",
        BODY + about(b"x", b"5011 size=" + b"7" * 5000 + b"\n") + tar(*pairs("z")),
        3,
        BAD_PAX,
    ),
    row(
        "a pax size of terabytes",
        BODY + about(b"x", b"22 size=9999999999999\n") + tar(*pairs("z")),
        3,
        "inside a file that goes on to 1000",
    ),
    row(
        "a pax size other than the header's",
        BODY + about(b"x", b"9 size=9\n") + tar(*pairs("z")),
        3,
        "files whose headers give different sizes are left out: 1",
    ),
    row(
        "a pax size for all files",
        about(b"g", b"9 size=1\n") + GOOD,
        0,
        "a pax header that gives all files one name or size",
    ),
    row(
        "a long name of 2 MB",
        BODY + about(b"L", b"n" * 2_000_000) + tar(*pairs("z")),
        3,
        "there is no tar header at byte 6144",
    ),
    row(
        "a name of 5,000 letters",
        BODY + about(b"L", b"n" * 4990 + b".jpg") + tar(*pairs("z")),
        3,
        "files with too long names are left out: 1",
    ),
    row("a sparse file of GNU", BODY + header("z.jpg", 0, b"S") + END, 3, f"{LINKS}: 1, the first z.jpg"),
    row("a sparse file of pax", BODY + about(b"x", b"22 GNU.sparse.major=1\n") + tar(*pairs("z")), 3, f"{LINKS}: 1"),
    row("pictures that are links", BODY + header("z.jpg", 0, b"1") + header("y.png", 0, b"2") + END, 3, f"{LINKS}: 2"),
    row(
        "folders and devices with a size",
        BODY + header("d/", 999, b"5") + header("null", 77, b"3") + tar(*pairs("z")),
        4,
    ),
    row("two tars in one file", GOOD + tar(*pairs("d", "e")), 5),
    row("one block of zeros, then more files", BODY + bytes(512) + tar(*pairs("d")), 4),
    row("two tars of the same keys", GOOD + tar(*pairs("a", "b")), 5),
    row("two samples of one key side by side", tar(*pairs("a", "a")), 2),
    row(
        "files of one key that cannot be told apart",
        tar(*pairs("a"), ("b.jpg", b"1"), ("b.jpg", b"2"), ("b.txt", b"3")),
        1,
        "cannot be told apart are left out: 1, the first b",
    ),
    row("names that differ in bytes that are not UTF-8", tar(*pairs("a"), ("\xe9.jpg", b"1"), ("\xe8.jpg", b"2")), 3),
    row(
        "names that lead out, and none",
        tar(("../../z.jpg", b"1"), ("/etc/z.jpg", b"2"), ("", b"3"), (".", b"4"), ("..", b"5")),
        2,
    ),
    row(
        "a name with line breaks and colours",
        tar(*pairs("a"))[:2048] + header("x\n\x1b[31m.jpg", 0, b"2") + END,
        1,
        "x\\n\\x1b[31m.jpg",
    ),
    row(
        "a size below 0",
        BODY + header("z.jpg", 0, size_field=b"-0000000007") + END,
        3,
        "there is no tar header at byte 6144",
    ),
    row(
        "a binary size below 0",
        BODY + header("z.jpg", 0, size_field=b"\xff" * 12) + END,
        3,
        "there is no tar header at byte 6144",
    ),
    row(
        "a binary size of 2^80",
        BODY + header("z.jpg", 0, size_field=b"\x80" + b"\x01" * 11) + END,
        3,
        "inside a file that goes on to",
    ),
    row("a size in octal with spaces", BODY + header("z.jpg", 0, size_field=b"       0 ") + END, 4),
    row("no end mark", BODY, 3, "it ends at byte 6144 without an end mark"),
    row(
        "a shard that was cut and filled with zeros",
        BODY[:3072] + bytes(60_000),
        2,
        "zeros from byte",
        "more than the end of a tar",
    ),
    row("a hole of a terabyte", sparse(10**12), 3, "zeros from byte"),
    row("a text behind the end", GOOD + b"the end".ljust(512), 3, "there is no tar header at byte 10240"),
    row("an empty shard", b"", 0, "unreadable_shard", "it is empty"),
    row("a gzip that is called .tar", gzip.compress(GOOD, 0), 0, "it is not a tar file: it begins with b'\\x1f\\x8b"),
    row("100,000 empty files", many((f"{n}.md", b"") for n in range(100_000)), 0),
    Attack(
        "a header that is broken in the middle",
        trained(damaged("00003.tar", with_header_broken)),
        says=("truncated_shard", "there is no tar header at byte"),
        check=recorded_as("00003.tar"),
    ),
    Attack(
        "a web page in a shard's place",
        trained(damaged("00002.tar", lambda _: b"<html>404</html>" * 99)),
        says=("it begins with b'<html>404</html>'",),
        check=recorded_as("00002.tar"),
    ),
    Attack(
        "more web pages than may be bad",
        trained(damaged("00002.tar", lambda _: b"<html>"), 0.05),
        code=2,
        says=("1 of 4 shards cannot be read, more than data.max_bad_fraction 0.05",),
    ),
    Attack(
        "a folder, a FIFO, a socket and links as shards",
        trained(strange, 0.6),
        says=("it is a folder, not a file", "it is a FIFO", "it is a socket", "it is a link that leads nowhere"),
        check=recorded_as("a.tar", "b.tar", "c.tar", "d.tar", "e.tar"),
    ),
    Attack("a shard replaced by an older one of its length", trained(replaced(keep_time=False)), check=no_fault),
    Attack(
        "a shard replaced by one of its length and time",
        trained(replaced(keep_time=True)),
        check=recorded_as("stale_index"),
    ),
    Attack("an index edited by hand", trained(edited_index), check=no_fault),
    Attack(
        "a FIFO in the place of an index",
        trained(lambda data: beside(data, "00000.tar.index.npy", os.mkfifo)),
        check=no_fault,
    ),
    Attack(
        "a pickle in the place of an index",
        trained(
            lambda data: beside(
                data, "00000.tar.index.npy", lambda path: np.save(path, np.array([print], object), allow_pickle=True)
            )
        ),
        check=no_fault,
    ),
    Attack(
        "an index that says a billion samples",
        trained(
            lambda data: beside(
                data,
                "00000.tar.index.npy",
                lambda path: path.write_bytes(
                    b"\x93NUMPY\x02\0\x60\0\0\0"
                    + b"{'descr': '<u4', 'fortran_order': False, 'shape': (1000000000, 3, 2)}".ljust(95)
                    + b"\n"
                ),
            )
        ),
        check=no_fault,
    ),
    Attack(
        "a FIFO in the place of the manifest",
        trained(lambda data: beside(data, "shards.manifest", os.mkfifo)),
        code=2,
        says=("shards.manifest cannot be the manifest of shards: it is a FIFO, not a file; remove it",),
    ),
    Attack(
        "a folder in the place of the manifest",
        trained(lambda data: beside(data, "shards.manifest", os.mkdir)),
        code=2,
        says=("it is a folder, not a file; remove it",),
    ),
    Attack("a manifest of nothing", trained(begins_behind_its_end), code=2, says=("is cut short or damaged",)),
    Attack("a manifest that leads out of its folder", trained(leads_out), code=2, says=("is cut short or damaged",)),
    Attack(
        "a range of a trillion shards",
        lambda folder: ["prepare", "index", f"{folder}/{{0..999999999999}}.tar"],
        code=2,
        says=("more than 10000000 shards; check its end",),
    ),
    Attack(
        "a shard's name that is not UTF-8",
        trained(lambda data: os.rename(data / "00003.tar", os.fsencode(data) + b"/\xe9.tar")),
    ),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)
