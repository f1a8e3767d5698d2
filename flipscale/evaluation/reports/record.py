"""`results.jsonl` beside a model: a line a figure, with everything that made it.

The lines of one task under one setting are a group: they are written at once, as soon as the task has ended, and read
only if they are all there. A group that stands there is not evaluated again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flipscale.evaluation.results import Result
from flipscale.io import json_lines
from flipscale.io.errors import UserError

_FIRST = b'{"group": "'
_NEEDED: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("group", "weights", "task", "kind", "metric"), str),
    **{"lines": int, "value": (int, float), "data": (dict, type(None))},
}
_KNOWN = {field.name for field in dataclasses.fields(Result)}


@dataclass(frozen=True)
class Line:
    """A figure, and what made it.

    Args:
        result: its `made_by` names the data without the way to it.
        about: the other fields of the line: `group weights model page title suites data prompts image_size mask
            precision versions seconds date`.
    """

    result: Result
    about: dict[str, Any]


def weights_digest(names: Iterable[str], read: Callable[[str], torch.Tensor]) -> str:
    """Return the SHA-256 of weights: of their names in alphabetical order, each with its dtype, shape and bytes.

    Args:
        read: returns the tensor of a name, on any device.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = read(name).detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def group_of(weights: str, setting: dict[str, Any]) -> str:
    """Return the name of the lines of one task: a digest of the weights and of all that its figures depend on."""
    return hashlib.sha256(json.dumps([weights, setting], sort_keys=True).encode()).hexdigest()[:16]


def append_lines(path: Path, group: str, results: Sequence[Result], about: dict[str, Any]) -> list[Line]:
    """Append the lines of a group in one write, wait until they are on disk, and return them.

    Raises:
        OSError: the disk is full or not writable.
    """
    records = [{"group": group, "lines": len(results), **dataclasses.asdict(result), **about} for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    json_lines.append(path, records, is_synced=True)
    return [_as_line(record) for record in records]


def read_lines(path: Path) -> list[Line]:
    """Return the lines of all whole groups of a file, each group once; none where there is no file.

    Raises:
        ValueError: it is no file, or has lines that `flipscale evaluate` did not write.
    """
    return [_as_line(record) for record in _whole_groups(_records(path))]


def drop_torn(path: Path) -> None:
    """Write the file anew without the groups that a kill left torn or incomplete, if there are such.

    Raises:
        ValueError: as `read_lines`.
        OSError: the disk is full or not writable.
    """
    if not path.exists():
        return
    whole = _whole_groups(_records(path))
    if len(whole) != len(path.read_bytes().splitlines()):
        json_lines.rewrite(path, whole)


def _records(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file that are not torn."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{path} is no file; move it away, or name another folder with --output_dir")
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip(b"\0"):  # a file system that lost its power may leave zeros
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if record is None and (line.startswith(_FIRST) or _FIRST.startswith(line)):
            continue
        if not isinstance(record, dict) or not _is_line(record):
            raise UserError(
                f"{path}, line {number}, is not a line of `flipscale evaluate`; move the file away, or name another "
                "folder with --output_dir"
            )
        found.append(record)
    return found


def _is_line(record: dict[str, Any]) -> bool:
    """Return whether a record has what a line needs, each of its type, and no part of a result of another type."""
    about = {"made_by": dict, "who": str, "unit": str, "label": str}
    return all(isinstance(record.get(name, ...), kind) for name, kind in _NEEDED.items()) and all(
        isinstance(record[name], kind) for name, kind in about.items() if name in record
    )


def _whole_groups(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of the groups that are whole, each figure once."""
    groups: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["group"], {})[record["metric"], record.get("who", "")] = record
    whole = (list(lines.values()) for lines in groups.values())
    return [line for lines in whole if len(lines) == lines[0]["lines"] for line in lines]


def _as_line(record: dict[str, Any]) -> Line:
    known = {name: value for name, value in record.items() if name in _KNOWN}
    return Line(Result(**known), {name: value for name, value in record.items() if name not in _KNOWN})
