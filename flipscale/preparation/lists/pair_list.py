"""Image-text pairs that can become shards: a folder, a table of paths, or a data set of the `datasets` library."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from flipscale.io.errors import UserError
from flipscale.preparation.lists.columns import AskedColumns
from flipscale.preparation.lists.dataset_list import DatasetList
from flipscale.preparation.lists.files import IMAGE_SUFFIXES
from flipscale.preparation.lists.folder_list import FOLDER, list_folder
from flipscale.preparation.lists.parquet_list import ParquetList
from flipscale.preparation.lists.table_list import TableList

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl")


class PairList(Protocol):
    """Pairs by number, in a fixed order. A list can be copied to another process."""

    @property
    def layout(self) -> str:
        """What was recognised, in one line: how many pairs, and where images and captions come from."""

    @property
    def usual_labels(self) -> str | None:
        """What `--labels` could be: the folders of classes, or a column that is called like one of classes."""

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

    def label(self, number: int) -> str:
        """Return the name of the class of pair `number`, of a list that was opened with `labels`.

        Raises:
            BadSample: there is none.
        """

    def fingerprint(self) -> str:
        """Return a digest of what names the pairs (files and captions, or the data set), not of the images."""


@runtime_checkable
class VotedPairs(PairList, Protocol):
    """Pairs of an image and a question that people answered."""

    def votes(self, number: int) -> np.ndarray:
        """Return how many people gave each answer and, last, any other, for KEY.npy: whole numbers
        `(answers + 1,)`."""


def open_pairs(
    source: str,
    image_column: str | None = None,
    caption_column: str | None = None,
    split: str = "train",
    allow_outside: bool = False,
    labels: str | None = None,
) -> PairList:
    """Return the pairs of `source`.

    That is a folder of images with KEY.txt or KEY.json beside them, with a `metadata` table in it or sorted into a
    folder for each class, a CSV, TSV, JSONL or parquet table of paths, a data set saved to disk, or a name for
    `datasets`.

    Args:
        split: of a data set.
        allow_outside: read also files outside the folder of the list, by their path or by a link.
        labels: the column of classes, or `folder` for the folders of a folder of images.

    Raises:
        ValueError: it is none of these, a column is missing, or it has no images, or no captions.
    """
    path, asked = Path(source), AskedColumns(image_column, caption_column, labels)
    pairs: PairList
    if path.is_dir():
        tables = [path / f"metadata{suffix}" for suffix in TABLE_SUFFIXES]
        table = next((table for table in tables if table.exists()), None)
        if table is not None:
            pairs = _of_table(table, asked, allow_outside)
        elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            pairs = DatasetList.of_name(source, asked, split, allow_outside)
        else:
            if labels not in (None, FOLDER):
                raise UserError(f"--labels is {labels!r}, and {source} has no columns; give --labels {FOLDER}")
            pairs = list_folder(path, allow_outside)
    elif path.suffix.lower() in TABLE_SUFFIXES:
        pairs = _of_table(path, asked, allow_outside)
    else:
        pairs = DatasetList.of_name(source, asked, split, allow_outside)
    if not len(pairs):
        what = "rows" if path.is_file() else f"images; they are files named {' '.join(IMAGE_SUFFIXES)}"
        raise UserError(f"{source} has no {what}")
    return pairs


def _of_table(path: Path, asked: AskedColumns, allow_outside: bool) -> PairList:
    """Return the pairs of a table; paths in it are relative to its folder."""
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; name a folder, a table or a data set")
    kind = ParquetList if path.suffix.lower() == ".parquet" else TableList
    return kind.of_file(path, asked, allow_outside)
