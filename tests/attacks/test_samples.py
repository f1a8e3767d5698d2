"""Attacks by what a sample holds: its image and its captions."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from attacks import ground
from attacks.attack import Attack, Ended, hold
from conftest import add_member
from PIL import Image

from flipscale.data.captions import choose_caption
from flipscale.data.sources.tar import TarSource

NOISE = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture() -> bytes:
    return saved(Image.fromarray(NOISE), "JPEG")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, channels: int, before: bytes = b"") -> bytes:
    """A black PNG of 8 bits a channel, written by hand since Pillow would hold all its pixels."""
    packer, row = zlib.compressobj(), bytes(1 + width * channels)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def webp(width: int, height: int) -> bytes:
    """A WebP of one colour, which says its size in 28 bits and nothing of its pixels."""
    small = saved(Image.new("RGB", (64, 64)), "WEBP", lossless=True)
    return with_header(small, struct.pack("<I", 63 | 63 << 14), struct.pack("<I", width - 1 | (height - 1) << 14))


def tiff(*more: tuple[int, int, int], content: bytes = b"") -> bytes:
    """A grey TIFF of 8 x 8 pixels with more tags, each of (tag, type, number of values), their values in `content`."""
    sizes = ((256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, 64))
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sizes]
    after = 8 + 2 + 12 * (len(sizes) + len(more)) + 4
    entries += [struct.pack("<HHII", tag, kind, count, after) for tag, kind, count in more]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(sorted(entries)) + bytes(4) + content


def progressive(scans: int) -> bytes:
    """A grey JPEG of 5000 x 5000 pixels whose last scan, of a few bytes, stands there many times."""
    whole = saved(Image.new("L", (5000, 5000)), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * scans + whole[-2:]


def with_header(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new, 1)


def trains(folder: Path, image: bytes, name: str = "txt", caption: bytes | None = b"a red bar") -> list[str]:
    """Train on a fifth shard too, of one sample: this image and this caption, in KEY.`name`."""
    with tarfile.open(ground.shards(folder) / "00004.tar", "w") as tar:
        add_member(tar, "odd.jpg", image)
        if caption is not None:
            add_member(tar, f"odd.{name}", caption)
    return ground.pretrain(folder)


def bad(cause: str, detail: str = "") -> Callable[[Path, Ended], None]:
    """Check that the run is done, and its bad samples are the one of the fifth shard."""

    def check(folder: Path, ended: Ended) -> None:
        assert (folder / "run/DONE").exists()
        found = [json.loads(line) for line in (folder / "run/bad_samples.jsonl").read_text().splitlines()]
        assert [(Path(fault["shard"]).name, fault["cause"]) for fault in found] == [("00004.tar", cause)], found
        assert detail in found[0]["detail"], found

    return check


def good(folder: Path, ended: Ended) -> None:
    assert (folder / "run/DONE").exists()
    assert not (folder / "run/bad_samples.jsonl").exists()


def learns(caption: str) -> Callable[[Path, Ended], None]:
    """Check that no sample was bad, and the one of the fifth shard has this caption."""

    def check(folder: Path, ended: Ended) -> None:
        good(folder, ended)
        source = TarSource(str(folder / "data"))
        assert choose_caption(source.read(4, 0).captions, 0.99) == caption

    return check


def image_attack(name: str, image: Callable[[], bytes], check: Callable[[Path, Ended], None]) -> Attack:
    return Attack(name, lambda folder: trains(folder, image()), check=check)


def caption_attack(name: str, file: str, caption: bytes | None, check: Callable[[Path, Ended], None]) -> Attack:
    return Attack(name, lambda folder: trains(folder, picture(), file, caption), check=check)


IMAGES = [
    image_attack("a PNG of 1 x 20,000 pixels", lambda: png(1, 20_000, 3), good),
    image_attack("a JPEG of 300 x 1 pixels", lambda: saved(Image.new("RGB", (300, 1)), "JPEG"), good),
    image_attack(
        "a PNG of 340 kB with 88 million transparent pixels", lambda: png(9400, 9400, 4), bad("image_too_large")
    ),
    image_attack(
        "a PNG of 79 bytes whose pixels say that they take 4 GB",
        lambda: with_header(png(28, 20, 3), b"\0\0\0\x16IDAT", b"\xff\0\0\0IDAT"),
        good,
    ),
    image_attack("a WebP of 40 bytes with 88 million pixels", lambda: webp(9400, 9400), bad("image_too_large")),
    image_attack("a PNG of 50 million transparent pixels, the most", lambda: png(7090, 7090, 4), good),
    image_attack("a JPEG of 1,000 scans", lambda: progressive(1_000), bad("image_too_large", "scans")),
    image_attack(
        "a JPEG of 20 kB that says 7000 x 7000",
        lambda: with_header(picture(), struct.pack(">HH", 40, 50), struct.pack(">HH", 7000, 7000)),
        bad("undecodable_image", "too few"),
    ),
    image_attack(
        "a JPEG with 200,000 EXIF blocks",
        lambda: with_header(picture(), b"\xff\xd8", b"\xff\xd8" + b"\xff\xe1\0\x0cExif\0\0abcd" * 200_000),
        bad("image_too_large"),
    ),
    image_attack(
        "a JPEG with 1,000,000 empty blocks",
        lambda: with_header(picture(), b"\xff\xd8", b"\xff\xd8" + b"\xff\xe5\0\2" * 1_000_000),
        bad("image_too_large", "APPn"),
    ),
    image_attack(
        "a PNG with 1,000,000 text chunks",
        lambda: png(8, 8, 3, chunk(b"tEXt", b"a\0b") * 1_000_000),
        bad("image_too_large"),
    ),
    image_attack(
        "a PNG whose colour profile unpacks to 500 MB",
        lambda: png(8, 8, 3, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(500_000_000), 1))),
        bad("undecodable_image"),
    ),
    image_attack(
        "a TIFF with a resolution of 2,000,000 fractions",
        lambda: tiff((282, 5, 2_000_000), content=b"\1\0\0\0\1\0\0\0" * 2_000_000),
        bad("image_too_large", "tag 282"),
    ),
    image_attack(
        "PostScript named .jpg",
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\nshowpage\n",
        bad("undecodable_image"),
    ),
    image_attack(
        "FITS named .jpg",
        lambda: (
            b"".join(
                card.ljust(80)
                for card in (b"SIMPLE  = T", b"BITPIX  = 8", b"NAXIS   = 2", b"NAXIS1  = 99", b"NAXIS2  = 99", b"END")
            ).ljust(2880)
            + bytes(9801)
        ),
        bad("undecodable_image"),
    ),
    image_attack("an image of 300 MB of zeros", lambda: bytes(300_000_000), bad("sample_too_large")),
]

CAPTIONS = [
    caption_attack(
        "captions nested 100,000 deep",
        "json",
        b'{"captions": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        bad("undecodable_caption", "Recursion"),
    ),
    caption_attack(
        "a JSON nested 1,000,000 deep that never ends", "json", b'{"x":' * 1_000_000, bad("sample_too_large")
    ),
    caption_attack("captions that are one text", "json", b'{"captions": "a red bar"}', learns("a red bar")),
    caption_attack("captions of nothing", "json", b'{"captions": [null]}', bad("missing_caption")),
    caption_attack("captions that are numbers", "json", b'{"captions": [1, 2]}', bad("undecodable_caption", "int")),
    caption_attack("a caption that is no number", "json", b'{"caption": NaN}', bad("undecodable_caption", "float")),
    caption_attack(
        "a caption that is an object", "json", b'{"caption": {"en": "a red bar"}}', bad("undecodable_caption", "dict")
    ),
    caption_attack("a caption that is true", "json", b'{"caption": true}', bad("undecodable_caption", "bool")),
    caption_attack("a JSON that is a list", "json", b'["a red bar"]', bad("undecodable_caption", "list")),
    caption_attack(
        "a JSON with a number of 10,000 digits",
        "json",
        b'{"caption": "a red bar", "n": ' + b"9" * 10_000 + b"}",
        bad("undecodable_caption"),
    ),
    caption_attack(
        "a caption with half a surrogate pair",
        "json",
        b'{"caption": "a red \\ud800 bar"}',
        bad("undecodable_caption", "surrogate"),
    ),
    caption_attack("a JSON that ends early", "json", b'{"caption": "a red', bad("undecodable_caption")),
    caption_attack("an empty JSON file", "json", b"", bad("missing_caption")),
    caption_attack("no caption file", "txt", None, bad("missing_caption")),
    caption_attack("a caption in UTF-16", "txt", "a red bar".encode("utf-16"), bad("undecodable_caption")),
    caption_attack(
        "a caption in UTF-16 without its mark",
        "txt",
        "a red bar".encode("utf-16-le"),
        bad("undecodable_caption", "NUL"),
    ),
    caption_attack("a caption with a byte order mark", "txt", b"\xef\xbb\xbfa red bar", learns("a red bar")),
    caption_attack("a caption of invisible characters", "txt", "\u200b\ufeff \u200e".encode(), good),
    caption_attack("a caption of 200 kB", "txt", b"a red bar " * 20_000, bad("caption_too_long")),
    caption_attack("a caption of 50 MB", "txt", b"a red bar " * 5_000_000, bad("sample_too_large")),
    caption_attack(
        "a JSON of 50 MB", "json", b'{"caption": "' + b"a red bar " * 5_000_000 + b'"}', bad("sample_too_large")
    ),
    caption_attack("a class number of 5,000 digits", "cls", b"9" * 5_000, bad("missing_caption")),
]
ATTACKS = [*IMAGES, *CAPTIONS]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)
