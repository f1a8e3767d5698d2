"""Typed results of evaluations, and `results.jsonl` of a run: a result a line."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flipscale.evaluation.intervals import Z95
from flipscale.io import json_lines
from flipscale.io.errors import UserError
from flipscale.io.json_lines import PLACE

RESULTS_FILE = "results.jsonl"
_RESULT = {
    **dict.fromkeys(("task", "kind", "metric"), str),
    **dict.fromkeys(("label", "unit", "who", "test", "outcomes"), str | None),
    **dict.fromkeys(("low", "high", "chance"), int | float | None),
    "value": int | float,
    "n": int | None,
}
THIS_MODEL = "this model"
# `Result.who` for the weights that a run started from.
BEFORE = "the model before"
# `Result.who` for the difference between a run's model and those weights.
CHANGES = WON, LOST, UNCLEAR = ("won", "lost", "no clear change")
CHANGED = """The model before is the one that the training began with. The interval of a change in top-1 is that of
paired answers. Other intervals treat the two figures as independent. They are of the same images, so these intervals
are wider than necessary."""
POINTS = "points"  # unit of differences between percentages
NOTHING = "-"  # table cell without a measurement


@dataclass(frozen=True)
class Result:
    """One number from an evaluation.

    Args:
        metric: name of the number in `metrics.jsonl`, after `task/`.
        n: number of queries (images, captions) in the mean; None if unknown.
        low: lower end of the 95 % interval, in `unit`; None without an interval.
        label: name of the metric in tables; derived from `metric` by default.
        chance: value of a guess, in `unit`; None if unknown.
        who: the evaluated model if it is not this model: name of a baseline, `BEFORE`, or one of `CHANGES`.
        made_by: task fields that the number depends on: its `data` and its options.
        test: digest of the test, its images, answers and options; empty if unknown.
        outcomes: a bit for each query, 1 for a right answer, in hexadecimal digits; empty if unknown.
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
    test: str = ""
    outcomes: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        return f"{self.task}/{self.metric}"

    @property
    def is_certain(self) -> bool:
        """Whether any model reaches 100 %, as in the top-5 of five classes. Tables leave such a result out."""
        return self.unit == "%" and self.chance is not None and self.chance >= 100.0

    @property
    def shown(self) -> str:
        """Name of the metric in tables: `top-1`, `text to image R@1`."""
        words = self.metric.replace("_", " ")
        return self.label or re.sub(r"(?<= )r(\d+)$", r"R@\1", re.sub(r"^top(\d+)$", r"top-\1", words))

    @property
    def shown_with_unit(self) -> str:
        return ", ".join(filter(None, (self.shown, self.unit)))

    @property
    def value_text(self) -> str:
        """Value with its unit: `47.1 %`."""
        return with_unit(self.value, self.unit)

    @property
    def interval_text(self) -> str:
        """95 % interval without a unit, `44.0 to 50.2`; empty without an interval."""
        if self.low is None or self.high is None or not math.isfinite(self.value):
            return ""
        low, high = (with_unit(end, self.unit).removesuffix(self.unit).strip() for end in (self.low, self.high))
        return f"{low} to {high}"

    @property
    def estimate_text(self) -> str:
        """Value with its interval: `47.1 % (44.0 to 50.2)`."""
        return self.value_text + (f" ({self.interval_text})" if self.interval_text else "")


@dataclass(frozen=True)
class Measured:
    """A result, and the point of the run at which it was measured."""

    result: Result
    step: int
    samples_seen: int
    trained_seconds: float


def with_unit(value: float, unit: str) -> str:
    """Return a value for tables. Percentages and points have one decimal above 1, points have a sign, other numbers
    have about three digits. A number that is not finite, such as a mean over no query, is a dash."""
    if not math.isfinite(value):
        return NOTHING
    size, is_share = abs(value), unit in ("%", POINTS)
    digits = (2 if is_share else 3) if size < 1 else 1 if is_share else 2 if size < 100 else 0
    sign = "+" if unit == POINTS else ""
    return f"{value:{sign},.{digits}f} {unit}".rstrip()


def as_metrics(results: Iterable[Result]) -> dict[str, float]:
    """Return the results for `metrics.jsonl` and the trackers: `task/metric`, and the first chance as `task/chance`."""
    metrics: dict[str, float] = {}
    for result in results:
        metrics[result.name] = result.value
        if result.chance is not None:
            metrics.setdefault(f"{result.task}/chance", result.chance)
    return metrics


def append_results(run_dir: Path, results: Iterable[Result], step: int, samples: int, seconds: float) -> None:
    place = {"step": step, "samples_seen": samples, "trained_seconds": seconds}
    json_lines.append(run_dir / RESULTS_FILE, ({**place, **dataclasses.asdict(result)} for result in results))


def drop_results_after(run_dir: Path, step: int) -> None:
    """Drop the results of later steps, because a resumed run measures them again."""
    path = run_dir / RESULTS_FILE
    if path.exists():
        json_lines.rewrite(path, (line for line in _result_lines(run_dir) if line["step"] <= step))


def read_results(run_dir: Path) -> list[Measured]:
    measured = [Measured(_result(line), *(line[name] for name in PLACE)) for line in _result_lines(run_dir)]
    return sorted(measured, key=lambda one: one.step)


def read_baselines(file: Path) -> list[Result]:
    """Return the results in a file of JSON lines. Raise UserError unless each line is one, and not of a run's model."""
    results = [_result(line) for line in json_lines.read(file, **_RESULT)]
    others = [result for result in results if result.who not in (THIS_MODEL, BEFORE, *CHANGES)]
    if not others or len(others) < sum(map(bool, map(bytes.strip, file.read_bytes().splitlines()))):
        raise UserError(
            f"--baselines is {file}; expected a file with a result of a baseline on each line. Write it with "
            "examples/demo/baselines.py"
        )
    return others


def _result(line: dict[str, Any]) -> Result:
    known = {f.name for f in dataclasses.fields(Result)}
    return Result(**{name: value for name, value in line.items() if name in known and value is not None})


def _result_lines(run_dir: Path) -> list[dict[str, Any]]:
    return json_lines.read(run_dir / RESULTS_FILE, **PLACE, **_RESULT)


def latest(measured: Sequence[Measured]) -> list[Result]:
    """Return the last result of each task, metric and model or baseline, in the order of their first."""
    return list({(m.result.task, m.result.metric, m.result.who): m.result for m in measured}.values())


def change_of(result: Result, old: Result) -> Result:
    """Return the difference of two figures of one test. Its `who` is one of `CHANGES`.

    The interval is that of paired answers (`_paired`) if both figures have outcomes. Otherwise it treats the two
    figures as independent (Zou and Donner, Statistics in Medicine 27, 2008; for two Wilson intervals it is
    Newcombe's)."""
    value, low, high, who = result.value - old.value, None, None, UNCLEAR
    if paired := _paired(result, old):
        low, high = paired
    elif old.low is not None and old.high is not None and result.low is not None and result.high is not None:
        low = value - math.hypot(result.value - result.low, old.high - old.value)
        high = value + math.hypot(result.high - result.value, old.value - old.low)
    if low is not None and high is not None and (low > 0 or high < 0):
        who = WON if (value > 0) == result.higher_is_better else LOST
    unit = POINTS if result.unit == "%" else result.unit
    return dataclasses.replace(result, value=value, low=low, high=high, unit=unit, who=who, chance=None, outcomes="")


def _paired(result: Result, old: Result) -> tuple[float, float] | None:
    """Return the 95 % interval of the difference of two shares of the same queries, in percent; None without outcomes.

    Each cell of the table of both answers has half a query more (Agresti and Min, Statistics in Medicine 24, 2005). So
    the interval has a width even if no answer changed."""
    if not (result.outcomes and old.outcomes) or (result.n, len(result.outcomes)) != (old.n, len(old.outcomes)):
        return None
    try:
        new_bits, old_bits = int(result.outcomes, 16), int(old.outcomes, 16)
    except ValueError:  # an editor's digits
        return None
    gained, lost, n = (new_bits & ~old_bits).bit_count(), (old_bits & ~new_bits).bit_count(), (result.n or 0) + 2
    mean = (gained - lost) / n
    half = Z95 * math.sqrt(((gained + lost + 1) / n - mean**2) / n)
    return 100 * (mean - half), 100 * (mean + half)


def with_changes(results: Sequence[Result]) -> list[Result]:
    """Return the uncertain results, each followed by the same before the training, if measured, and by the change."""
    results = [result for result in results if not result.is_certain]
    before = {result.name: result for result in results if result.who == BEFORE}
    changed = []
    for result in results:
        # The test set may be another one since a resume.
        if result.who == THIS_MODEL and result.name in before and before[result.name].test == result.test:
            old = before.pop(result.name)
            changed += [result, old, change_of(result, old)]
        elif result.who != BEFORE:
            changed.append(result)
    return [*changed, *before.values()]
