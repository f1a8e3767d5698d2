"""The effects of a study's axes: on each task, together beyond their sum, and beyond what another task predicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import expit, logit

from flipscale.evaluation.intervals import mean_of
from flipscale.evaluation.results import NOTHING
from flipscale.io.errors import UserError
from flipscale.io.text_table import escape_markdown, markdown_table


@dataclass(frozen=True)
class Arm:
    """One configuration of a study and its results.

    Args:
        levels: changed levels by axis; empty for the base.
        results: results by task and seed.
    """

    levels: Mapping[str, str]
    results: Mapping[str, Mapping[int, float]]

    @property
    def label(self) -> str:
        """Name in tables, such as `model: h14 + data: 2B`."""
        return " + ".join(f"{axis}: {level}" for axis, level in self.levels.items())


class Effect(NamedTuple):
    """A mean difference over the common seeds of runs, with its 95 % interval by Student's t; without for one seed."""

    mean: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Effect":
        """Return the effect of differences, one for each seed."""
        return cls(values[0]) if len(values) == 1 else cls(*mean_of(values))

    def __str__(self) -> str:
        """Return `+3.3 (+2.9 to +3.7)`."""
        between = "" if self.low is None else f" ({self.low:+.1f} to {self.high:+.1f})"
        return f"{self.mean:+.1f}{between}"


# Effects by the arm's label and by task.
EffectTable = dict[str, dict[str, Effect]]
# Arms with the factors of their results in a sum.
Terms = list[tuple[int, Arm]]


def _tasks(arms: Sequence[Arm]) -> list[str]:
    return list(dict.fromkeys(task for arm in arms for task in arm.results))


def tasks_moved(rows: EffectTable, arms: Sequence[Arm]) -> list[str]:
    """Return the tasks with an effect in a table, in the order of the arms."""
    return [task for task in _tasks(arms) if any(task in row for row in rows.values())]


def effects(arms: Sequence[Arm]) -> EffectTable:
    """Return the effect of each level alone against the base."""
    base = _base(arms)
    return {arm.label: _sums([(1, arm), (-1, base)]) for arm in arms if len(arm.levels) == 1}


def interactions(arms: Sequence[Arm]) -> EffectTable:
    """Return the effect of each combination of levels beyond the sum of their effects alone."""
    base = _base(arms)
    alone = {next(iter(arm.levels.items())): arm for arm in arms if len(arm.levels) == 1}
    table = {}
    for arm in arms:
        if len(arm.levels) > 1 and set(arm.levels.items()) <= alone.keys():
            singles: Terms = [(-1, alone[level]) for level in arm.levels.items()]
            table[arm.label] = _sums([(1, arm), *singles, (len(singles) - 1, base)])
    return table


def beyond(arms: Sequence[Arm], reference: str) -> EffectTable:
    """Return the effect of each arm on each other task, beyond the prediction from the reference task.

    The prediction is a line between the logits of the two tasks, fitted to all runs. Tasks with values outside
    (0, 100) or with fewer than four runs are left out.
    """
    left: list[dict[str, dict[int, float]]] = [{} for _ in arms]  # residuals of each arm by task and seed
    for task in (task for task in _tasks(arms) if task != reference):
        pairs = []
        for arm in arms:
            known, own = arm.results.get(reference, {}), arm.results.get(task, {})
            pairs.append({seed: (known[seed], own[seed]) for seed in own if seed in known})
        xy = np.array([pair for by_seed in pairs for pair in by_seed.values()]).reshape(-1, 2)
        # A line needs its two parameters + 2.
        if len(xy) < 4 or not ((xy > 0) & (xy < 100)).all() or np.ptp(xy[:, 0]) == 0:
            continue
        line = np.polyfit(logit(xy[:, 0] / 100), logit(xy[:, 1] / 100), 1)
        for residuals, by_seed in zip(left, pairs, strict=True):
            predicted = {seed: 100 * float(expit(np.polyval(line, logit(x / 100)))) for seed, (x, _) in by_seed.items()}
            residuals[task] = {seed: y - predicted[seed] for seed, (_, y) in by_seed.items()}
    others = [Arm(arm.levels, residuals) for arm, residuals in zip(arms, left, strict=True)]
    base = _base(others)
    table = {arm.label: _sums([(1, arm), (-1, base)]) for arm in others if arm.levels}
    return {label: row for label, row in table.items() if row}


def _base(arms: Sequence[Arm]) -> Arm:
    for arm in arms:
        if not arm.levels:
            return arm
    raise UserError("no run of the base is finished, and effects are measured against it; train it")


def _sums(terms: Terms) -> dict[str, Effect]:
    """Return the weighted sum of arms' results for each task, over their common seeds; not without a common seed."""
    row = {}
    for task in terms[0][1].results:
        seeds = set.intersection(*(set(arm.results.get(task, {})) for _, arm in terms))
        values = [float(sum(factor * arm.results[task][seed] for factor, arm in terms)) for seed in sorted(seeds)]
        if values:
            row[task] = Effect.of(values)
    return row


def transfer_report(arms: Sequence[Arm], reference: str) -> str:
    """Return the effects of all axes as Markdown. The task `reference` predicts the others."""
    alone, together, more = effects(arms), interactions(arms), beyond(arms, reference)
    seeds = (
        "Intervals are of 95 %, over seeds."
        if any(effect.low is not None for row in alone.values() for effect in row.values())
        else "One seed a run, so there are no intervals: small effects may come from the seed."
    )
    parts = [f"# Effects of each axis\n\nPoints against the base, one axis changed. {seeds}"]
    tasks = tasks_moved(alone, arms)
    if not tasks:
        return f"{parts[0]}\n\nNo level alone has a result that the base has too, so there are no effects.\n"
    parts.append(_table(alone, tasks))
    if left_out := [task for task in _tasks(arms) if task not in tasks]:
        parts.append(f"No result of the base to compare with: {', '.join(map(escape_markdown, left_out))}.")
    if together:
        parts += [
            "## Together beyond the sum\n\nThe effect of axes together, less the sum of their effects alone.",
            _table(together, tasks),
        ]
    if more:
        parts += [
            f"## Beyond the prediction of {escape_markdown(reference)}\n\nPoints against the base, less the points "
            "predicted from that task by a line between the logits of the two, fitted to all runs.",
            _table(more, tasks_moved(more, arms)),
        ]
    return "\n\n".join(parts) + "\n"


def _table(rows: EffectTable, tasks: Sequence[str]) -> str:
    lines = [[escape_markdown(label), *(str(row.get(task, NOTHING)) for task in tasks)] for label, row in rows.items()]
    return markdown_table([["", *map(escape_markdown, tasks)], *lines], 1)
