"""`prepared.json`, the mark of a prepared test set: written last, so a folder that has it is whole."""

import json
from pathlib import Path
from typing import Any

from flipscale.io.errors import UserError
from flipscale.io.files import read_text

PREPARED = "prepared.json"
TASKS_DIR = "data/tasks"  # where `flipscale prepare tasks` puts test sets, unless told otherwise


def read_prepared(folder: Path) -> dict[str, Any] | None:
    """Return what `prepared.json` of `folder` says, or None if the folder is not whole: it has no such file, or a file
    that is listed there is gone or has another size."""
    try:
        said: dict[str, Any] = json.loads(read_text(folder / PREPARED))
        whole = all((folder / name).stat().st_size == file["bytes"] for name, file in said["files"].items())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return said if whole else None


def check_prepared(folder: Path, task: str) -> None:
    """Raise if the data of `task` is not whole at `folder`.

    Raises:
        ValueError: it is missing or was downloaded in part.
    """
    if read_prepared(folder) is None:
        state = "was prepared only in part" if folder.exists() else "is missing"
        raise UserError(
            f"the data of task {task} {state} ({folder}); run `flipscale prepare tasks {folder.parent} --only {task}`"
        )
