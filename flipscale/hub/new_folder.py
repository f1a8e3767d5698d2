"""Folders that are never seen half written."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: Path | str) -> Iterator[Path]:
    """A folder aside, which takes the place of `path` once it is whole; of one that fails nothing is left.

    Raises:
        ValueError: `path` is there already.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} is there already; name another folder or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        (aside / path.name).mkdir()
        yield aside / path.name
        (aside / path.name).rename(path)
    finally:
        shutil.rmtree(aside)
