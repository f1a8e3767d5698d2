"""Image-text pairs that can become shards: a folder, a table of paths, or a data set of the `datasets` library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flipscale.preparation.lists.columns import CAPTION_COLUMNS, IMAGE_COLUMNS, column
from flipscale.preparation.lists.files import IMAGE_SUFFIXES, FileList, UnreadableFile, captions_of, digest_of, image_of
from flipscale.preparation.lists.parquet_list import ParquetList
from flipscale.preparation.lists.table_list import TableList

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl")


class PairList(Protocol):
    """Pairs by number, in a fixed order. A list can be copied to another process."""

    def __len__(self) -> int: ...

    def key(self, number: int) -> str:
        """Return the name of pair `number` in its source."""

    def place(self, number: int) -> str:
        """Return where pair `number` is in its source, without reading it."""

    def image(self, number: int) -> bytes:
        """Return the image of pair `number` as stored.

        Raises:
            BadSample: it cannot be read.
        """

    def captions(self, number: int) -> list[str]:
        """Return the captions of pair `number` that are not blank.

        Raises:
            BadSample: there is none.
        """

    def fingerprint(self) -> str:
        """Return a digest of what names the pairs (files and captions, or the data set), not of the images."""


@dataclass(frozen=True)
class DatasetList:
    """The rows of a `datasets.Dataset` whose image column is not decoded.

    Args:
        root: the folder in which the images lie that the rows name only.
    """

    name: str
    dataset: Any
    image_column: str
    caption_column: str
    root: Path
    allow_outside: bool = False

    def __len__(self) -> int:
        return len(self.dataset)

    def key(self, number: int) -> str:
        return f"{self.name}#{number}"

    def place(self, number: int) -> str:
        return self.key(number)

    def image(self, number: int) -> bytes:
        return image_of(self._row(number)[self.image_column], self.root, self.allow_outside)

    def captions(self, number: int) -> list[str]:
        return captions_of(self._row(number)[self.caption_column])

    def fingerprint(self) -> str:
        return digest_of([self.name, len(self), self.image_column, self.caption_column])

    def _row(self, number: int) -> dict[str, Any]:
        try:
            row: dict[str, Any] = self.dataset[number]
        except Exception as error:
            # `datasets` raises whatever its formats and pyarrow do.
            raise UnreadableFile(f"the row cannot be read ({error})") from error
        return row


def open_pairs(
    source: str,
    image_column: str | None = None,
    caption_column: str | None = None,
    split: str = "train",
    allow_outside: bool = False,
) -> PairList:
    """Return the pairs of `source`.

    That is a folder of images with KEY.txt or KEY.json beside them or a `metadata` table in it, a CSV, TSV, JSONL or
    parquet table of paths, a data set saved to disk, or a name for `datasets`.

    Args:
        allow_outside: read also files outside the folder of the list, by their path or by a link.

    Raises:
        ValueError: it is none of these, a column is missing, or it has no images.
    """
    path = Path(source)
    pairs: PairList
    if path.is_dir():
        tables = [path / f"metadata{suffix}" for suffix in TABLE_SUFFIXES]
        table = next((table for table in tables if table.exists()), None)
        if table is not None:
            pairs = _of_table(table, image_column, caption_column, allow_outside)
        elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            pairs = _of_dataset(source, image_column, caption_column, split, allow_outside)
        else:
            pairs = FileList.of_folder(path, allow_outside)
    elif path.suffix.lower() in TABLE_SUFFIXES:
        pairs = _of_table(path, image_column, caption_column, allow_outside)
    else:
        pairs = _of_dataset(source, image_column, caption_column, split, allow_outside)
    if not len(pairs):
        what = "rows" if path.is_file() else f"images; they are files named {' '.join(IMAGE_SUFFIXES)}"
        raise ValueError(f"{source} has no {what}")
    return pairs


def _of_table(path: Path, image: str | None, caption: str | None, allow_outside: bool) -> PairList:
    """Return the pairs of a table; paths in it are relative to its folder."""
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}; name a folder, a table or a data set")
    kind = ParquetList if path.suffix.lower() == ".parquet" else TableList
    return kind.of_file(path, image, caption, allow_outside)


def _of_dataset(source: str, image: str | None, caption: str | None, split: str, allow_outside: bool) -> PairList:
    import datasets

    try:
        if is_saved := Path(source).is_dir():
            loaded = datasets.load_from_disk(source)
            loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(source, split=split)
        columns = loaded.column_names
    except Exception as error:
        # `datasets` raises whatever the Hub, its builders or its file systems do.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{source!r} is no folder, no table and no data set that `datasets` loads ({reason})"
        ) from error
    image = column(source, columns, image, IMAGE_COLUMNS, "image")
    caption = column(source, columns, caption, CAPTION_COLUMNS, "caption")
    try:
        loaded = loaded.select_columns([image, caption]).cast_column(image, datasets.Image(decode=False))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"column {image} of {source} holds no images ({reason}); name the images' with --image_column"
        ) from error
    # What was downloaded with a data set lies in the cache.
    root = Path(source) if is_saved else Path(datasets.config.HF_CACHE_HOME)
    return DatasetList(source, loaded, image, caption, root, allow_outside)
