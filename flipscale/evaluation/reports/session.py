"""The evaluation of one model: known results are read from its `results.jsonl`, missing tasks are run and appended."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.reports.models import NamedModel
from flipscale.evaluation.reports.record import (
    Line,
    about,
    append_lines,
    drop_torn,
    group_of,
    published,
    read_lines,
    setting_of,
    weights_digest,
)
from flipscale.evaluation.results import Result
from flipscale.evaluation.suite import evaluated
from flipscale.evaluation.test_set import TestSet
from flipscale.io.progress import Progress

_log = logging.getLogger(__name__)


def evaluate_model(embedder: Embedder, model: NamedModel, tasks: Sequence[Task]) -> list[Line]:
    """Collective. Return the lines of all tasks in their order, on the main process; an empty list on others.

    A task's lines are on disk before the next task ends. Only the main process reads and writes them."""
    from accelerate.utils import broadcast_object_list

    is_main = embedder.accelerator.is_main_process
    session = _Session(embedder, model, tasks) if is_main else None
    # The main process decides which tasks are missing.
    (missing,) = broadcast_object_list([session.missing if session else None])
    if not missing:
        return session.lines() if session else []
    left = [tasks[number] for number in missing]
    total = _num_images(left) if is_main else None
    with Progress(total, f"evaluating {model.name}", "images", leave=False, hidden=not is_main) as bar:
        started = time.monotonic()
        for number, (_, results) in zip(missing, evaluated(replace(embedder, progress=bar.update), left), strict=True):
            if session:
                session.write(number, results, time.monotonic() - started)
            started = time.monotonic()
    return session.lines() if session else []


def _num_images(tasks: Sequence[Task]) -> int:
    """Return the number of images to embed. Consecutive tasks of the same data and image size share one pass."""
    sets = [(task.data, task.image_size) for task in tasks]
    passes = [one for one, before in zip(sets, [None, *sets], strict=False) if one != before]
    return sum(len(TestSet.open(data).source) for data, _ in passes)


class _Session:
    def __init__(self, embedder: Embedder, model: NamedModel, tasks: Sequence[Task]):
        self._model, self._tasks = model, tasks
        weights = embedder.model.state_dict()
        self._weights = weights_digest(weights, weights.__getitem__)
        self._settings = [setting_of(embedder, task) for task in tasks]
        self._groups = [group_of(self._weights, setting) for setting in self._settings]
        drop_torn(model.lines)
        self._known: dict[str, list[Line]] = {}
        for line in read_lines(model.lines):
            self._known.setdefault(line.about["group"], []).append(line)
        self.missing = [number for number, group in enumerate(self._groups) if group not in self._known]
        known, total = len(tasks) - len(self.missing), len(tasks)
        if known:
            _log.info("%s: %d of %d tasks are in %s and are not run again", model.name, known, total, model.lines)

    def write(self, number: int, results: Sequence[Result], seconds: float) -> None:
        task, setting, group = self._tasks[number], self._settings[number], self._groups[number]
        facts = about(task, setting, self._model.name, self._weights, seconds)
        self._known[group] = append_lines(self._model.lines, group, [published(result) for result in results], facts)
        shown = next((result for result in results if result.headline), results[0])
        _log.info("%s: %s %s %s, %.0f s", self._model.name, shown.task, shown.shown, shown.estimate_text, seconds)

    def lines(self) -> list[Line]:
        return [line for group in self._groups for line in self._known[group]]
