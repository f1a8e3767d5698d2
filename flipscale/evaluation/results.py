"""What evaluations found: typed results with their number of queries and interval, and `results.jsonl`, a line each."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flipscale.io import json_lines
from flipscale.io.yaml_text import read_saved_recipe

RESULTS_FILE = "results.jsonl"
# What every record of a run says of its place in the run.
_PLACE = ("step", "samples_seen", "trained_seconds")
THIS_MODEL = "this model"
# Whose results a run has that was given weights to start from.
BEFORE = "the model before"
# What a run changed: the words for a result of `with_changes`, which has no model of its own.
CHANGES = WON, LOST, UNCLEAR = ("won", "lost", "no clear change")
CHANGED = """The model before is the one that the training began with. The interval of what is won or lost takes the two
figures for independent: of the same images, it is wider than it need be."""
# The unit of differences between percentages.
POINTS = "points"
# What tables have where nothing was measured.
NOTHING = "-"
# Metrics that short tables showed before a result said so itself.
_HEADLINES_WITHOUT_LINES = ("top1", "top5", "text_to_image_r1")


@dataclass(frozen=True)
class Result:
    """One number that an evaluation found.

    Args:
        task: the evaluation's name in the recipe.
        kind: the evaluation's kind, such as `zero_shot`.
        metric: the number's name in `metrics.jsonl`, after `task/`.
        value: in `unit`.
        n: how many queries (images, captions) it is a mean over; None where that was not recorded.
        low: lower end of the 95 % interval, in `unit`; None where there is none.
        high: upper end of it.
        unit: `%`, or any other; empty for a plain number.
        label: what tables call the metric; derived from `metric` where it is left out.
        chance: what guessing achieves, in `unit`; None where that is unknown.
        higher_is_better: the direction in which the number improves.
        headline: whether short tables and the figures show it.
        who: what was evaluated, when that is not the model: a baseline's name, or `BEFORE`; or one of `CHANGES`.
        made_by: the task's fields that the number depends on: its `data` and its options.
    """

    task: str
    kind: str
    metric: str
    value: float
    n: int | None = None
    low: float | None = None
    high: float | None = None
    unit: str = "%"
    label: str = ""
    chance: float | None = None
    higher_is_better: bool = True
    headline: bool = True
    who: str = THIS_MODEL
    made_by: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The result's name in `metrics.jsonl`: `task/metric`."""
        return f"{self.task}/{self.metric}"

    @property
    def shown(self) -> str:
        """What tables call the metric: `top-1`, `text to image R@1`."""
        words = self.metric.replace("_", " ")
        return self.label or re.sub(r"(?<= )r(\d+)$", r"R@\1", re.sub(r"^top(\d+)$", r"top-\1", words))

    @property
    def value_text(self) -> str:
        """The value with its unit: `47.1 %`."""
        return with_unit(self.value, self.unit)

    @property
    def interval_text(self) -> str:
        """The 95 % interval without a unit, `44.0 to 50.2`; empty where there is none."""
        if self.low is None or self.high is None or not math.isfinite(self.value):
            return ""
        low, high = (with_unit(end, self.unit).removesuffix(self.unit).strip() for end in (self.low, self.high))
        return f"{low} to {high}"

    @property
    def estimate_text(self) -> str:
        """The value with its interval, where there is one: `47.1 % (44.0 to 50.2)`."""
        return self.value_text + (f" ({self.interval_text})" if self.interval_text else "")


@dataclass(frozen=True)
class Measured:
    """A result, and the point of the run at which it was found."""

    result: Result
    step: int
    samples_seen: int
    trained_seconds: float


def with_unit(value: float, unit: str) -> str:
    """Return a value as tables show it: percent and points with one decimal above 1, points with their sign, other
    numbers with about three digits; a dash for one that is none, such as the mean over no query."""
    if not math.isfinite(value):
        return NOTHING
    size, is_share = abs(value), unit in ("%", POINTS)
    digits = (2 if is_share else 3) if size < 1 else 1 if is_share else 2 if size < 100 else 0
    sign = "+" if unit == POINTS else ""
    return f"{value:{sign},.{digits}f} {unit}".rstrip()


def as_metrics(results: Iterable[Result]) -> dict[str, float]:
    """Return the results as `metrics.jsonl` and the trackers have them: `task/metric`, and `task/chance` of the first
    of a task's that has one."""
    metrics: dict[str, float] = {}
    for result in results:
        metrics[result.name] = result.value
        if result.chance is not None:
            metrics.setdefault(f"{result.task}/chance", result.chance)
    return metrics


def append_results(
    run_dir: Path, results: Iterable[Result], step: int, samples_seen: int, trained_seconds: float
) -> None:
    """Append the results that were found at a step to the run's `results.jsonl`.

    Raises:
        OSError: the disk is full or not writable.
    """
    where = {"step": step, "samples_seen": samples_seen, "trained_seconds": trained_seconds}
    json_lines.append(run_dir / RESULTS_FILE, ({**where, **dataclasses.asdict(result)} for result in results))


def drop_results_after(run_dir: Path, step: int) -> None:
    """Drop the results of later steps, which a resumed run takes again."""
    path = run_dir / RESULTS_FILE
    if path.exists():
        json_lines.rewrite(path, (line for line in _result_lines(run_dir) if line["step"] <= step))


def _result_lines(run_dir: Path) -> list[dict[str, Any]]:
    return json_lines.read(run_dir / RESULTS_FILE, *_PLACE, "task", "kind", "metric", "value")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run's `metrics.jsonl` so far."""
    return json_lines.read(run_dir / "metrics.jsonl", *_PLACE)


def read_results(run_dir: Path) -> list[Measured]:
    """Return all results of a run in the order of steps.

    Metrics of `metrics.jsonl` that have no line in `results.jsonl` (runs of versions before it) are percentages without
    interval; their data is what the run's recipe names.
    """
    known = {f.name for f in dataclasses.fields(Result)}
    found = [
        Measured(
            Result(**{name: value for name, value in line.items() if name in known and value is not None}),
            *(line[name] for name in ("step", "samples_seen", "trained_seconds")),
        )
        for line in _result_lines(run_dir)
    ]
    lines = {(measured.step, measured.result.name) for measured in found}
    found += [old for old in _results_without_lines(run_dir) if (old.step, old.result.name) not in lines]
    return sorted(found, key=lambda measured: measured.step)


def latest(measured: Sequence[Measured]) -> list[Result]:
    """Return the last result of each task, metric and model or baseline, in the order of their first."""
    last = {(m.result.task, m.result.metric, m.result.who): m.result for m in measured}
    return list(last.values())


def with_changes(results: Sequence[Result]) -> list[Result]:
    """Return results, each that was also found of the model before the training followed by that and by the change,
    which `who` says in a word.

    The interval of a change takes the two figures for independent (Zou and Donner, Statistics in Medicine 27, 2008; of
    two Wilson intervals it is Newcombe's): of the same images it is wider than it need be.
    """
    before = {result.name: result for result in results if result.who == BEFORE}
    found = []
    for result in results:
        if result.who == THIS_MODEL and result.name in before:
            old = before.pop(result.name)
            found += [result, old, _change(old, result)]
        elif result.who != BEFORE:
            found.append(result)
    return [*found, *before.values()]


def _change(old: Result, new: Result) -> Result:
    """Return the difference of two results as one."""
    value, low, high, who = new.value - old.value, None, None, UNCLEAR
    if old.low is not None and old.high is not None and new.low is not None and new.high is not None:
        low = value - math.hypot(new.value - new.low, old.high - old.value)
        high = value + math.hypot(new.high - new.value, old.value - old.low)
        if low > 0 or high < 0:
            who = WON if (value > 0) == new.higher_is_better else LOST
    unit = POINTS if new.unit == "%" else new.unit
    return dataclasses.replace(new, value=value, low=low, high=high, unit=unit, chance=None, who=who)


def _results_without_lines(run_dir: Path) -> list[Measured]:
    """Return the results that a run's metrics have, whether or not they have lines too."""
    recipe_file = run_dir / "recipe.yaml"
    recipe = read_saved_recipe(recipe_file) if recipe_file.exists() else {}
    folders: dict[str, Any] = recipe.get("eval") or {}
    found = []
    for record in read_metrics(run_dir):
        for name in (name for name in record if "/" in name and isinstance(record[name], int | float)):
            task, _, metric = name.partition("/")
            if task == "replaced" or metric == "chance":
                continue
            task, metric, who = ("zero_shot", "top1", metric) if task == "baseline" else (task, metric, THIS_MODEL)
            result = Result(
                *(task, task, metric, record[name]),
                chance=record.get(f"{task}/chance") if (metric, who) == ("top1", THIS_MODEL) else None,
                headline=metric in _HEADLINES_WITHOUT_LINES,
                who=who,
                made_by={"data": folders[task]} if folders.get(task) else {},
            )
            found.append(Measured(result, record["step"], record["samples_seen"], record["trained_seconds"]))
    return found
