"""`prepared.json`, the mark of a whole test set. It is written last."""

import json
from pathlib import Path
from typing import Any

from flipscale.io.errors import UserError
from flipscale.io.files import quoted, read_text

PREPARED = "prepared.json"


def read_prepared(folder: Path) -> dict[str, Any] | None:
    """Return the content of `prepared.json` in `folder`; None if it, or a file in its list, is missing or damaged."""
    try:
        content: dict[str, Any] = json.loads(read_text(folder / PREPARED))
        whole = all((folder / name).stat().st_size == file["bytes"] for name, file in content["files"].items())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return content if whole else None


def check_prepared(folder: Path, task: str) -> None:
    """Raise unless the data of `task` in `folder` is whole."""
    if read_prepared(folder) is None:
        state = "was prepared only in part" if folder.exists() else "is missing"
        fix = f"flipscale prepare tasks {quoted(folder.parent)} --only {task}"
        raise UserError(f"the data of task {task} {state}; run `{fix}`")
