"""Data sets of the `datasets` library: by their name on the Hub, or saved to a folder."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flipscale.io.errors import UserError
from flipscale.io.model_folder import is_path
from flipscale.preparation.lists.columns import AskedColumns, Columns
from flipscale.preparation.lists.files import UnreadableFile, captions_of, digest_of, image_of, label_of

# As names on the Hub hardly do.
_ENDS_LIKE_A_FILE = re.compile(r"\.[A-Za-z]{2,7}$")


@dataclass(frozen=True)
class DatasetList:
    """The rows of a `datasets.Dataset` whose image column is not decoded.

    Args:
        name: of the data set, and its split.
        root: the folder in which the images lie that the rows name only.
    """

    name: str
    split: str
    dataset: Any
    columns: Columns
    root: Path
    allow_outside: bool = False

    @classmethod
    def of_name(cls, source: str, asked: AskedColumns, split: str, allow_outside: bool) -> "DatasetList":
        """Load a data set by its name on the Hub, or from the folder that it was saved to.

        Raises:
            ValueError: there is none, or it lacks a column.
        """
        is_saved = Path(source).is_dir()
        if not is_saved and (is_path(source) or _ENDS_LIKE_A_FILE.search(source)):
            raise UserError(
                f"{source} does not exist; name a folder, a table (.csv .tsv .jsonl .parquet) or a data set of the "
                "Hub, such as ORG/NAME"
            )
        import datasets

        try:
            if is_saved:
                loaded = datasets.load_from_disk(source)
                loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
            else:
                loaded = datasets.load_dataset(source, split=split)
            names, features = loaded.column_names, dict(loaded.features or {})
        except Exception as error:
            # `datasets` raises whatever the Hub, its builders or its file systems do.
            raise UserError(
                f"{source!r} is no folder, no table and no data set that `datasets` loads ({_first_line(error)})"
            ) from error
        columns = asked.among(source, names, features)
        try:
            loaded = loaded.select_columns(list(columns.names)).cast_column(columns.image, datasets.Image(decode=False))
        except Exception as error:
            raise UserError(
                f"column {columns.image} of {source} holds no images ({_first_line(error)}); name the images' with "
                "--image_column"
            ) from error
        # What was downloaded with a data set lies in the cache.
        root = Path(source) if is_saved else Path(datasets.config.HF_CACHE_HOME)
        return cls(source, split, loaded, columns, root, allow_outside)

    @property
    def layout(self) -> str:
        return f"{len(self):,} rows of the data set {self.name}, {self.split}: {self.columns.told()}"

    @property
    def usual_labels(self) -> str | None:
        return self.columns.usual_label

    def __len__(self) -> int:
        return len(self.dataset)

    def key(self, number: int) -> str:
        return f"{self.name}#{number}"

    def place(self, number: int) -> str:
        return self.key(number)

    def image(self, number: int) -> bytes:
        return image_of(self._row(number)[self.columns.image], self.root, self.allow_outside)

    def captions(self, number: int) -> list[str]:
        column = self.columns.caption
        return captions_of(self.columns.named(column, self._row(number)[column]))

    def label(self, number: int) -> str:
        column = self.columns.label
        assert column is not None
        return label_of(self.columns.named(column, self._row(number)[column]))

    def fingerprint(self) -> str:
        return digest_of([self.name, len(self), self.columns.image, self.columns.caption])

    def _row(self, number: int) -> dict[str, Any]:
        try:
            row: dict[str, Any] = self.dataset[number]
        except Exception as error:
            # `datasets` raises whatever its formats and pyarrow do.
            raise UnreadableFile(f"the row cannot be read ({error})") from error
        return row


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
