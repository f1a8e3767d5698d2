"""Figure of what a study's configurations end with: a panel for each headline, with intervals over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flipscale.evaluation.intervals import mean_of
from flipscale.evaluation.reports.figures import drawing_pyplot, save_figure
from flipscale.evaluation.results import Result
from flipscale.studies.scaling.figures import line_styles, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_COLUMNS = 3
# Between the first line's dots and the last's, of the way from one level to the next.
_SPREAD = 0.16
_CHANCE = "chance"
_CHANCE_STYLE: dict[str, Any] = {"color": "#888888", "linestyle": "--", "linewidth": 0.9, "zorder": 0}


@dataclass(frozen=True)
class Outcome:
    """What the finished runs of a configuration end with.

    Args:
        label: what tables call it.
        levels: its level of each axis of the study, by the axis.
        results: of each headline that it has, by its name, `task/metric`: one of each seed.
    """

    label: str
    levels: Mapping[str, str]
    results: Mapping[str, Sequence[Result]]


def draw_grid(outcomes: Sequence[Outcome], axes: Mapping[str, Sequence[str]], path: Path) -> None:
    """Draw the first headline of each task of a grid of two axes: against the levels of the last axis, a line for each
    level of the first.

    Args:
        axes: the levels of both axes, each axis' base first.
    """
    (axis, levels), (along, ticks) = axes.items()
    names = _first_headlines(outcomes)
    figure, places = _panels(len(names), (3.9, 3.2))
    styles = line_styles(len(levels), has_base=True)
    by_levels = {(outcome.levels[axis], outcome.levels[along]): outcome for outcome in outcomes}
    has_bars = False
    for place, name in zip(places, names, strict=True):
        for number, (level, style) in enumerate(zip(levels, styles, strict=True)):
            found = [by_levels.get((level, tick)) for tick in ticks]
            values, below, above = _estimates([outcome.results.get(name, ()) if outcome else () for outcome in found])
            at = np.arange(len(ticks)) + _SPREAD * (number / max(len(levels) - 1, 1) - 0.5)
            place.errorbar(
                *(at, values), yerr=(below, above), marker="o", markersize=4.5, capsize=2.5, elinewidth=1.1,
                label=f"{axis}: {level}", **style,
            )  # fmt: skip
            has_bars |= bool(np.isfinite(below).any())
        shown = _shown(outcomes, name)
        if shown.chance is not None:
            place.axhline(shown.chance, label=_CHANCE, **_CHANCE_STYLE)
        place.set_title(shown.task.replace("_", "-"), loc="left", fontsize=10)
        place.set_ylabel(_with_unit(shown))
        place.set_xticks(range(len(ticks)), ticks)
        place.set_xlim(-0.4, len(ticks) - 0.6)
        place.set_xlabel(along)
        if _is_never_negative(outcomes, name):
            place.set_ylim(bottom=0)
        tidy(place)
    _explain(figure, places, has_bars)
    save_figure(figure, path)


def draw_rows(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw the first headline of each task of any study, a row for each configuration, from top to bottom."""
    names = _first_headlines(outcomes)
    labels = [outcome.label for outcome in outcomes]
    height = 0.9 + 0.3 * len(labels)
    figure, places = _panels(len(names), (2.4 + 0.05 * max(map(len, labels)), height), sharey=True)
    base, other = line_styles(2, has_base=True)
    has_bars = False
    for place, name in zip(places, names, strict=True):
        values, below, above = _estimates([outcome.results.get(name, ()) for outcome in outcomes])
        for row in range(len(outcomes)):
            colour = (other if row else base)["color"]
            place.errorbar(
                *(values[row], row), xerr=([below[row]], [above[row]]), marker="o", markersize=4.5, capsize=2.5,
                color=colour,
            )  # fmt: skip
        has_bars |= bool(np.isfinite(below).any())
        shown = _shown(outcomes, name)
        if shown.chance is not None:
            place.axvline(shown.chance, label=_CHANCE, **_CHANCE_STYLE)
        place.set_title(shown.task.replace("_", "-"), loc="left", fontsize=10)
        place.set_xlabel(_with_unit(shown))
        place.set_yticks(range(len(labels)), labels, fontsize=8)
        place.set_ylim(len(labels) - 0.4, -0.6)
        if _is_never_negative(outcomes, name):
            place.set_xlim(left=0)
        tidy(place)
    _explain(figure, places, has_bars)
    save_figure(figure, path)


def _first_headlines(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the name of the first headline of each task that any configuration has."""
    found: dict[str, str] = {}
    for name in (name for outcome in outcomes for name in outcome.results):
        found.setdefault(name.partition("/")[0], name)
    return list(found.values())


def _shown(outcomes: Sequence[Outcome], name: str) -> Result:
    """Return one of the results called `name`: what all of them are called, their unit, and chance."""
    return next(result for outcome in outcomes for result in outcome.results.get(name, ()))


def _is_never_negative(outcomes: Sequence[Outcome], name: str) -> bool:
    """Return whether an axis from 0 shows all of the results called `name`."""
    return all(result.value >= 0 for outcome in outcomes for result in outcome.results.get(name, ()))


def _with_unit(result: Result) -> str:
    return ", ".join(filter(None, (result.shown, result.unit)))


def _panels(count: int, size: tuple[float, float], sharey: bool = False) -> "tuple[Figure, list[Axes]]":
    """Return a figure of so many panels of a size in inches, three in a row at most."""
    rows = math.ceil(count / _MOST_COLUMNS)
    columns = math.ceil(count / rows)
    figure, axes = drawing_pyplot().subplots(
        *(rows, columns), figsize=(columns * size[0], rows * size[1] + 0.5), sharey=sharey, squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    for unused in axes.flat[count:]:
        unused.set_axis_off()
    return figure, list(axes.flat[:count])


def _estimates(results: Sequence[Sequence[Result]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean over the seeds of each configuration, and how far its 95 % interval over them goes below and
    above; NaN of those that have no result, or one seed."""
    found = np.full((3, len(results)), np.nan)
    for number, its in enumerate(results):
        values = [result.value for result in its]
        if len(values) > 1:
            mean, low, high = mean_of(values, its[0].unit)
            found[:, number] = mean, mean - low, high - mean
        elif values:
            found[0, number] = values[0]
    return found[0], found[1], found[2]


def _explain(figure: "Figure", places: "Sequence[Axes]", has_bars: bool) -> None:
    """Say what lines and bars are, in one legend."""
    handles: dict[str, Any] = {}
    for place in places:
        for handle, label in zip(*place.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = sorted(handles, key=lambda label: label == _CHANCE)  # which is last; the others keep their order
    if labels:
        figure.legend(
            [handles[label] for label in labels], labels, loc="outside upper center", ncols=min(4, len(labels)),
            frameon=False,
        )  # fmt: skip
    words = "Bars: 95 % intervals of means over seeds." if has_bars else "One seed a configuration: no interval."
    figure.supxlabel(words, fontsize=8, color="#555555", x=0.01, ha="left")
