"""A source of any `datasets` Dataset: a Hub name, parquet, Arrow, JSON or CSV files, or a folder of images."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flipscale.data.faults import BadSample, Fault, MissingCaption
from flipscale.data.sources.source import Sample

if TYPE_CHECKING:
    from datasets import Dataset

# Rows are read at random from shards_per_block shards of this size.
_ROWS_PER_SHARD = 10_000
_FILE_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}


class MissingImage(BadSample):
    """The row has no image."""

    cause = "missing_image"


def load_rows(name: str, config: str | None, split: str) -> "Dataset":
    """Load the Dataset `name`.

    That is a folder written by `save_to_disk`, a path or glob of parquet, Arrow, CSV or JSON lines files, a folder that
    `load_dataset` understands, or a name on the Hub.

    Raises:
        ValueError: it cannot be loaded.
    """
    import datasets

    path = Path(name)
    kind = _FILE_KINDS.get(path.suffix)
    try:
        if (path / "state.json").is_file():
            return datasets.load_from_disk(name)
        if (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)[split]
        if kind is not None:
            return datasets.load_dataset(kind, data_files={split: name}, split=split)
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:
        # The library and its builders raise many kinds of exceptions; they all mean that it cannot be loaded.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"dataset {name!r}, split {split!r}, cannot be loaded ({reason}); name a folder, parquet or Arrow files, "
            "or a dataset on the Hub"
        ) from error


class DatasetSource:
    """The rows of a map-style Dataset by (shard, number). A shard is 10,000 consecutive rows; images stay encoded.

    Args:
        rows: memory-mapped by `datasets`, so that copies in workers take no memory.
        name: its name in messages.
        image_column: has an Image feature, or encoded bytes.
        caption_columns: each has a caption or a list of captions.

    Raises:
        ValueError: a column does not exist.
    """

    def __init__(self, rows: "Dataset", name: str, image_column: str, caption_columns: list[str]):
        from datasets import Image

        for column in (image_column, *caption_columns):
            if column not in rows.column_names:
                raise ValueError(f"dataset {name!r} has no column {column!r}; it has {', '.join(rows.column_names)}")
        self.name = name
        self.image_column = image_column
        self.caption_columns = caption_columns
        rows = rows.select_columns([image_column, *caption_columns]).with_format(None)
        if isinstance(rows.features[image_column], Image):
            rows = rows.cast_column(image_column, Image(decode=False))
        self.rows = rows
        full, rest = divmod(len(rows), _ROWS_PER_SHARD)
        self.shard_sizes = [_ROWS_PER_SHARD] * full + [rest] * (rest > 0)
        self.faults: list[Fault] = []

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, shard: int, number: int) -> Sample:
        """Do as `Source.read`."""
        row = self.rows[shard * _ROWS_PER_SHARD + number]
        captions: list[Any] = []
        for column in self.caption_columns:
            value = row[column]
            captions += value if isinstance(value, list) else [value]
        image = row[self.image_column]
        if isinstance(image, dict):
            image = image["bytes"] if image["bytes"] is not None else image["path"] and Path(image["path"]).read_bytes()
        if not image:
            raise MissingImage(f"column {self.image_column!r} is empty")
        texts = [str(caption).encode() for caption in captions if caption is not None]
        if not texts:
            raise MissingCaption("there is none")
        return Sample(f"{self.name}#{self.key(shard, number)}", image, tuple(texts))

    def shard_name(self, shard: int) -> str:
        """Return the dataset's name and the first row of the shard."""
        return f"{self.name}[{shard * _ROWS_PER_SHARD}:]"

    def key(self, shard: int, number: int) -> str:
        """Return the number of the row."""
        return str(shard * _ROWS_PER_SHARD + number)

    def fetch_ahead(self, shards: list[int]) -> None:
        """Do nothing, because the rows are on this machine."""
