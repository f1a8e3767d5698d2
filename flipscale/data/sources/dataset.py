"""A source of any `datasets` Dataset: a Hub name, parquet, Arrow, JSON or CSV files, or a folder of images."""

import errno
import os
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flipscale.data import samples
from flipscale.data.captions import encoded_captions
from flipscale.data.sources.shard_index import NotAFile, open_plain
from flipscale.io.errors import UserError, first_line
from flipscale.io.urls import without_secrets

if TYPE_CHECKING:
    from datasets import Dataset

# Rows are read at random from shards_per_block shards of this size.
_ROWS_PER_SHARD = 10_000
_OUTLINED = 64  # rows whose images are compared
# Errors of a path that is not a file. Other errors may pass.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)
_BYTES = ("binary", "large_binary")
_TEXTS = ("string", "large_string", "string_view", "null")
_FILE_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}


def load_rows(name: str, config: str | None, split: str) -> "Dataset":
    """Return the Dataset of a folder of `save_to_disk` or for `load_dataset`, of a path or glob of parquet, Arrow, CSV
    or JSON lines files, or of a name on the Hub."""
    import datasets

    path = Path(name)
    kind, is_saved_alone = _FILE_KINDS.get(path.suffix), (path / "state.json").is_file()
    try:
        if is_saved_alone:
            rows = datasets.load_from_disk(name)
        elif (path / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)[split]
        elif kind is not None:
            rows = datasets.load_dataset(kind, data_files={split: name}, split=split)
        else:
            rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library and its builders raise many kinds
        raise UserError(
            f"dataset {name!r}, split {split!r}, cannot be loaded ({first_line(error)}); name a folder, parquet or "
            "Arrow files, or a dataset on the Hub"
        ) from error
    # `train` is the default, which asks for no split.
    if is_saved_alone and rows.split is not None and split not in ("train", str(rows.split)):
        raise UserError(
            f"dataset {name!r} has the split {str(rows.split)!r} alone; expected {split!r}; name that split's folder"
        )
    return rows


class DatasetSource(samples.Source):
    """The rows of a map-style Dataset by (shard, number). A shard is 10,000 consecutive rows; images stay encoded.

    Args:
        rows: a memory-mapped Dataset, so that copies in workers take no memory.
        image_column: column of an Image feature, or of encoded bytes.
    """

    def __init__(self, rows: "Dataset", name: str, image_column: str, caption_columns: list[str]):
        import datasets
        from huggingface_hub.constants import HF_HUB_CACHE

        _check_columns(rows, name, image_column, caption_columns)
        self.name = without_secrets(name)
        # A row may store the path of an image file, in the dataset's folder or in a cache.
        caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
        folders = (*_folders_of(name), *map(str, caches))
        self._folders = {form(folder) for folder in folders for form in (os.path.abspath, os.path.realpath)}
        self.image_column = image_column
        self.caption_columns = caption_columns
        rows = rows.select_columns([image_column, *caption_columns]).with_format(None)
        if isinstance(rows.features[image_column], datasets.Image):
            rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self.rows = rows
        full, rest = divmod(len(rows), _ROWS_PER_SHARD)
        self.shard_sizes = [_ROWS_PER_SHARD] * full + [rest] * (rest > 0)
        self.faults: list[samples.Fault] = []

    def read(self, shard: int, number: int) -> samples.Sample:
        row = self._row(shard * _ROWS_PER_SHARD + number)
        kinds = {column: encoded_captions(row[column], repr(column)) for column in self.caption_columns}
        captions = tuple(text for texts in kinds.values() for text in texts)
        if not captions:
            raise samples.MissingCaption("there is none")
        image = self._image(row[self.image_column])
        return samples.Sample(f"{self.name}#{self.key(shard, number)}", image, captions, kinds=kinds)

    def _row(self, number: int) -> dict[str, Any]:
        """Return a row. Raise BadSample if it cannot be decoded, such as a text that is not UTF-8."""
        try:
            return self.rows[number]
        except OSError:
            raise
        except Exception as error:
            raise samples.BadSample(samples.one_line_reason(error), "unreadable_row") from error

    def _image(self, stored: Any) -> bytes:
        """Return the encoded image of a row. Raise BadSample if the row has no image, or it is too large."""
        content, file = (stored.get("bytes"), stored.get("path")) if isinstance(stored, dict) else (stored, None)
        if content is None and file:
            content = self._file(file)
        if not content or not isinstance(content, bytes):
            what = f"has a {type(content).__name__}; it must be encoded bytes" if content else "is empty"
            raise samples.BadSample(f"column {self.image_column!r} {what}", "missing_image")
        samples.check_bytes(len(content), samples.MAX_IMAGE_BYTES, "an image")
        return content

    def _file(self, name: str) -> bytes:
        path = os.path.abspath(name.replace("\0", "?"))  # a file name cannot have a NUL
        if not any(os.path.commonpath([path, folder]) == folder for folder in self._folders):
            raise samples.BadSample(f"it is the file {name!r}, which is not in the dataset's folder", "missing_image")
        try:
            with os.fdopen(open_plain(path), "rb") as opened:
                samples.check_bytes(os.fstat(opened.fileno()).st_size, samples.MAX_IMAGE_BYTES, "an image")
                return opened.read()
        except OSError as error:
            if not isinstance(error, NotAFile) and error.errno not in _NO_FILE:
                raise
            raise samples.BadSample(f"{name!r}: {error.strerror or error}", "missing_image") from error

    def outline(self) -> list[int]:
        numbers = []
        for row in samples.evenly(len(self), _OUTLINED):
            with suppress(samples.BadSample):
                numbers.append(zlib.crc32(self._image(self._row(row)[self.image_column])))
        return numbers

    def shard_name(self, shard: int) -> str:
        return f"{self.name}[{shard * _ROWS_PER_SHARD}:]"

    def key(self, shard: int, number: int) -> str:
        return str(shard * _ROWS_PER_SHARD + number)


def _check_columns(rows: "Dataset", name: str, image_column: str, caption_columns: list[str]) -> None:
    from datasets import Image

    for column in (image_column, *caption_columns):
        if column not in rows.column_names:
            raise UserError(f"dataset {name!r} has no column {column!r}; it has {', '.join(rows.column_names)}")
    feature = rows.features[image_column]
    if not (isinstance(feature, Image | dict) or getattr(feature, "dtype", "") in _BYTES):
        raise UserError(f"dataset {name!r} has no images in column {image_column!r} but {feature}; name another")
    for column in caption_columns:
        feature = rows.features[column]
        text = getattr(feature, "feature", feature)
        if getattr(text, "dtype", "") not in _TEXTS:
            raise UserError(f"dataset {name!r} has no captions in column {column!r} but {feature}; name texts or lists")


def _folders_of(name: str) -> Iterable[str]:
    """Yield the folder of a dataset's files; nothing for a dataset on the Hub."""
    path = Path(name)
    if path.is_dir():
        yield name
    elif path.suffix in _FILE_KINDS:
        while any(sign in str(path) for sign in "*?[{") or path.suffix in _FILE_KINDS:
            path = path.parent
        yield str(path)
