"""Convert parquet test sets of the Hub to shards in CLIP_benchmark's layout."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from flipscale.data.decode import decode_whole
from flipscale.data.samples import reason_of
from flipscale.data.sources.tar import add_member
from flipscale.io.atomic import atomic_write
from flipscale.io.errors import UserError
from flipscale.io.progress import Progress

IMAGES_PER_SHARD = 1000
_ROWS_AT_ONCE = 64
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class Columns:
    """Names of the columns.

    Args:
        image: column of images.
        label: column of classes.
        clip: columns that identify a clip. With them, rows are frames of videos, and the middle frame is taken.
        frame: column of a frame's number in its clip.
    """

    image: str
    label: str
    clip: tuple[str, ...] = ()
    frame: str = ""


def convert(files: Sequence[Path], out_dir: Path, columns: Columns, name: str) -> list[str] | None:
    """Write `0.tar`, `1.tar`, ... and `nshards.txt` to `out_dir`; a kill leaves the folder as it was.

    Args:
        files: parquet files of a split, in order.
        out_dir: folder to write.
        columns: names of the columns.
        name: name of the task, for messages.

    Returns:
        The names of the classes; None if the files have only their numbers.

    Raises:
        UserError: a column is missing, a row has no image or no class, or a file is damaged.
    """
    from pyarrow import ArrowException

    try:
        return _convert(files, out_dir, columns, name)
    except (ArrowException, KeyError, TypeError, OSError) as error:
        # pyarrow's OSErrors have no number; a full disk's have.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"{name}: the tables of its source cannot be read ({reason_of(error)}); the source has changed"
        ) from error


def _convert(files: Sequence[Path], out_dir: Path, columns: Columns, name: str) -> list[str] | None:
    from datasets import ClassLabel, Features
    from pyarrow import parquet

    schema = parquet.read_schema(files[0])
    for column in (columns.image, columns.label, *columns.clip, *filter(None, [columns.frame])):
        if column not in schema.names:
            raise UserError(f"{name}: its source has no column {column!r}; it has {', '.join(schema.names)}")
    chosen = _middle_frames(files, columns) if columns.clip else None
    total = sum(parquet.read_metadata(file).num_rows for file in files) if chosen is None else len(chosen)
    rows = enumerate(_rows(files, [columns.image, columns.label]))
    samples = (_sample(*row, f"{name}: row {at} of its source") for at, row in rows if chosen is None or at in chosen)
    num_shards = -(-total // IMAGES_PER_SHARD)
    with atomic_write(out_dir) as partial, Progress(total, name, "images") as progress:
        partial.mkdir(parents=True)
        for shard in range(num_shards):
            with tarfile.open(partial / f"{shard}.tar", "w") as tar:
                for at, (image, extension, label) in enumerate(islice(samples, IMAGES_PER_SHARD)):
                    key = f"s{shard * IMAGES_PER_SHARD + at:07d}"
                    add_member(tar, f"{key}.{extension}", image)
                    add_member(tar, f"{key}.cls", str(label).encode())
                    progress.update()
        (partial / "nshards.txt").write_text(f"{num_shards}\n", encoding="utf-8")
    label = Features.from_arrow_schema(schema)[columns.label]
    return list(label.names) if isinstance(label, ClassLabel) else None


def _middle_frames(files: Sequence[Path], columns: Columns) -> set[int]:
    """Return the rows with the middle frame of each clip: frame n // 2 of n in order."""
    clips: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for row, (*clip, frame) in enumerate(_rows(files, [*columns.clip, columns.frame])):
        clips.setdefault(tuple(clip), []).append((frame, row))
    return {sorted(frames)[len(frames) // 2][1] for frames in clips.values()}


def _rows(files: Sequence[Path], columns: list[str]) -> Iterator[tuple[Any, ...]]:
    """Yield these fields of each row."""
    from pyarrow import parquet

    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(_ROWS_AT_ONCE, columns=columns):
            yield from zip(*(batch.column(column).to_pylist() for column in columns), strict=True)


def _sample(image: Any, label: Any, where: str) -> tuple[bytes, str, int]:
    """Return the image, its extension and its class; a format that shards do not hold becomes PNG."""
    from PIL import Image

    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes) or not isinstance(label, int) or label < 0:
        missing = "class" if isinstance(content, bytes) else "image"
        raise UserError(f"{where} has no {missing}; the source has changed")
    try:
        kind = Image.open(io.BytesIO(content)).format
        if kind in _EXTENSIONS:
            return content, _EXTENSIONS[kind], label
        png = io.BytesIO()
        Image.fromarray(decode_whole(content)).save(png, "PNG")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where} has an image that cannot be read ({error}); the source has changed") from error
    return png.getvalue(), "png", label
