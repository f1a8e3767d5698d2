"""Test sets that the Hub has only as parquet, written as shards in CLIP_benchmark's layout."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from flipscale.data.decode import decode_whole
from flipscale.data.sources.tar_file import add_member
from flipscale.io.atomic import atomic_write
from flipscale.io.errors import UserError

IMAGES_PER_SHARD = 1000
_ROWS_AT_ONCE = 64
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class Columns:
    """What the columns of the tables are called.

    Args:
        image: of images.
        label: of classes.
        clip: that name a clip, where rows are the frames of videos, of which the middle one is taken.
        frame: of a frame's number in its clip.
    """

    image: str
    label: str
    clip: tuple[str, ...] = ()
    frame: str = ""


def convert(files: Sequence[Path], out_dir: Path, columns: Columns, name: str) -> list[str] | None:
    """Write `0.tar`, `1.tar`, ... and `nshards.txt` to `out_dir`, and return the names of the classes; None if the
    files state numbers only. The folder is whole or as it was.

    Args:
        files: the parquet files of a split, in order.
        name: of the task, for messages and the progress bar.

    Raises:
        ValueError: a column is missing, or a row has no image or no class.
    """
    from pyarrow import ArrowException

    try:
        return _convert(files, out_dir, columns, name)
    except (ArrowException, KeyError, TypeError, OSError) as error:
        # pyarrow's own OSErrors have no number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        why = " ".join(str(error).split())
        raise UserError(f"{name}: the tables of its source cannot be read ({why}); the source has changed") from error


def _convert(files: Sequence[Path], out_dir: Path, columns: Columns, name: str) -> list[str] | None:
    from datasets import ClassLabel, Features
    from pyarrow import parquet

    schema = parquet.read_schema(files[0])
    for column in (columns.image, columns.label, *columns.clip, *filter(None, [columns.frame])):
        if column not in schema.names:
            raise UserError(f"{name}: its source has no column {column!r}; it has {', '.join(schema.names)}")
    kind = Features.from_arrow_schema(schema)[columns.label]
    wanted = middle_frames(files, columns) if columns.clip else None
    total = sum(parquet.read_metadata(file).num_rows for file in files) if wanted is None else len(wanted)
    samples = _samples(files, columns, wanted, name)
    num_shards = -(-total // IMAGES_PER_SHARD)
    with atomic_write(out_dir) as partial:
        partial.mkdir(parents=True)
        with tqdm(total=total, desc=name, unit="image", disable=None) as bar:
            for shard in range(num_shards):
                with tarfile.open(partial / f"{shard}.tar", "w") as tar:
                    for number in range(shard * IMAGES_PER_SHARD, min((shard + 1) * IMAGES_PER_SHARD, total)):
                        content, extension, label = next(samples, None) or _too_few(name)
                        add_member(tar, f"s{number:07d}.{extension}", content)
                        add_member(tar, f"s{number:07d}.cls", str(label).encode())
                        bar.update()
        (partial / "nshards.txt").write_text(f"{num_shards}\n", encoding="utf-8")
    return list(kind.names) if isinstance(kind, ClassLabel) else None


def middle_frames(files: Sequence[Path], columns: Columns) -> set[int]:
    """Return the numbers of the rows that are the middle frame of their clip: of n in order, frame n // 2."""
    from pyarrow import parquet

    clips: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    row = 0
    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(columns=[*columns.clip, columns.frame]):
            for *clip, frame in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                clips.setdefault(tuple(clip), []).append((frame, row))
                row += 1
    return {sorted(frames)[len(frames) // 2][1] for frames in clips.values()}


def _samples(
    files: Sequence[Path], columns: Columns, wanted: set[int] | None, name: str
) -> Iterator[tuple[bytes, str, int]]:
    """Yield image, extension and class of the rows, or of those that are wanted."""
    from pyarrow import parquet

    row = 0
    for file in files:
        table = parquet.ParquetFile(file)
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if wanted is not None and wanted.isdisjoint(range(row, row + size)):
                row += size
                continue
            for batch in table.iter_batches(_ROWS_AT_ONCE, [group], [columns.image, columns.label]):
                for image, label in zip(batch.column(columns.image), batch.column(columns.label), strict=True):
                    if wanted is None or row in wanted:
                        yield _sample(image.as_py(), label.as_py(), f"{name}: row {row} of its source")
                    row += 1


def _too_few(name: str) -> NoReturn:
    raise UserError(f"{name}: the tables of its source have fewer rows than they say; the source has changed")


def _sample(image: Any, label: Any, where: str) -> tuple[bytes, str, int]:
    """Return an image with its extension and its class: the bytes as they are, or as PNG where shards have no such
    format."""
    from PIL import Image

    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes) or not isinstance(label, int) or label < 0:
        missing = "class" if isinstance(content, bytes) else "image"
        raise UserError(f"{where} has no {missing}; the source has changed")
    try:
        picture = Image.open(io.BytesIO(content))
        if picture.format in _EXTENSIONS:
            return content, _EXTENSIONS[picture.format], label
        written = io.BytesIO()
        Image.fromarray(decode_whole(content)).save(written, "PNG")
    except Exception as error:
        # Pillow raises whatever its formats do.
        raise UserError(f"{where} has an image that cannot be read ({error}); the source has changed") from error
    return written.getvalue(), "png", label
