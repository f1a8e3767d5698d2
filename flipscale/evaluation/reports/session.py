"""The evaluation of one model: what stands in its `results.jsonl` is taken from there, the rest is done and written."""

import logging
import time
from collections.abc import Sequence

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.reports.models import NamedModel
from flipscale.evaluation.reports.progress import SuiteBar
from flipscale.evaluation.reports.record import (
    Line,
    append_lines,
    drop_torn,
    group_of,
    read_lines,
    weights_digest,
)
from flipscale.evaluation.reports.setting import about, published, setting_of
from flipscale.evaluation.results import Result
from flipscale.evaluation.suite import evaluated

_log = logging.getLogger(__name__)


def evaluate_model(embedder: Embedder, model: NamedModel, tasks: Sequence[Task]) -> list[Line]:
    """Collective. Return the lines of all tasks in their order, on the main process; others get none.

    Each task's lines are on disk before the next task ends. Only the main process reads and writes them.

    Raises:
        ValueError: a test set is not as its task needs it, or the file of lines is not ours.
        OSError: the lines cannot be written.
    """
    from accelerate.utils import broadcast_object_list

    work = _Work(embedder, model, tasks) if embedder.accelerator.is_main_process else None
    # One process decides what is left to do, and the others follow.
    (missing,) = broadcast_object_list([work.missing if work else None])
    if not missing:
        return work.lines() if work else []
    left = [tasks[number] for number in missing]
    with SuiteBar(embedder, model.name, left) as bar:
        started = time.monotonic()
        for done, (_, results) in enumerate(evaluated(bar.embedder, left)):
            if work:
                work.write(missing[done], results, time.monotonic() - started)
            bar.finish(done)
            started = time.monotonic()
    return work.lines() if work else []


class _Work:
    """What the main process knows of a model's evaluation."""

    def __init__(self, embedder: Embedder, model: NamedModel, tasks: Sequence[Task]):
        self._model, self._tasks = model, tasks
        weights = embedder.model.state_dict()
        self._weights = weights_digest(weights, weights.__getitem__)
        self._settings = [setting_of(embedder, task) for task in tasks]
        self._groups = [group_of(self._weights, setting) for setting in self._settings]
        drop_torn(model.lines)
        self._found: dict[str, list[Line]] = {}
        for line in read_lines(model.lines):
            self._found.setdefault(line.about["group"], []).append(line)
        self.missing = [number for number, group in enumerate(self._groups) if group not in self._found]
        known, total = len(tasks) - len(self.missing), len(tasks)
        if known:
            _log.info("%s: %d of %d tasks stand in %s and are not run again", model.name, known, total, model.lines)

    def write(self, number: int, results: Sequence[Result], seconds: float) -> None:
        """Write the lines of a task, and say its headline."""
        task, setting, group = self._tasks[number], self._settings[number], self._groups[number]
        facts = about(task, setting, self._model.name, self._weights, seconds)
        self._found[group] = append_lines(self._model.lines, group, [published(result) for result in results], facts)
        shown = next((result for result in results if result.headline), results[0])
        _log.info("%s: %s %s %s, %.0f s", self._model.name, shown.task, shown.shown, shown.estimate_text, seconds)

    def lines(self) -> list[Line]:
        """Return all lines, in the order of the tasks."""
        return [line for group in self._groups for line in self._found[group]]
