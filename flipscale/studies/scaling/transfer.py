"""What each axis of a study moves: its effect on each task, what axes do together, and what moves a task beyond what
another task predicts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flipscale.evaluation.intervals import mean_of
from flipscale.io.errors import UserError

# Runs that a line takes: its two parameters + 2.
_LEAST_RUNS = 4


@dataclass(frozen=True)
class Arm:
    """One configuration of a study and what its runs achieve.

    Args:
        levels: of the axes that are not at their base, by the axis; empty for the base itself.
        results: of each task, by the seed.
    """

    levels: Mapping[str, str]
    results: Mapping[str, Mapping[int, float]]

    @property
    def label(self) -> str:
        """`model: h14`, of several axes with ` + ` between them."""
        return " + ".join(f"{axis}: {level}" for axis, level in self.levels.items()) or "base"


@dataclass(frozen=True)
class Effect:
    """A difference, as a mean over seeds.

    Args:
        mean: of the seeds that all the runs have.
        low, high: ends of the 95 % interval over seeds, by Student's t; None where there is one seed.
    """

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def text(self) -> str:
        """`+3.3 (+2.9 to +3.7)`."""
        between = "" if self.low is None else f" ({self.low:+.1f} to {self.high:+.1f})"
        return f"{self.mean:+.1f}{between}"


Table = dict[str, dict[str, Effect]]


def tasks_of(arms: Sequence[Arm]) -> list[str]:
    """Return the names of the tasks that any arm has, in their order."""
    return list(dict.fromkeys(task for arm in arms for task in arm.results))


def tasks_moved(rows: Table, arms: Sequence[Arm]) -> list[str]:
    """Return the names of the tasks of which a table has an effect, in the order of `tasks_of`."""
    return [task for task in tasks_of(arms) if any(task in row for row in rows.values())]


def effects(arms: Sequence[Arm]) -> Table:
    """Return what each level of each axis adds to the base, alone: by the arm's label, then by the task."""
    base = _base(arms)
    return _rows([arm for arm in arms if len(arm.levels) == 1], arms, lambda arm: [(1, arm), (-1, base)])


def interactions(arms: Sequence[Arm]) -> Table:
    """Return what each combination of levels adds beyond the sum of what they add alone, where all of these are there:
    by the arm's label, then by the task."""
    base = _base(arms)
    alone = {next(iter(arm.levels.items())): arm for arm in arms if len(arm.levels) == 1}
    together = [arm for arm in arms if len(arm.levels) > 1 and set(arm.levels.items()) <= alone.keys()]

    def parts(arm: Arm) -> list[tuple[int, Arm]]:
        singles = [(-1, alone[level]) for level in arm.levels.items()]
        return [(1, arm), *singles, (len(singles) - 1, base)]

    return _rows(together, arms, parts)


def beyond(arms: Sequence[Arm], reference: str) -> Table:
    """Return how much more each arm moves each other task than the reference does: the effect less that of a line
    between the logits of the two, fitted over all runs. Tasks that are no percentages between 0 and 100 are left out,
    and so are those of fewer than four runs.

    Args:
        reference: a task, such as zero-shot classification.
    """
    found: Table = {}
    base = _base(arms)
    for task in (task for task in tasks_of(arms) if task != reference):
        pairs = [
            (arm.results[reference][seed], value)
            for arm in arms
            for seed, value in arm.results.get(task, {}).items()
            if seed in arm.results.get(reference, {})
        ]
        xy = np.array(pairs).reshape(-1, 2)
        if len(xy) < _LEAST_RUNS or not ((xy > 0) & (xy < 100)).all() or np.ptp(xy[:, 0]) == 0:
            continue
        line = np.polyfit(_logit(xy[:, 0]), _logit(xy[:, 1]), 1)

        def residuals(arm: Arm, task: str = task, line: np.ndarray = line) -> Arm:
            its, others = arm.results.get(reference, {}), arm.results.get(task, {})
            at = {seed: np.polyval(line, _logit(its[seed])) for seed in others if seed in its}
            left = {seed: others[seed] - float(100 / (1 + np.exp(-place))) for seed, place in at.items()}
            return Arm(arm.levels, {task: left})

        zero = residuals(base)
        for arm in map(residuals, (arm for arm in arms if arm.levels)):
            if (effect := _combined([(1, arm), (-1, zero)], task)) is not None:
                found.setdefault(arm.label, {})[task] = effect
    return found


def _logit(percent: np.ndarray | float) -> np.ndarray:
    share = np.asarray(percent) / 100
    return np.log(share / (1 - share))


def _base(arms: Sequence[Arm]) -> Arm:
    """Return the arm of which nothing is changed.

    Raises:
        ValueError: there is none.
    """
    for arm in arms:
        if not arm.levels:
            return arm
    raise UserError("no run of the base is finished, which effects are told against; train it")


def _rows(shown: Sequence[Arm], arms: Sequence[Arm], parts: Callable[[Arm], list[tuple[int, Arm]]]) -> Table:
    rows: Table = {}
    for arm in shown:
        cells = {task: _combined(parts(arm), task) for task in tasks_of(arms)}
        rows[arm.label] = {task: effect for task, effect in cells.items() if effect is not None}
    return rows


def _combined(parts: Sequence[tuple[int, Arm]], task: str) -> Effect | None:
    """Return a sum of arms' results of a task, each times its factor, over the seeds that all have; None if they have
    none in common."""
    results = [arm.results.get(task, {}) for _, arm in parts]
    seeds = set.intersection(*map(set, results))
    if not seeds:
        return None
    sums = np.array([sum(f * its[s] for (f, _), its in zip(parts, results, strict=True)) for s in sorted(seeds)])
    if len(sums) == 1:
        return Effect(float(sums[0]))
    return Effect(*mean_of(sums.tolist()))
