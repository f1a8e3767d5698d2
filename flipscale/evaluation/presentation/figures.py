"""Figures of runs: loss, rates and results against training time."""

import importlib.util
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from flipscale.evaluation.presentation.curves import Curve, by_recipe, headlines, over_seeds
from flipscale.evaluation.results import THIS_MODEL, Result, with_unit
from flipscale.io.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f6feb", "#d1495b", "#2e8b57", "#8a5fbf", "#c77d0a", "#0f8b8d", "#b8336a", "#5a6e2a", "#3d3d9e", "#7a4a2b")
# Lines of at least this many points are drawn smoothed.
_SMOOTHED_POINTS = 40
# Height of a line of small text as a share of the figure.
_TEXT_HEIGHT = 0.04


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def drawing_pyplot() -> Any:
    """Return matplotlib's pyplot with the backend that draws to files."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # because names of runs and models may have dollar signs
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as reproducible bytes and close it."""
    from matplotlib import pyplot

    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def tidy(axes: "Axes", grid: Literal["both", "x"] = "both") -> None:
    """Add a faint grid along `grid` and remove the frame above and at the right."""
    axes.grid(alpha=0.25, axis=grid, which="both")
    axes.spines[["top", "right"]].set_visible(False)


def draw_run(curve: Curve, folder: Path) -> dict[str, str]:
    """Draw a run's figures into a folder, and return their captions by file name.

    Without two records of the loss there are no figures, and no folder is made."""
    if len(curve.points("loss")[0]) < 2:
        return {}
    results = {task: result for task, result in draw_curves([curve], folder) if result}
    captions = {"loss.png": "The loss of the training batches against training time"}
    for name, metric, title, y_label, factor in (
        ("learning_rate.png", "lr", "Learning rate", "learning rate", 1.0),
        ("data_wait.png", "data_wait_share", "Share of the time that steps waited for data", "%", 100.0),
    ):
        figure, axes, unit = _axes(title, y_label, [curve])
        seconds, values = curve.points(metric)
        axes.plot([s / unit for s in seconds], [factor * value for value in values], color=COLOURS[0])
        _mark_stages(axes, [curve], unit)
        axes.set_ylim(0, 1.15 * factor * max(values) or 1.0)
        save_figure(figure, folder / name)
        captions[name] = f"{title} against training time"
    return captions | {f"{task}.png": f"{one.shown} of {task} against training time" for task, one in results.items()}


def draw_curves(curves: list[Curve], folder: Path) -> Iterator[tuple[str, Result | None]]:
    """Draw the loss and the results of runs into a folder. Yield each figure's name and its result, None for the loss.

    The results are the first headline of each task that was measured more than once. The loss needs two records."""
    folder.mkdir(parents=True, exist_ok=True)
    if max(len(curve.points("loss")[0]) for curve in curves) > 1:
        draw_loss(curves, folder / "loss.png")
        yield "loss", None
    shown: dict[str, Result] = {}
    for name in headlines(curves):
        course = max((curve.course(name) for curve in curves), key=len)
        if len(course) > 1:
            shown.setdefault(course[-1].result.task, course[-1].result)
    for task, result in shown.items():
        draw_result(curves, result, folder / f"{task}.png")
        yield task, result


def _axes(title: str, y_label: str, curves: Sequence[Curve]) -> "tuple[Figure, Axes, float]":
    """Return a figure over the curves' `along`, and the size of its unit: seconds, or hours if a run took over two."""
    height = 4.2 + 0.22 * (len(by_recipe(curves)) - 1)  # with a legend below the axes
    figure, axes = drawing_pyplot().subplots(figsize=(7, height), constrained_layout=True)
    axes.set_title(title, loc="left")
    along = curves[0].along
    longest = max(curve.records[-1][along] for curve in curves) or 1.0
    name, unit = ("training time, hours", 3600.0) if longest > 7200 else ("training time, seconds", 1.0)
    if along == "samples_seen":
        name, unit = "samples seen", 1.0
    axes.set_xlabel(name)
    axes.set_ylabel(y_label)
    axes.set_xlim(0, 1.02 * longest / unit)
    tidy(axes)
    return figure, axes, unit


def draw_loss(curves: list[Curve], path: Path) -> None:
    """Draw the loss against training time, a line for each run, smoothed if it is long, and mark where stages begin."""
    figure, axes, unit = _axes("Loss of the training batches", "loss", curves)
    groups = by_recipe(curves)
    for group, colour in zip(groups, cycle(COLOURS), strict=False):
        for curve in group:
            for number, (seconds, losses) in enumerate(curve.by_stage("loss").values()):
                times = [s / unit for s in seconds]
                drawn = np.asarray(losses)
                if len(losses) >= _SMOOTHED_POINTS:
                    axes.plot(times, losses, color=colour, alpha=0.25, linewidth=0.8)
                    window = np.ones(2 * (len(losses) // 40) + 1)
                    drawn = np.convolve(losses, window, "same") / np.convolve(np.ones(len(losses)), window, "same")
                label = curve.label if number == 0 and curve is group[0] else None
                axes.plot(times, drawn, color=colour, label=label)
    _mark_stages(axes, [group[0] for group in groups], unit)
    if len({ratio for curve in curves for ratio in curve.masks.values()}) > 1:
        _explain(axes, "Masked images are harder than whole ones: losses under different masks do not compare.")
    if len(curves) > 1:
        figure.legend(loc="outside lower left", frameon=False)
    save_figure(figure, path)


def _mark_stages(axes: "Axes", curves: list[Curve], unit: float) -> None:
    """Mark where the later stages of each run begin. With one run, add each stage's name and mask."""
    for curve, colour in zip(curves, cycle(COLOURS), strict=False):
        ends = [seconds[-1] / unit for seconds, _ in curve.by_stage("lr").values()]
        for end in ends[:-1]:
            axes.axvline(end, color=colour if len(curves) > 1 else "#888888", linewidth=0.9, linestyle="--", zorder=0)
        if len(curves) > 1 or len(ends) < 2:
            continue
        for name, begin, end in zip(curve.by_stage("lr"), [0.0, *ends], ends, strict=False):
            ratio = curve.masks.get(name, 0.0)
            text = f"{name}, {ratio:.0%} masked" if ratio else f"{name}, whole images"
            # The text of a narrow stage is written along its mark.
            is_narrow = end - begin < 0.02 * len(text) * ends[-1]
            axes.annotate(
                text, (begin, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -3), textcoords="offset points",
                va="top", fontsize=8, color="#555555", rotation=90 if is_narrow else 0,
            )  # fmt: skip


def _explain(axes: "Axes", text: str) -> None:
    axes.set_title(axes.get_title(loc="left"), loc="left", pad=18)
    axes.annotate(
        text, (0.0, 1.0), xycoords="axes fraction", xytext=(0, 5), textcoords="offset points", fontsize=8,
        color="#555555", va="bottom",
    )  # fmt: skip


def draw_result(curves: list[Curve], shown: Result, path: Path) -> None:
    """Draw a result against training time: a line for each recipe with its 95 % interval as a band.

    The interval is over seeds where a recipe has several, else over queries. The first run's baselines are levels.
    Chance is given in words, because its level would squeeze the lines."""
    title = f"{shown.task.replace('_', '-')}: {shown.shown}"
    figure, axes, unit = _axes(title, shown.shown_with_unit, curves)
    drawn: list[float] = []
    groups = [own for group in by_recipe(curves) if (own := [c for c in group if c.course(shown.name)])]
    notes: dict[str, None] = {}
    for group, colour in zip(groups, cycle(COLOURS), strict=False):
        times, means = over_seeds(group, shown.name, group[0].along)
        values = [mean.value for mean in means]
        label, bands = group[0].label, [(mean.low, mean.high) for mean in means]
        note = "Band: the 95 % interval of the mean over seeds."
        if len(group) > 1:
            label += f", {len(group)} seeds"
        else:
            results = [measured.result for measured in group[0].course(shown.name)]
            bands = [(r.low, r.high) for r in results if r.low is not None and r.high is not None]
            note = "Band: the 95 % interval over the queries."
        axes.plot(times / unit, values, "o-", color=colour, label=label)
        drawn += values
        if len(bands) == len(values):
            low, high = zip(*bands, strict=True)
            axes.fill_between(times / unit, low, high, color=colour, alpha=0.15, linewidth=0)
            notes[note] = None
    levels = {r.who: r.value for r in curves[0].results if r.name == shown.name and r.who != THIS_MODEL}
    drawn += levels.values()
    for name, value in levels.items():
        axes.axhline(value, color="#888888", linewidth=0.9, linestyle=":", zorder=0)
        # Under its line if the name would overlap the next level above.
        is_under = any(0 < other - value < _TEXT_HEIGHT * max(drawn) for other in levels.values())
        place, side = (0.01, value), "top" if is_under else "bottom"
        axes.annotate(name, place, xycoords=("axes fraction", "data"), va=side, fontsize=8)
    if min(drawn) < max(drawn) / 2 and min(drawn) >= 0:
        axes.set_ylim(bottom=0)
    if shown.chance is not None:
        notes[f"Guessing: {with_unit(shown.chance, shown.unit)}."] = None
    _explain(axes, " ".join(sorted(notes)))
    if len(groups) > 1 or any(len(group) > 1 for group in groups):
        figure.legend(loc="outside lower left", frameon=False)
    save_figure(figure, path)
