"""The error of a place without shards: what is there, and the command that makes shards of it."""

import glob
import os
import shlex
from itertools import islice
from pathlib import Path

from flipscale.data.sources.pair_set import set_names
from flipscale.io.errors import UserError

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff"),
    ".webp",
)
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl")
RAW_SUFFIXES = (*IMAGE_SUFFIXES, *TABLE_SUFFIXES)
_MOST_FILES, _MOST_FOLDERS = 10_000, 4  # looked at, and named in the error

# Commands that write the data of the package's recipes, by the start of the path.
_WRITERS = {
    "data/demo/train_without_unseen": "python examples/demo/data.py data/demo --with_unseen",
    "data/demo/unseen": "python examples/demo/data.py data/demo --with_unseen",
    "data/demo": "python examples/demo/data.py data/demo",
    "data/mine": "flipscale prepare shards PICTURES data/mine --split 0.1",
}


def is_saved_dataset(folder: str) -> bool:
    return any(os.path.exists(f"{folder}/dataset_{what}.json") for what in ("info", "dict"))


def no_shards(shards: str) -> UserError:
    """Return the error of `shards` that match nothing, or raw data."""
    downloads = {name: f"flipscale prepare pairs {name} data/{name}" for name in set_names()}
    writers = _WRITERS | downloads | {f"data/{name}": command for name, command in downloads.items()}
    command = next((command for folder, command in writers.items() if f"{shards}/".startswith(f"{folder}/")), "")
    checkout = ", in a checkout of flipscale," if "examples/" in command else ""
    writer = command and f"`{command}`{checkout} writes them"
    names = "a folder of *.tar, a glob, a range like {00000..00041}.tar, or a set of `flipscale prepare pairs --list`"
    fix = _use_of(shards) or writer or f"name {names}"
    return UserError(f"no shards at {shards!r}; {fix}")


def _use_of(shards: str) -> str:
    """Return what is at `shards`, and how to train on it; empty if nothing known is there."""
    is_folder = os.path.isdir(shards)
    files = list(islice(Path(shards).rglob("*") if is_folder else map(Path, glob.iglob(shards)), _MOST_FILES))
    if folders := sorted({str(file.parent) for file in files if file.suffix == ".tar"})[:_MOST_FOLDERS]:
        return f"name the folder of its shards: {' or '.join(folders)}"
    known = (file for file in files if file.suffix.lower() in RAW_SUFFIXES)
    raw = sorted(known, key=lambda file: RAW_SUFFIXES.index(file.suffix.lower()))
    if is_saved_dataset(shards):
        kind, source = "a saved data set", shards
    elif not raw:
        return ""
    elif raw[0].suffix == ".parquet" and str(raw[0]) != shards:
        columns = "image_column: image, caption_columns: [caption]"
        return f"it is Parquet files: give --data.shards null --data.sources '[{{dataset: {shards}, {columns}}}]'"
    elif raw[0].suffix.lower() in IMAGE_SUFFIXES:
        kind, source = "pictures", shards if is_folder else str(raw[0].parent)
    else:
        kind, source = "a table", str(raw[0])
    folder = f"data/{Path(source).absolute().stem}"
    command = ["flipscale", "prepare", "shards", source, f"{folder}_shards" if os.path.exists(folder) else folder]
    return f"it is {kind}: `{shlex.join(command)}` makes shards of it"
