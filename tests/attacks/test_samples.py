"""Attacks by a sample: its image and its captions."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from attacks import ground
from attacks.attack import Attack, Ended, judge, run_alone
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
    """A black PNG of 8 bits a channel, written by hand because Pillow would hold all its pixels."""
    packer, row = zlib.compressobj(), bytes(1 + width * channels)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def webp(width: int, height: int) -> bytes:
    """A WebP of one colour, whose size is 28 bits and whose pixels are none."""
    small = saved(Image.new("RGB", (64, 64)), "WEBP", lossless=True)
    return with_header(small, struct.pack("<I", 63 | 63 << 14), struct.pack("<I", width - 1 | (height - 1) << 14))


def tiff(*more: tuple[int, int, int], content: bytes = b"") -> bytes:
    """A grey TIFF of 8 x 8 pixels with more tags (tag, type, number of values), whose values are in `content`."""
    sizes = ((256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, 64))
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sizes]
    after = 8 + 2 + 12 * (len(sizes) + len(more)) + 4
    entries += [struct.pack("<HHII", tag, kind, count, after) for tag, kind, count in more]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(sorted(entries)) + bytes(4) + content


def progressive(scans: int) -> bytes:
    """A grey JPEG of 5000 x 5000 pixels whose last scan is repeated."""
    whole = saved(Image.new("L", (5000, 5000)), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * scans + whole[-2:]


def with_header(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new, 1)


@dataclass(frozen=True)
class Sample:
    """A sample of the odd shard, with its expected end.

    Args:
        name: description of the fault, and the sample's key.
        image: function that returns the content of the image file.
        file: extension of the caption file.
        caption: content of the caption file; None for no file.
        cause: cause in the run's record of bad samples; empty for a good sample.
        detail: words of the record.
        learns: caption of the good sample.
    """

    name: str
    image: Callable[[], bytes]
    file: str = "txt"
    caption: bytes | None = b"a red bar"
    cause: str = ""
    detail: str = ""
    learns: str = ""

    def __str__(self) -> str:
        return self.name


def image(name: str, image: Callable[[], bytes], cause: str = "", detail: str = "") -> Sample:
    return Sample(name, image, cause=cause, detail=detail)


def text(name: str, file: str, caption: bytes | None, cause: str = "", detail: str = "", learns: str = "") -> Sample:
    return Sample(name, picture, file, caption, cause, detail, learns)


def key(sample: Sample) -> str:
    return f"odd{SAMPLES.index(sample)}"


def make(folder: Path) -> list[str]:
    """Train on a fifth shard too, that of the odd samples."""
    with tarfile.open(ground.shards(folder) / "00004.tar", "w") as tar:
        for sample in SAMPLES:
            add_member(tar, f"{key(sample)}.jpg", sample.image())
            if sample.caption is not None:
                add_member(tar, f"{key(sample)}.{sample.file}", sample.caption)
    return ground.pretrain(folder, data={"max_bad_fraction": 0.6})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """The folder and the end of a run on all odd samples: 160 pairs of 134, so each is seen."""
    folder = tmp_path_factory.mktemp("samples") / "here"
    folder.mkdir()
    return folder, run_alone(Attack("all odd samples", make, megabytes=1400), folder, make(folder))


def jpeg_with(content: bytes) -> Callable[[], bytes]:
    """A JPEG with these blocks after its first marker."""
    return lambda: with_header(picture(), b"\xff\xd8", b"\xff\xd8" + content)


FITS = b"".join(
    card.ljust(80)
    for card in (b"SIMPLE  = T", b"BITPIX  = 8", b"NAXIS   = 2", b"NAXIS1  = 99", b"NAXIS2  = 99", b"END")
).ljust(2880) + bytes(9801)
RED = b"a red bar"
DEEP = b"[" * 100_000 + b"]" * 100_000
TOO_LARGE, UNDECODABLE = "image_too_large", "undecodable_image"
NO_CAPTION, BAD_CAPTION, SAMPLE_TOO_LARGE = "missing_caption", "undecodable_caption", "sample_too_large"
SAMPLES = [
    image("a PNG of 1 x 20,000 pixels", lambda: png(1, 20_000, 3)),
    image("a JPEG of 300 x 1 pixels", lambda: saved(Image.new("RGB", (300, 1)), "JPEG")),
    image("a PNG of 340 kB with 88 million transparent pixels", lambda: png(9400, 9400, 4), TOO_LARGE),
    image(
        "a PNG of 79 bytes whose pixels say that they take 4 GB",
        lambda: with_header(png(28, 20, 3), b"\0\0\0\x16IDAT", b"\xff\0\0\0IDAT"),
    ),
    image("a WebP of 40 bytes with 88 million pixels", lambda: webp(9400, 9400), TOO_LARGE),
    image("a PNG of 50 million transparent pixels, the most", lambda: png(7090, 7090, 4)),
    image("a JPEG of 1,000 scans", lambda: progressive(1_000), TOO_LARGE, "scans"),
    image(
        "a JPEG of 20 kB that says 7000 x 7000",
        lambda: with_header(picture(), struct.pack(">HH", 40, 50), struct.pack(">HH", 7000, 7000)), UNDECODABLE,
    ),
    image("a JPEG with 200,000 EXIF blocks", jpeg_with(b"\xff\xe1\0\x0cExif\0\0abcd" * 200_000), TOO_LARGE),
    image("a JPEG with 1,000,000 empty blocks", jpeg_with(b"\xff\xe5\0\2" * 1_000_000), TOO_LARGE),
    image("a PNG with 1,000,000 text chunks", lambda: png(8, 8, 3, chunk(b"tEXt", b"a\0b") * 1_000_000), TOO_LARGE),
    image(
        "a PNG whose colour profile unpacks to 500 MB",
        lambda: png(8, 8, 3, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(500_000_000), 1))), UNDECODABLE,
    ),
    image(
        "a TIFF with a resolution of 2,000,000 fractions",
        lambda: tiff((282, 5, 2_000_000), content=b"\1\0\0\0\1\0\0\0" * 2_000_000), TOO_LARGE, "282",
    ),
    image(
        "PostScript named .jpg",
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\nshowpage\n", UNDECODABLE,
    ),
    image("FITS named .jpg", lambda: FITS, UNDECODABLE),
    image("an image of 300 MB of zeros", lambda: bytes(300_000_000), SAMPLE_TOO_LARGE),
    text("captions nested 100,000 deep", "json", b'{"captions": ' + DEEP + b"}", BAD_CAPTION),
    text("a JSON nested 1,000,000 deep that never ends", "json", b'{"x":' * 1_000_000, SAMPLE_TOO_LARGE),
    text("captions that are one text", "json", b'{"captions": "a red bar"}', learns="a red bar"),
    text("captions of nothing", "json", b'{"captions": [null]}', NO_CAPTION),
    text("captions that are numbers", "json", b'{"captions": [1, 2]}', BAD_CAPTION, "int"),
    text("a caption that is not a number", "json", b'{"caption": NaN}', BAD_CAPTION, "float"),
    text("a caption that is an object", "json", b'{"caption": {"en": "a red bar"}}', BAD_CAPTION, "dict"),
    text("a caption that is true", "json", b'{"caption": true}', BAD_CAPTION, "bool"),
    text("a JSON that is a list", "json", b'["a red bar"]', BAD_CAPTION, "list"),
    text("a JSON with a number of 10,000 digits", "json", b'{"caption": "a", "n": ' + b"9" * 10**4 + b"}", BAD_CAPTION),
    text("a caption with half a surrogate pair", "json", b'{"caption": "a red \\ud800 bar"}', BAD_CAPTION),
    text("a JSON that ends early", "json", b'{"caption": "a red', BAD_CAPTION),
    text("an empty JSON file", "json", b"", NO_CAPTION),
    text("no caption file", "txt", None, NO_CAPTION),
    text("a caption in UTF-16", "txt", "a red bar".encode("utf-16"), BAD_CAPTION),
    text("a caption in UTF-16 without its mark", "txt", "a red bar".encode("utf-16-le"), BAD_CAPTION),
    text("a caption with a byte order mark", "txt", b"\xef\xbb\xbfa red bar", learns="a red bar"),
    text("a caption of invisible characters", "txt", "\u200b\ufeff \u200e".encode()),
    text("a caption of 200 kB", "txt", RED * 20_000, "caption_too_long"),
    text("a caption of 50 MB", "txt", RED * 5_000_000, SAMPLE_TOO_LARGE),
    text("a JSON of 50 MB", "json", b'{"caption": "' + RED * 5_000_000 + b'"}', SAMPLE_TOO_LARGE),
    text("a class number of 5,000 digits", "cls", b"9" * 5_000, NO_CAPTION),
]  # fmt: skip
ATTACKS = [Attack(sample.name, make) for sample in SAMPLES]


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_attack(sample: Sample, trained: tuple[Path, Ended]) -> None:
    folder, ended = trained
    judge(Attack(sample.name, make), folder, ended)
    assert (folder / "run/DONE").exists()
    faults = [json.loads(line) for line in (folder / "run/bad_samples.jsonl").read_text().splitlines()]
    fault = next((fault for fault in faults if fault["key"] == key(sample)), {"cause": "", "detail": ""})
    assert (fault["cause"], sample.detail in fault["detail"]) == (sample.cause, True)
    source = TarSource(str(folder / "data"))
    if sample.learns:
        number = next(n for n in range(len(SAMPLES)) if source.key(4, n) == key(sample))
        assert choose_caption(source.read(4, number).captions, 0.99) == sample.learns
