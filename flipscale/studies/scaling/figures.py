"""Figures of a study: each axis against the base, all runs against their time, laws of scaling, and what moves what."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flipscale.evaluation.intervals import mean_of
from flipscale.evaluation.reports.comparison import Curve
from flipscale.evaluation.reports.figures import drawing_pyplot, save_figure
from flipscale.evaluation.results import Result
from flipscale.studies.scaling.fitting import Fit
from flipscale.studies.scaling.points import Points
from flipscale.studies.scaling.transfer import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASE_COLOUR = "#777777"
_COLOURS = (
    "#1f6feb",
    "#d1495b",
    "#2e8b57",
    "#8a5fbf",
    "#c77d0a",
    "#0f8b8d",
    "#b8336a",
    "#5a6e2a",
    "#3d3d9e",
    "#7a4a2b",
)
_LINES = ("-", "--", ":")
_PAIRS = {"billions": 1e9, "millions": 1e6, "thousands": 1e3}
_SECONDS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}

# Curves of a configuration's seeds, by its name.
Groups = Mapping[str, Sequence[Curve]]


def draw_axes(panels: Mapping[str, Groups], name: str, words: str, path: Path) -> None:
    """Draw a result against the samples seen, a panel for each axis: the base and the axis' levels.

    Args:
        panels: for each axis, the curves of the base, first, and of its levels.
        name: of the result, `task/metric`.
        words: what the figure calls it, with its unit.
    """
    pyplot = drawing_pyplot()
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.8), sharey=True, squeeze=False, constrained_layout=True
    )
    most = max(_most(groups, "samples_seen") for groups in panels.values())
    unit = next((unit for unit, size in _PAIRS.items() if most >= size), "thousands")
    has_band = False
    for place, (axis, groups) in zip(axes[0], panels.items(), strict=True):
        for (label, curves), style in zip(groups.items(), line_styles(len(groups), has_base=True), strict=True):
            has_band |= _draw(place, curves, name, "samples_seen", _PAIRS[unit], label, style)
        place.set_title(axis, loc="left")
        place.set_xlabel(f"pairs seen, {unit}")
        place.legend(frameon=False, loc="upper left")  # results rise to the right
        tidy(place)
    axes[0, 0].set_ylabel(words)
    _say(figure, has_band)
    save_figure(figure, path)


def draw_times(groups: Groups, name: str, words: str, path: Path) -> None:
    """Draw a result against training time, a line a configuration."""
    pyplot = drawing_pyplot()
    figure, place = pyplot.subplots(figsize=(7.5, 4.5), constrained_layout=True)
    longest = _most(groups, "trained_seconds")
    unit = "hours" if longest > 7200 else "minutes" if longest > 120 else "seconds"
    has_band = False
    for (label, curves), style in zip(groups.items(), line_styles(len(groups), has_base=True), strict=True):
        has_band |= _draw(place, curves, name, "trained_seconds", _SECONDS[unit], label, style)
    place.set_xlabel(f"training time, {unit}")
    place.set_ylabel(words)
    place.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    tidy(place)
    _say(figure, has_band)
    save_figure(figure, path)


def draw_fits(points: Points, fits: Sequence[Fit], words: str, path: Path) -> None:
    """Draw the error of points against compute, the front filled, and the laws of compute alone as lines."""
    pyplot = drawing_pyplot()
    figure, place = pyplot.subplots(figsize=(6.5, 4.5), constrained_layout=True)
    front = points.front()
    place.loglog(points.compute, points.error, "o", color="#444444", markerfacecolor="none", label="configurations")
    place.loglog(front.compute, front.error, "o", color="#444444", label="the front")
    grid = np.geomspace(points.compute.min() / 1.3, points.compute.max() * 3, 100)
    ones = np.ones_like(grid)
    line = Points(np.full(len(grid), "", object), grid, ones, ones, ones, ones)
    drawn = [fit for fit in fits if tuple(fit.law.spent) == ("compute",)]
    # Where nothing saturates, the laws are one line: broken, the second shows the first.
    for fit, colour, kind in zip(drawn, _COLOURS, _LINES, strict=False):
        label = f"{fit.law.name}, {fit.law.formula}"
        if fit.law.name == "power law":
            label = f"power law: slope {fit.found[0]:.3f} ({fit.low[0]:.3f} to {fit.high[0]:.3f})"
        place.loglog(grid, fit.law.error(fit.found, line), color=colour, linestyle=kind, label=label)
    place.set_xlabel("training operations, masks and tuning counted")
    place.set_ylabel(f"error of {words}, %")
    place.yaxis.set_major_formatter("{x:g}")
    place.yaxis.set_minor_formatter("{x:g}")
    place.legend(frameon=False, fontsize=8)
    tidy(place)
    save_figure(figure, path)


def draw_rungs(courses: Mapping[str, Sequence[tuple[float, Result]]], words: str, path: Path) -> None:
    """Draw what each path of a search came to against its training time: those of the last rung coloured, with their
    95 % intervals, the others grey.

    Args:
        courses: the training seconds and the result of each path in each rung that it was in, by its name.
        words: what the figure calls the result, with its unit.
    """
    pyplot = drawing_pyplot()
    figure, place = pyplot.subplots(figsize=(7.5, 4.5), constrained_layout=True)
    most = max(map(len, courses.values()))
    longest = max(seconds for course in courses.values() for seconds, _ in course)
    unit = "hours" if longest > 7200 else "minutes" if longest > 120 else "seconds"
    ended = [name for name, course in courses.items() if len(course) == most]
    ended.sort(key=lambda name: courses[name][-1][1].value, reverse=courses[ended[0]][-1][1].higher_is_better)
    styles = dict(zip(ended, line_styles(len(ended), has_base=False), strict=True))
    others = [name for name, course in courses.items() if course and name not in styles]
    for name in [*others, *ended]:
        times = [seconds / _SECONDS[unit] for seconds, _ in courses[name]]
        values = [result.value for _, result in courses[name]]
        if name not in styles:
            label = f"{len(others)} that went out earlier" if name == others[0] else None
            place.plot(times, values, marker="o", markersize=3, linewidth=0.8, color="#bbbbbb", label=label)
            continue
        place.plot(times, values, marker="o", markersize=4, label=name, **styles[name])
        last = courses[name][-1][1]
        if last.low is not None and last.high is not None:
            place.plot([times[-1]] * 2, [last.low, last.high], color=styles[name]["color"], linewidth=1, alpha=0.6)
    if most > 1:
        place.set_xscale("log")
        place.set_xticks(*_ticks(courses[ended[0]], _SECONDS[unit]))
        place.minorticks_off()
    place.set_xlabel(f"training time, {unit}: each point is a schedule of its own")
    place.set_ylabel(words)
    handles, labels = place.get_legend_handles_labels()
    order = [labels.index(name) for name in ended] + ([0] if others else [])
    place.legend(
        *([listed[number] for number in order] for listed in (handles, labels)),
        frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5),
    )  # fmt: skip
    tidy(place)
    save_figure(figure, path)


def _ticks(course: Sequence[tuple[float, Result]], unit: float) -> tuple[list[float], list[str]]:
    """Return where the rungs of a course are along an axis in a unit of so many seconds, and what to write there."""
    times = [seconds / unit for seconds, _ in course]
    return times, [f"{time:.3g}" for time in times]


def draw_transfer(rows: Table, tasks: Sequence[str], path: Path) -> None:
    """Draw effects as a table of colours, axis x task; a colour is as deep as the effect is large among its task's."""
    pyplot = drawing_pyplot()
    values = np.array([[row[task].mean if task in row else np.nan for task in tasks] for row in rows.values()])
    most = np.nanmax(np.abs(values), axis=0, keepdims=True)
    size = (max(2.2 + 0.95 * len(tasks), 4.2), 1.8 + 0.45 * len(rows))
    figure, place = pyplot.subplots(figsize=size, constrained_layout=True)
    place.imshow(values / np.where(most > 0, most, 1.0), cmap="RdBu", vmin=-1.4, vmax=1.4, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        is_deep = abs(value) > 0.7 * most[0, column]
        words = "-" if np.isnan(value) else f"{value:+.1f}"
        place.text(column, row, words, ha="center", va="center", fontsize=9, color="white" if is_deep else "black")
    place.set_xticks(range(len(tasks)), [task.replace("_", " ") for task in tasks], rotation=35, ha="right", fontsize=8)
    place.set_yticks(range(len(rows)), list(rows), fontsize=9)
    place.tick_params(length=0)
    figure.suptitle("Points against the base; colours within a task", fontsize=10, x=0.01, ha="left")
    save_figure(figure, path)


def line_styles(count: int, has_base: bool) -> list[dict[str, Any]]:
    """Return a colour and a kind of line for each of some lines, grey for the base."""
    coloured = [
        {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _LINES[number // len(_COLOURS) % len(_LINES)]}
        for number in range(count)
    ]
    return [{"color": BASE_COLOUR, "linestyle": "-"}, *coloured][:count] if has_base else coloured


def _most(groups: Groups, field: str) -> float:
    """The most of what a run counts, at the end of any of the curves."""
    return max(curve.records[-1][field] for curves in groups.values() for curve in curves)


def _draw(
    place: "Axes", curves: Sequence[Curve], name: str, field: str, unit: float, label: str, style: Mapping[str, Any]
) -> bool:
    """Draw a configuration's line, the mean over its seeds with its 95 % interval as a band; return whether there is
    one."""
    courses = [course for curve in curves if (course := curve.course(name))]
    if not courses:
        return False
    along = [[getattr(measured, field) / unit for measured in course] for course in courses]
    values = np.array(
        [np.interp(along[0], at, [m.result.value for m in course]) for at, course in zip(along, courses, strict=True)]
    )
    place.plot(along[0], values.mean(axis=0), marker="o", markersize=3.5, label=label, **style)
    if len(courses) > 1:
        means = [mean_of(column.tolist(), courses[0][0].result.unit) for column in values.T]
        low, high = [mean.low for mean in means], [mean.high for mean in means]
        place.fill_between(along[0], low, high, color=style["color"], alpha=0.13, linewidth=0)
    return len(courses) > 1


def tidy(place: "Axes") -> None:
    place.grid(alpha=0.25, which="both")
    place.spines[["top", "right"]].set_visible(False)


def _say(figure: "Figure", has_band: bool) -> None:
    words = "Band: the 95 % interval of the mean over seeds." if has_band else "One seed a configuration: no interval."
    figure.suptitle(words, fontsize=8, color="#555555", x=0.01, ha="left")
