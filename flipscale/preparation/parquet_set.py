"""Test sets that the Hub has only as parquet, written as shards in CLIP_benchmark's layout."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flipscale.data.sources.tar_file import add_member
from flipscale.files.aside import remove, written_aside

IMAGES_PER_SHARD = 1000
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def convert(files: list[Path], out_dir: Path, image: str, label: str, name: str) -> list[str] | None:
    """Write `0.tar`, `1.tar`, ... and `nshards.txt` to `out_dir`, and return the names of the classes; None if the
    files state numbers only. The folder is whole or as it was.

    Args:
        files: the parquet files of a split, in order.
        image: the column of images.
        label: the column of classes.
        name: of the task, for messages and the progress bar.

    Raises:
        ValueError: a column is missing, or a row has no image or no class.
    """
    from datasets import ClassLabel, Image, load_dataset

    with written_aside(out_dir) as partial:
        partial.mkdir(parents=True)
        cache = str(partial / "cache")
        rows = load_dataset("parquet", data_files=[str(file) for file in files], split="train", cache_dir=cache)
        for column in (image, label):
            if column not in rows.column_names:
                raise ValueError(f"{name}: its source has no column {column!r}; it has {', '.join(rows.column_names)}")
        kind = rows.features[label]
        rows = rows.select_columns([image, label]).cast_column(image, Image(decode=False))
        samples = _samples(rows, image, label, name)
        shards = range(0, len(rows), IMAGES_PER_SHARD)
        for shard, first in enumerate(shards):
            with tarfile.open(partial / f"{shard}.tar", "w") as tar:
                for number in range(first, min(first + IMAGES_PER_SHARD, len(rows))):
                    content, extension, found = next(samples)
                    add_member(tar, f"s{number:07d}.{extension}", content)
                    add_member(tar, f"s{number:07d}.cls", str(found).encode())
        (partial / "nshards.txt").write_text(f"{len(shards)}\n")
        remove(partial / "cache")
    return list(kind.names) if isinstance(kind, ClassLabel) else None


def _samples(rows: Any, image: str, label: str, name: str) -> Iterator[tuple[bytes, str, int]]:
    """Yield image, extension and class of every row."""
    for number, row in enumerate(tqdm(rows, desc=name, unit="image", disable=None)):
        content, found = (row[image] or {}).get("bytes"), row[label]
        if content is None or found is None or int(found) < 0:
            what = "image" if content is None else "class"
            raise ValueError(f"{name}: row {number} of its source has no {what}; the source has changed")
        yield *_stored(content), int(found)


def _stored(content: bytes) -> tuple[bytes, str]:
    """Return an image as its bytes are, or as PNG where shards have no such format."""
    from PIL import Image

    picture = Image.open(io.BytesIO(content))
    if picture.format in _EXTENSIONS:
        return content, _EXTENSIONS[picture.format]
    written = io.BytesIO()
    picture.convert("RGB").save(written, "PNG")
    return written.getvalue(), "png"
