"""Image-text pairs that can become shards: a folder, a table of paths, or a data set of the `datasets` library."""

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flipscale.data.faults import BadSample, MissingCaption, UndecodableCaption

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2"}
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl")
IMAGE_COLUMNS = ("image", "file_name", "filename", "path", "filepath", "image_path", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "txt")


class UnreadableFile(BadSample):
    """The image's file is missing or cannot be read."""

    cause = "unreadable_file"


class PairList(Protocol):
    """Pairs by number, in a fixed order. A list can be copied to another process."""

    def __len__(self) -> int: ...

    def key(self, number: int) -> str:
        """Return the name of pair `number` in its source."""

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
class FileList:
    """Image files under `root`, with their captions in `texts`; None if these are in files of the same names."""

    root: Path
    files: list[str]
    texts: list[Any] | None

    def __len__(self) -> int:
        return len(self.files)

    def key(self, number: int) -> str:
        return self.files[number]

    def image(self, number: int) -> bytes:
        try:
            return (self.root / self.files[number]).read_bytes()
        except OSError as error:
            raise UnreadableFile(str(error)) from error

    def captions(self, number: int) -> list[str]:
        if self.texts is not None:
            return _captions(self.texts[number])
        return _captions(self._beside(self.root / self.files[number]))

    def _beside(self, file: Path) -> Any:
        """Return the text of KEY.txt beside an image file, else the captions in KEY.json."""
        try:
            if file.with_suffix(".txt").is_file():
                return file.with_suffix(".txt").read_text(encoding="utf-8")
            if file.with_suffix(".json").is_file():
                fields = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
                return fields.get("captions") or fields.get("caption")
        except (ValueError, AttributeError) as error:
            raise UndecodableCaption(str(error)) from error
        raise MissingCaption("no .txt or .json beside it")

    def fingerprint(self) -> str:
        return _digest(self.files if self.texts is None else [self.files, self.texts])


@dataclass(frozen=True)
class DatasetList:
    """The rows of a `datasets.Dataset` whose image column is not decoded."""

    name: str
    dataset: Any
    image_column: str
    caption_column: str

    def __len__(self) -> int:
        return len(self.dataset)

    def key(self, number: int) -> str:
        return f"{self.name}#{number}"

    def image(self, number: int) -> bytes:
        image = self.dataset[number][self.image_column]
        if image is None:
            raise UnreadableFile("the image is null")
        try:
            return image["bytes"] or Path(image["path"]).read_bytes()
        except OSError as error:
            raise UnreadableFile(str(error)) from error

    def captions(self, number: int) -> list[str]:
        return _captions(self.dataset[number][self.caption_column])

    def fingerprint(self) -> str:
        return _digest([self.name, len(self), self.image_column, self.caption_column])


def _captions(texts: Any) -> list[str]:
    """Return one text or a list of texts as a list without blank ones."""
    found = [str(text).strip() for text in (texts if isinstance(texts, list) else [texts]) if text is not None]
    if not any(found):
        raise MissingCaption("it is blank" if found else "there is none")
    return [text for text in found if text]


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def open_pairs(
    source: str, image_column: str | None = None, caption_column: str | None = None, split: str = "train"
) -> PairList:
    """Return the pairs of `source`.

    That is a folder of images with KEY.txt or KEY.json beside them or a `metadata` table in it, a CSV, TSV, JSONL or
    parquet table of paths, a data set saved to disk, or a name for `datasets`.

    Raises:
        ValueError: it is none of these, a column is missing, or it has no images.
    """
    path = Path(source)
    if path.is_dir():
        tables = [path / f"metadata{suffix}" for suffix in TABLE_SUFFIXES]
        table = next((table for table in tables if table.exists()), None)
        if table is not None:
            pairs = _of_table(table, image_column, caption_column)
        elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            pairs = _of_dataset(source, image_column, caption_column, split)
        else:
            files = (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
            pairs = FileList(path, sorted(str(file.relative_to(path)) for file in files), None)
    elif path.suffix in TABLE_SUFFIXES:
        if not path.is_file():
            raise ValueError(f"{source} does not exist; name a folder, a table or a data set")
        pairs = _of_table(path, image_column, caption_column)
    else:
        pairs = _of_dataset(source, image_column, caption_column, split)
    if not len(pairs):
        raise ValueError(f"{source} has no images; they are files named {' '.join(sorted(IMAGE_SUFFIXES))}")
    return pairs


def _of_table(path: Path, image_column: str | None, caption_column: str | None) -> PairList:
    """Return the files that a table names, relative to its folder. A table that contains images is a data set."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        columns = pyarrow.parquet.read_schema(path).names
        image = _column(str(path), columns, image_column, IMAGE_COLUMNS, "image")
        caption = _column(str(path), columns, caption_column, CAPTION_COLUMNS, "caption")
        table = pyarrow.parquet.read_table(path, columns=[image, caption])
        if not pyarrow.types.is_string(table.schema.field(image).type):
            import datasets

            return _images_of(str(path), datasets.Dataset.from_parquet(str(path)), image, caption)
        return FileList(path.parent, table[image].to_pylist(), table[caption].to_pylist())
    with open(path, newline="", encoding="utf-8") as file:
        try:
            if path.suffix == ".jsonl":
                rows = [json.loads(line) for line in file if line.strip()]
            else:
                rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
        except ValueError as error:
            raise ValueError(f"{path} is no {path.suffix[1:].upper()} table in UTF-8 ({error})") from error
    columns = list(rows[0]) if rows else []
    image = _column(str(path), columns, image_column, IMAGE_COLUMNS, "image")
    caption = _column(str(path), columns, caption_column, CAPTION_COLUMNS, "caption")
    return FileList(path.parent, [row[image] for row in rows], [row.get(caption) for row in rows])


def _of_dataset(source: str, image_column: str | None, caption_column: str | None, split: str) -> PairList:
    import datasets

    try:
        if Path(source).is_dir():
            loaded = datasets.load_from_disk(source)
            loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(source, split=split)
    except Exception as error:
        # `datasets` raises whatever the Hub, its builders or its file systems do.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{source!r} is no folder, no table and no data set that `datasets` loads ({reason})"
        ) from error
    image = _column(source, loaded.column_names, image_column, IMAGE_COLUMNS, "image")
    caption = _column(source, loaded.column_names, caption_column, CAPTION_COLUMNS, "caption")
    return _images_of(source, loaded, image, caption)


def _images_of(name: str, dataset: Any, image: str, caption: str) -> DatasetList:
    import datasets

    dataset = dataset.select_columns([image, caption]).cast_column(image, datasets.Image(decode=False))
    return DatasetList(name, dataset, image, caption)


def _column(name: str, columns: Sequence[str], asked: str | None, usual: Sequence[str], kind: str) -> str:
    """Return the column `asked` for, or the first of the usual names that exists."""
    found = next((column for column in ([asked] if asked else usual) if column in columns), None)
    if found is None:
        raise ValueError(
            f"{name} has no column {asked or ' or '.join(usual)}; name the {kind}s' with --{kind}_column, "
            f"one of {', '.join(columns) or 'none'}"
        )
    return found
