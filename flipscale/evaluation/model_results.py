"""The evaluation of a model, and its `results.jsonl`: a line for each figure, with everything that made it.

The lines of one task under one setting are a group. A group is written in one piece when its task has ended, and read
only if it is complete. An existing group is not evaluated again.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.results import Result
from flipscale.evaluation.suite import evaluated
from flipscale.evaluation.task_page import read_page, read_prepared
from flipscale.evaluation.test_set import CLASS_NAMES, TEMPLATES, TestSet, read_text
from flipscale.io import json_lines
from flipscale.io.errors import UserError
from flipscale.io.model_folder import open_weight_file, texts_digest
from flipscale.io.urls import without_secrets

_log = logging.getLogger(__name__)

# A line of JSON, or a part of one.
Record = dict[str, Any]
_FIRST = b'{"group": "'
# Types of a line's fields, because a model folder may come from elsewhere, with any file of this name.
_NEEDED = ("group", "weights", "task", "kind", "metric", "lines", "value", "data")
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys((*_NEEDED[:5], "who", "unit", "label"), str),
    **{"lines": int, "value": (int, float), "data": (dict, type(None)), "made_by": dict},
}
_KNOWN = {field.name for field in dataclasses.fields(Result)}
# Folder names that need the folder above them to name a data set.
_SPLITS = ("train", "test", "val", "validation")
_PACKAGES = ("flipscale", "torch", "transformers")


@dataclass(frozen=True)
class Line:
    """A figure, and what made it.

    Args:
        result: the figure. Its `made_by` names the data without a path.
        about: the other fields of the line: `group weights model page title suites data prompts image_size crop
            mask precision dims versions seconds date`.
    """

    result: Result
    about: Record


def evaluate_model(
    embedder: Embedder, name: str, path: Path, tasks: Sequence[Task], folder: Path | None = None
) -> list[Line]:
    """Collective. Evaluate the model `name` on the tasks whose figures are not in `path`, and append theirs.

    A task's lines are on disk before the next task ends. Only the main process reads and writes them.

    Args:
        folder: the model's local folder, by whose files the lines name the weights; None for other models.

    Returns:
        The lines of all tasks in their order on the main process, and no lines on the others.
    """
    from accelerate.utils import broadcast_object_list

    is_main = embedder.accelerator.is_main_process
    missing, known, groups, settings, digest = list(range(len(tasks))), dict[str, list[Line]](), [], [], ""
    if is_main:
        weights = embedder.model.state_dict()
        digest = folder_digest(folder) if folder else state_dict_digest(weights, weights.__getitem__)
        settings = [setting_of(embedder, task) for task in tasks]
        groups = [_digest([digest, embedder.files, setting]) for setting in settings]
        drop_torn(path)
        for line in read_result_lines(path):
            known.setdefault(line.about["group"], []).append(line)
        missing = [number for number, group in enumerate(groups) if group not in known]
        if num_known := len(tasks) - len(missing):
            _log.info("%s: %d of %d tasks are in %s and are not run again", name, num_known, len(tasks), path)
    (missing,) = broadcast_object_list([missing])
    if missing:
        started = time.monotonic()
        left = evaluated(embedder, [tasks[number] for number in missing])
        for number, (task, results) in zip(missing, left, strict=True):
            if is_main:
                seconds, group = time.monotonic() - started, groups[number]
                about = _about(task, settings[number], name, digest, seconds)
                known[group] = append_lines(path, group, [_published(result) for result in results], about)
                shown = next((result for result in results if result.headline), results[0])
                _log.info("%s: %s %s %s, %.0f s", name, shown.task, shown.shown, shown.estimate_text, seconds)
            started = time.monotonic()
    return [line for group in groups for line in known[group]]


def state_dict_digest(names: Iterable[str], read: Callable[[str], torch.Tensor]) -> str:
    """Return the SHA-256 of weights: of their names in alphabetical order, each with its dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = read(name).detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """Return the digest of the weights in a model folder and of its `texts_digest`. In memory, weights may have other
    names, shapes or dtypes."""
    files = open_weight_file(folder)
    weights = state_dict_digest(files, lambda name: files[name].get_tensor(name))
    return hashlib.sha256(f"{weights} {texts_digest(folder)}".encode()).hexdigest()


def append_lines(path: Path, group: str, results: Sequence[Result], about: Record) -> list[Line]:
    """Append the lines of a group in one write, wait until they are on disk, and return them."""
    records = [{"group": group, "lines": len(results), **dataclasses.asdict(result), **about} for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    json_lines.append(path, records, is_synced=True)
    return [_as_line(record) for record in records]


def read_result_lines(path: Path) -> list[Line]:
    """Return the lines of all complete groups of a file, each group once; nothing if there is no file."""
    return [_as_line(record) for record in _complete_groups(_records(path))]


def drop_torn(path: Path) -> None:
    """Rewrite a file without the groups that a kill left incomplete, if there are any."""
    if not path.exists():
        return
    complete = _complete_groups(_records(path))
    if len(complete) != len(path.read_bytes().splitlines()):
        json_lines.rewrite(path, complete)


def _records(path: Path) -> list[Record]:
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{path} is not a file; move it away, or name another folder with --output_dir")
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], 1):
        # A power failure may leave zeros.
        if not line.strip(b"\0"):
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if record is None and (line.startswith(_FIRST) or _FIRST.startswith(line)):
            continue
        if not isinstance(record, dict) or not all(
            isinstance(record.get(name, ...), kind)
            for name, kind in _KINDS.items()
            if name in _NEEDED or name in record
        ):
            raise UserError(
                f"{path}, line {number}, is not a line of `flipscale evaluate`; move the file away, or name another "
                "folder with --output_dir"
            )
        records.append(record)
    return records


def _complete_groups(records: Iterable[Record]) -> list[Record]:
    groups: dict[str, dict[tuple[str, str], Record]] = {}
    for record in records:
        groups.setdefault(record["group"], {})[record["metric"], record.get("who", "")] = record
    own = (list(lines.values()) for lines in groups.values())
    return [line for lines in own if len(lines) == lines[0]["lines"] for line in lines]


def _as_line(record: Record) -> Line:
    known = {name: value for name, value in record.items() if name in _KNOWN}
    return Line(Result(**known), {name: value for name, value in record.items() if name not in _KNOWN})


def setting_of(embedder: Embedder, task: Task) -> Record:
    """Return everything that a task's figures depend on besides the weights: options, data, prompts, image processing.

    Batch size, workers and the number of processes are left out, because no figure depends on them."""
    test_set, page = TestSet.open(task.data), read_page(task.task) if task.task else None
    prepared = (read_prepared(Path(task.data)) if page else None) or {}
    prompts, contents = task.prompts(test_set), task.contents()
    options = {name: value for name, value in task.made_by.items() if name not in ("data", "templates", "image_size")}
    return {
        "task": task.name,
        "kind": task.kind,
        "options": options,
        "data": {
            "name": page.name if page else data_name(task.data),
            "repo": page.source.repo if page and not page.source.captions else None,
            "split": page.source.split if page else None,
            "revision": prepared.get("revision") or (page.source.revision if page else None),
            "images": len(test_set),
            "digest": _set_digest(test_set),
        },
        "other_sets": [_set_digest(other) for other in task.other_sets()],
        **({"contents": _digest(contents)} if contents else {}),
        "prompts": {"number": len(prompts), "digest": _digest(prompts)} if prompts else None,
        "image_size": embedder.at(task.image_size).image_size,
        "crop": embedder.crop,
        "mask": dict(embedder.mask),
        **({} if embedder.dims is None else {"dims": embedder.dims}),
        "precision": {"no": "fp32"}.get(*[embedder.accelerator.mixed_precision] * 2),
    }


def _about(task: Task, setting: Record, model: str, weights: str, seconds: float) -> Record:
    page = read_page(task.task) if task.task else None
    packages = [*_PACKAGES, *(["open_clip"] if model.startswith("open_clip:") else [])]
    return {
        "model": model,
        "weights": weights,
        "page": page.name if page else None,
        "title": page.title if page else None,
        **{name: setting[name] for name in ("data", "prompts", "image_size", "crop", "mask", "precision")},
        "dims": setting.get("dims"),
        "versions": {package: sys.modules[package].__version__ for package in packages},
        "seconds": round(seconds, 3),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _published(result: Result) -> Result:
    """Return a result for lines: data named without a path, and no list of prompts."""
    kept = {n: v for n, v in result.made_by.items() if n != "templates" or isinstance(v, str)}
    places = {n: data_name(kept[n]) for n in ("data", "train", "validation", "memory") if kept.get(n)}
    return replace(result, made_by={**kept, **places})


def data_name(place: str) -> str:
    """Return the common name of a data set: the last folder or file of its path or URL."""
    place = re.sub(r"^.*://([^/]*@)?", "", without_secrets(place))
    parts = [part for part in place.split("/") if part and not re.search(r"[*{]|\.tar$", part)]
    return "/".join(parts[-2:] if parts[-1:] and parts[-1] in _SPLITS else parts[-1:]) or place


def _set_digest(test_set: TestSet) -> str:
    """Return a digest of a test set: all bytes of its shards, whose times a copy may keep. Shards at a URL count by
    their names and sizes."""
    manifest, contents = test_set.source.manifest, []
    if "://" not in test_set.data:
        for shard in range(len(manifest)):
            with open(test_set.source.shard_name(shard), "rb") as file:
                contents.append(hashlib.file_digest(file, "blake2b").hexdigest())
    names = map(os.path.basename, manifest.names)
    shards = [list(names), manifest.sizes[:, :2].tolist(), contents]
    return _digest([shards, [read_text(test_set.data, name) for name in (CLASS_NAMES, TEMPLATES)]])


def _digest(content: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(content), sort_keys=True).encode()).hexdigest()[:16]
