"""The bytes of a tar shard: its first byte says whether the checksums of headers are mended, so that more are read."""

import io
import tarfile
from contextlib import suppress
from pathlib import Path

from flipscale.data.samples import BadSample
from flipscale.data.sources.tar import TarSource

_IMAGES = (b"jpg", b"jpeg", b"png", b"webp")


def tar(kind: int, *files: tuple[str, bytes], **pax: str) -> bytes:
    """A tar of these files."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=kind) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(content), pax
            archive.addfile(member, io.BytesIO(content))
    return written.getvalue()[: archive.offset]  # without the zeros that fill the last record


def seeds() -> list[bytes]:
    """Every dialect; two tars in one file; keys twice; pax records that matter; links and a map of a sparse file."""
    pair = ("a.jpg", b"picture"), ("a.txt", b"caption"), ("a.json", b'{"captions": ["one"]}'), ("a.cls", b"3")
    plain = tar(tarfile.USTAR_FORMAT, *pair)
    found = [plain, tar(tarfile.GNU_FORMAT, ("n" * 120 + ".png", b"x")), plain + plain, plain[:-1024] + plain]
    found += [tar(tarfile.PAX_FORMAT, ("\u00e9.webp", b"y"), **{key: "7"}) for key in ("size", "GNU.sparse.major")]
    found += [tar(tarfile.USTAR_FORMAT, *pair, *pair), tar(tarfile.USTAR_FORMAT, *pair, ("b.jpg", b"x"), *pair)]
    for kind in (b"1", b"2", b"5", b"S", b"g", b"K", b"X"):
        found.append(plain[:156] + kind + plain[157:])
    return [first + content for content in found for first in (b"\0", b"\1")]


def attack(data: bytes, folder: Path) -> None:
    """Index the shard and read all its samples. What is read is in a file of the tar, and without a fault none is
    missing."""
    content = data[1:]
    if data[:1] and data[0] & 1:
        content = mended(content)
    (folder / "0.tar").write_bytes(content)
    source = TarSource(str(folder))
    images = set()
    for number in range(len(source)):
        with suppress(BadSample):
            sample = source.read(0, number)
            assert content.find(sample.image) >= 0
            images.add((source.key(0, number), sample.image))
    if not source.faults:
        assert missing(content, {image for _, image in images}) == []


def mended(content: bytes) -> bytes:
    """The bytes with the right checksum in each block that says that it is a header."""
    blocks = [bytearray(content[first : first + 512]) for first in range(0, len(content), 512)]
    for block in blocks:
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


def missing(content: bytes, images: set[bytes]) -> list[str]:
    """The images that Python's tarfile finds and we do not."""
    found = []
    with (
        suppress(tarfile.TarError, ValueError, OverflowError),
        tarfile.open(fileobj=io.BytesIO(content), ignore_zeros=True, encoding="latin1") as archive,
    ):
        for member in archive:
            extension = member.name.rpartition("/")[2].partition(".")[2].lower().encode("latin1", "replace")
            if member.isreg() and not member.issparse() and extension in _IMAGES:
                image = archive.extractfile(member).read()
                if image not in images:
                    found.append(member.name)
    return found
