"""What the figures of a task depend on beside the weights, and where they come from, without a path of this machine."""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flipscale.data.prepared import read_prepared
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.results import Result
from flipscale.evaluation.task_page import TaskPage, read_page
from flipscale.evaluation.test_set import CLASS_NAMES, TEMPLATES, TestSet, read_text

_SPLITS = ("train", "test", "val", "validation")  # which say nothing without the folder above them
_PACKAGES = ("flipscale", "torch", "transformers", "open_clip")


def data_name(place: str) -> str:
    """Return what people call a data set: the last folder or file of the path or URL, without the way to it."""
    place = re.sub(r"^.*://([^/]*@)?", "", place.split("?")[0])
    parts = [part for part in place.split("/") if part and not re.search(r"[*{]|\.tar$", part)]
    return "/".join(parts[-2:] if parts[-1:] and parts[-1] in _SPLITS else parts[-1:]) or place


def page_of(task: Task) -> TaskPage | None:
    """Return the page that a task comes from, if it has one."""
    return read_page(task.task) if task.task else None


def setting_of(embedder: Embedder, task: Task) -> dict[str, Any]:
    """Return what the figures of a task depend on: its options, data, prompts, and what the embedder does to images.

    Batch size, workers and the number of processes are not among it, as no figure depends on them.
    """
    test_set = TestSet.open(task.data)
    prompts = task.prompts(test_set)
    options = {name: value for name, value in task.made_by.items() if name not in ("data", "templates", "image_size")}
    return {
        "task": task.name,
        "kind": task.kind,
        "options": options,
        "data": _data_of(task, test_set),
        "other_sets": [_set_digest(other, other.data) for other in task.other_sets()],
        "prompts": {"number": len(prompts), "digest": _digest(prompts)} if prompts else None,
        "image_size": embedder.at(task.image_size).image_size,
        "mask": dict(embedder.mask),
        "precision": {"no": "fp32"}.get(*[embedder.accelerator.mixed_precision] * 2),
    }


def about(task: Task, setting: dict[str, Any], model: str, weights: str, seconds: float) -> dict[str, Any]:
    """Return what the lines of a task say beside its results."""
    page = page_of(task)
    return {
        "model": model,
        "weights": weights,
        "page": page.name if page else None,
        "title": page.title if page else None,
        **{name: setting[name] for name in ("data", "prompts", "image_size", "mask", "precision")},
        "versions": _versions(model),
        "seconds": round(seconds, 3),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def published(result: Result) -> Result:
    """Return a result as lines have it: the data without the way to it, and no list of prompts."""
    kept = {n: v for n, v in result.made_by.items() if n != "templates" or isinstance(v, str)}
    places = {n: data_name(kept[n]) for n in ("data", "train", "validation") if kept.get(n)}
    return replace(result, made_by={**kept, **places})


def _data_of(task: Task, test_set: TestSet) -> dict[str, Any]:
    """Return what is known of a task's data: its name, size and digest; of a prepared task also repository, revision
    and split."""
    data, page = task.data, page_of(task)
    prepared = (read_prepared(Path(data)) if page else None) or {}
    return {
        "name": page.name if page else data_name(data),
        "repo": page.source.repo if page else None,
        "split": page.source.split if page else None,
        "revision": prepared.get("revision") or (page.source.revision if page else None),
        "images": len(test_set),
        "digest": _set_digest(test_set, data),
    }


def _set_digest(test_set: TestSet, data: str) -> str:
    """Return a digest of a set's shards, by their names and sizes, and of its texts."""
    manifest = test_set.source.manifest
    shards = [
        [os.path.basename(name), *map(int, row)]
        for name, row in zip(manifest.all_names(), manifest.table[["samples", "num_bytes"]].tolist(), strict=True)
    ]
    return _digest([shards, [read_text(data, name) for name in (CLASS_NAMES, TEMPLATES)]])


def _digest(content: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(content)).encode()).hexdigest()[:16]


def _versions(model: str) -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        if package == "open_clip" and not model.startswith("open_clip:"):
            continue
        try:
            found[package] = getattr(sys.modules.get(package), "__version__", None) or version(package)
        except PackageNotFoundError:
            continue
    return found
