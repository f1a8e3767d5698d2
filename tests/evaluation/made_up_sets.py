"""Test sets in CLIP_benchmark's layout, of made-up pictures in every odd encoding."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from conftest import COLOURS, SHAPES, add_member, draw
from PIL import Image

from flipscale.data.sources.tar import TarSource

NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def npy(array: np.ndarray) -> bytes:
    stored = io.BytesIO()
    np.save(stored, array, allow_pickle=True)
    return stored.getvalue()


Encode = Callable[[np.ndarray], bytes]


def encode(kind: str, **options: Any) -> Encode:
    def encoded(image: np.ndarray) -> bytes:
        stored, picture = io.BytesIO(), Image.fromarray(image)
        mode = options.pop("mode", None)
        (picture.convert(mode) if mode else picture).save(stored, kind, **options)
        return stored.getvalue()

    return encoded


def with_alpha(image: np.ndarray) -> bytes:
    alpha = np.linspace(0, 255, image.shape[1]).astype(np.uint8)[None].repeat(len(image), 0)
    stored = io.BytesIO()
    Image.fromarray(np.dstack([image, alpha])).save(stored, "webp", lossless=True)
    return stored.getvalue()


def turned(image: np.ndarray) -> bytes:
    """A JPEG whose EXIF block says that it lies on its side."""
    exif, stored = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(image).save(stored, "jpeg", exif=exif)
    return stored.getvalue()


def sixteen_bits(image: np.ndarray) -> bytes:
    stored = io.BytesIO()
    Image.fromarray(image[:, :, 0].astype(np.uint16) * 3).save(stored, "png")
    return stored.getvalue()


ENCODINGS: list[tuple[str, Encode]] = [
    ("webp", encode("webp", lossless=True)),
    ("webp", with_alpha),
    ("png", encode("png", mode="L")),
    ("png", encode("png", mode="P")),
    ("png", encode("png", mode="LA")),
    ("png", sixteen_bits),
    ("jpg", encode("jpeg", mode="CMYK")),
    ("jpeg", encode("jpeg", quality=60)),
    ("JPEG", turned),
]


def write_set(
    folder: Path, num_shards: int, each: int, files: Callable[[int, int], dict[str, bytes]], dataset_type: str = ""
) -> Path:
    """A test set in CLIP_benchmark's layout; `files` makes the other files of a sample from its number and class."""
    (folder / "test").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for shard in range(num_shards):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for number in range(shard * each, shard * each + each):
                label = int(rng.integers(len(NAMES)))
                extension, encoded = ENCODINGS[number % len(ENCODINGS)]
                key = f"{'a.b/c/' if shard % 2 else ''}s{number:04d}"
                sample = {extension: encoded(draw(*NAMES[label].split(), rng)), **files(number, label)}
                for name, content in sorted(sample.items()):
                    add_member(tar, f"{key}.{name}", content)
    (folder / "test" / "nshards.txt").write_text(f"{num_shards}\n")
    if dataset_type:
        (folder / "dataset_type.txt").write_text(dataset_type)
    return folder


def png(image: np.ndarray) -> bytes:
    """Return an image, uint8 RGB, as a PNG file."""
    return encode("png")(image)


def write_samples(folder: Path, samples: Iterable[dict[str, bytes]]) -> Path:
    """Write a folder of one shard: the files of each sample by their extensions."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, files in enumerate(samples):
            for name, content in files.items():
                add_member(tar, f"{number:03d}.{name}", content)
    return folder


def write_overlap(audit: Path, shards: Path, rows: list[tuple[str, int]]) -> None:
    """Write what an audit finds about a folder of shards: the shard and number of each image in the training data."""
    (audit / "overlap").mkdir(parents=True, exist_ok=True)
    overlap = [{"shard": shard, "number": number} for shard, number in rows]
    about = {"test": shards.name, "contents": TarSource(str(shards)).contents_digest(), "overlap": overlap}
    (audit / "overlap" / f"{shards.parent.name}-{shards.name}.json").write_text(json.dumps(about))
