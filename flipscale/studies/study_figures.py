"""Figures of studies: axes against the base, runs against time, laws, effects, and final results."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flipscale.evaluation.intervals import mean_of
from flipscale.evaluation.presentation.curves import Curve, over_seeds
from flipscale.evaluation.presentation.figures import COLOURS, drawing_pyplot, save_figure, tidy
from flipscale.evaluation.results import Result
from flipscale.studies.laws import LawFit, Points, PowerLaw
from flipscale.studies.transfer import EffectTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BASE_COLOUR = "#777777"
_LINES = ("-", "--", ":")
_PAIRS = {"billions": 1e9, "millions": 1e6, "thousands": 1e3}
_MOST_COLUMNS = 3
# Keywords of the line of chance.
_CHANCE: dict[str, Any] = {"label": "chance", "color": "#888888", "linestyle": "--", "linewidth": 0.9, "zorder": 0}
_BARS: dict[str, Any] = {"marker": "o", "markersize": 4.5, "capsize": 2.5}
# Keywords of a legend at the right of the axes.
_BESIDE: dict[str, Any] = {"frameon": False, "fontsize": 8, "loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
# And below them, so that no curve crosses it.
_BELOW: dict[str, Any] = {"frameon": False, "loc": "upper left", "bbox_to_anchor": (0.0, -0.22)}
_NOTE: dict[str, Any] = {"fontsize": 8, "color": "#555555", "x": 0.01, "ha": "left"}

# Curves of a configuration's seeds, by its name.
CurveGroups = Mapping[str, Sequence[Curve]]
# Final results of a configuration's seeds, by their names `task/metric`.
Ends = Mapping[str, Sequence[Result]]


def draw_study_curves(panels: Mapping[str, CurveGroups], along: str, name: str, words: str, path: Path) -> None:
    """Draw the result `name` against a field of the records, a panel for each title. A panel has a line for each
    configuration: the mean over its seeds, with the 95 % interval as a band. The base comes first. `along` is
    `samples_seen` or `trained_seconds`."""
    is_single = len(panels) == 1
    size = (7.5, 4.5) if is_single else (4.2 * len(panels), 3.8)
    # Between the panels is room for the last number of one axis and the first of the next.
    look = {"figsize": size, "sharey": True, "squeeze": False, "layout": "constrained", "gridspec_kw": {"wspace": 0.08}}
    figure, axes = drawing_pyplot().subplots(1, len(panels), **look)
    all_groups = [group for groups in panels.values() for group in groups.values()]
    label, unit = _unit(along, max(curve.records[-1][along] for group in all_groups for curve in group))
    for place, (title, groups) in zip(axes[0], panels.items(), strict=True):
        styles = [{"color": _BASE_COLOUR}, *_line_styles(len(groups) - 1)]
        for (level, curves), style in zip(groups.items(), styles, strict=True):
            with_result = [curve for curve in curves if curve.course(name)]
            if not with_result:
                continue
            at, means = over_seeds(with_result, name, along)
            values, low, high = np.array(means).T
            place.plot(at / unit, values, marker="o", markersize=3.5, label=level, **style)
            if len(with_result) > 1:
                place.fill_between(at / unit, low, high, color=style["color"], alpha=0.13, linewidth=0)
        place.set(xlabel=label)
        place.set_title(title, loc="left")
        place.legend(**(_BESIDE if is_single else _BELOW))
        tidy(place)
    axes[0, 0].set_ylabel(words)
    has_band = any(len(group) > 1 for group in all_groups)
    note = "Band: the 95 % interval of the mean over seeds." if has_band else "One seed a configuration: no interval."
    figure.suptitle(note, **_NOTE)
    save_figure(figure, path)


def _unit(along: str, longest: float) -> tuple[str, float]:
    """Return the label of an axis for pairs or times up to `longest`, and the pairs or seconds of its unit."""
    if along == "samples_seen":
        name, unit = next(((name, size) for name, size in _PAIRS.items() if longest >= size), ("thousands", 1e3))
        return f"pairs seen, {name}", unit
    name, unit = ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 120 else ("seconds", 1.0)
    return f"training time, {name}", unit


def _line_styles(count: int) -> list[dict[str, Any]]:
    """Return a colour and a kind of line for each of `count` lines."""
    styles = itertools.cycle(itertools.product(_LINES, COLOURS))
    return [{"linestyle": line, "color": colour} for line, colour in itertools.islice(styles, count)]


def draw_fits(points: Points, fits: Sequence[LawFit], words: str, path: Path) -> None:
    """Draw the error of points against compute, with the front filled, and the laws of compute alone as lines."""
    figure, place = drawing_pyplot().subplots(figsize=(6.5, 4.5), constrained_layout=True)
    from matplotlib.ticker import LogFormatter

    front = points.front()
    place.loglog(points.compute, points.error, "o", color="#444444", markerfacecolor="none", label="configurations")
    place.loglog(front.compute, front.error, "o", color="#444444", label="the front")
    grid = np.geomspace(points.compute.min() / 1.3, points.compute.max() * 3, 100)
    ones = np.ones_like(grid)
    line = Points(np.full(len(grid), "", object), grid, ones, ones, ones, ones)
    drawn = [fit for fit in fits if tuple(fit.law.spent) == ("compute",)]
    # Broken lines, because laws without saturation coincide.
    for fit, colour, kind in zip(drawn, COLOURS, _LINES, strict=False):
        label = f"{fit.law.name}, {fit.law.formula}"
        if isinstance(fit.law, PowerLaw):
            label = f"power law: slope {fit.fitted[0]:.3f} ({fit.low[0]:.3f} to {fit.high[0]:.3f})"
        place.loglog(grid, fit.law.error(fit.fitted, line), color=colour, linestyle=kind, label=label)
    place.set(xlabel="training operations, masks and tuning counted", ylabel=f"error of {words}, %")
    place.xaxis.set_major_formatter(LogFormatter())
    place.xaxis.set_minor_formatter(LogFormatter())
    place.yaxis.set_major_formatter("{x:g}")
    place.yaxis.set_minor_formatter("{x:g}")
    place.legend(frameon=False, fontsize=8)
    tidy(place)
    save_figure(figure, path)


def draw_transfer(rows: EffectTable, tasks: Sequence[str], path: Path) -> None:
    """Draw effects as a coloured table, axis x task. Colours are relative to the largest effect on a task."""
    values = np.array([[row[task].mean if task in row else np.nan for task in tasks] for row in rows.values()])
    most = np.nanmax(np.abs(values), axis=0, keepdims=True)
    size = (max(2.2 + 0.95 * len(tasks), 4.2), 1.8 + 0.45 * len(rows))
    figure, place = drawing_pyplot().subplots(figsize=size, constrained_layout=True)
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


def draw_grid(ends: Mapping[tuple[str, str], Ends], axes: Mapping[str, Sequence[str]], path: Path) -> None:
    """Draw each task's first headline against the levels of the second of two axes, a line for each level of the first.
    Levels begin with their axis' base. `ends` has the final results by the levels of both axes."""
    (axis, levels), (along, ticks) = axes.items()
    figure, panels = _panels(ends.values(), (3.9, 3.2))
    styles = [{"color": _BASE_COLOUR}, *_line_styles(len(levels) - 1)]
    for place, name, shown in panels:
        for number, (level, style) in enumerate(zip(levels, styles, strict=True)):
            values, below, above = _estimates(ends.get((level, tick), {}).get(name, ()) for tick in ticks)
            at = np.arange(len(ticks)) + 0.16 * (number / max(len(levels) - 1, 1) - 0.5)
            label = f"{axis}: {level}"
            place.errorbar(at, values, yerr=(below, above), elinewidth=1.1, label=label, **_BARS, **style)
        if shown.chance is not None:
            place.axhline(shown.chance, **_CHANCE)
        place.set(xlabel=along, ylabel=shown.shown_with_unit, xlim=(-0.4, len(ticks) - 0.6))
        place.set_xticks(range(len(ticks)), ticks)
        if _is_never_negative(ends.values(), name):
            place.set_ylim(bottom=0)
    _finish(figure, ends.values(), path)


def draw_rows(ends: Mapping[str, Ends], path: Path) -> None:
    """Draw each task's first headline with a row for each configuration, by its label."""
    size = (2.4 + 0.05 * max(map(len, ends)), 0.9 + 0.3 * len(ends))
    figure, panels = _panels(ends.values(), size, sharey=True)
    for place, name, shown in panels:
        for row, (value, below, above) in enumerate(_estimates(own.get(name, ()) for own in ends.values()).T):
            place.errorbar(value, row, xerr=([below], [above]), color=COLOURS[0] if row else _BASE_COLOUR, **_BARS)
        if shown.chance is not None:
            place.axvline(shown.chance, **_CHANCE)
        place.set(xlabel=shown.shown_with_unit, ylim=(len(ends) - 0.4, -0.6))
        place.set_yticks(range(len(ends)), list(ends), fontsize=8)
        if _is_never_negative(ends.values(), name):
            place.set_xlim(left=0)
    _finish(figure, ends.values(), path)


def _panels(
    ends: Iterable[Ends], size: tuple[float, float], sharey: bool = False
) -> "tuple[Figure, list[tuple[Axes, str, Result]]]":
    """Return a figure with a panel of `size` inches for each task: its axes, first headline, and one result of it."""
    shown: dict[str, tuple[str, Result]] = {}
    for name, results in itertools.chain.from_iterable(own.items() for own in ends):
        shown.setdefault(results[0].task, (name, results[0]))
    rows = math.ceil(len(shown) / _MOST_COLUMNS)
    columns = math.ceil(len(shown) / rows)
    look = {"figsize": (columns * size[0], rows * size[1] + 0.5), "squeeze": False, "constrained_layout": True}
    figure, axes = drawing_pyplot().subplots(rows, columns, sharey=sharey, **look)
    for unused in axes.flat[len(shown) :]:
        unused.set_axis_off()
    panels = [(place, *own) for place, own in zip(axes.flat, shown.values(), strict=False)]
    for place, _, result in panels:
        place.set_title(result.task.replace("_", "-"), loc="left", fontsize=10)
        tidy(place)
    return figure, panels


def _is_never_negative(ends: Iterable[Ends], name: str) -> bool:
    return all(result.value >= 0 for own in ends for result in own.get(name, ()))


def _estimates(groups: Iterable[Sequence[Result]]) -> np.ndarray:
    """Return each configuration's mean over seeds, and the lengths of its 95 % interval below and above: `(3, groups)`,
    NaN without results, and without several seeds."""
    columns = []
    for results in groups:
        values = [result.value for result in results] or [np.nan]
        mean, low, high = mean_of(values, results[0].unit) if len(values) > 1 else (values[0], np.nan, np.nan)
        columns.append((mean, mean - low, high - mean))
    return np.array(columns).T


def _finish(figure: "Figure", ends: Iterable[Ends], path: Path) -> None:
    """Add one legend and a note on the bars, and write the figure."""
    handles: dict[str, Any] = {}
    for place in figure.axes:
        handles |= dict(zip(*reversed(place.get_legend_handles_labels()), strict=True))
    if "chance" in handles:
        handles["chance"] = handles.pop("chance")  # to the end
    if handles:
        columns = min(4, len(handles))
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, frameon=False)
    has_bars = any(len(results) > 1 for own in ends for results in own.values())
    words = "Bars: 95 % intervals of means over seeds." if has_bars else "One seed a configuration: no interval."
    figure.supxlabel(words, **_NOTE)
    save_figure(figure, path)
