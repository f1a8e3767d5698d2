"""The error of a place without shards: what is there, and the command that makes shards of it."""

import glob
import os
from itertools import islice
from pathlib import Path

from flipscale.io.errors import UserError
from flipscale.io.files import quoted

IMAGE_SUFFIXES = (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
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
    command = next((command for prefix, command in _WRITERS.items() if shards.startswith(prefix)), "")
    checkout = ", in a checkout of flipscale," if "examples/" in command else ""
    writer = command and f"`{command}`{checkout} writes them"
    fix = _use_of(shards) or writer or "name a folder of *.tar, a glob, or a range like {00000..00041}.tar"
    return UserError(f"no shards at {shards!r}; {fix}")


def _use_of(shards: str) -> str:
    """Return what is at `shards`, and how to train on it; empty if nothing known is there."""
    is_folder = os.path.isdir(shards)
    files = list(islice(Path(shards).rglob("*") if is_folder else map(Path, glob.iglob(shards)), _MOST_FILES))
    if folders := sorted({str(file.parent) for file in files if file.suffix == ".tar"})[:_MOST_FOLDERS]:
        return f"name the folder of its shards: {' or '.join(folders)}"
    raw = next((file for file in files if file.suffix.lower() in RAW_SUFFIXES), None)
    if raw is None and not is_saved_dataset(shards):
        return ""
    source = raw.parent if raw and raw.suffix.lower() in IMAGE_SUFFIXES else raw
    made = f"`flipscale prepare shards {quoted(shards if is_folder else str(source))} FOLDER` makes shards of it"
    is_dataset = raw is None or raw.suffix == ".parquet"
    return f"{made}, or name it as a `dataset` of data.sources if it holds images" if is_dataset else made
