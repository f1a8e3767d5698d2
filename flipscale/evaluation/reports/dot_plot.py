"""Models side by side as a dot plot: a row a task, its 95 % interval, chance, and the paper's figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flipscale.evaluation.reports.figures import COLOURS, drawing_pyplot, save_figure
from flipscale.evaluation.reports.table import Column, Row, by_suite, rows_of
from flipscale.io.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH_INCHES, _ROW_INCHES, _DOT_INCHES, _MARGIN_INCHES = 8.0, 0.3, 0.1, 0.9
_LEGEND_LINE_INCHES, _LETTER_INCHES = 0.22, 0.09
_CHANCE, _PAPER = "chance", "the paper's FLIP L/14"
_SPREAD = 0.5  # of a row's height, between the first model's dot and the last's


def draw_results(columns: Sequence[Column], suites: Sequence[str], path: Path) -> bool:
    """Draw the first headline in percent of each task to `path`, and return whether there was one."""
    shown: dict[str, Row] = {}
    for row in rows_of(columns):
        if row.result.headline and row.result.unit == "%":
            shown.setdefault(row.task, row)
    groups = by_suite(shown.values(), suites, is_once=True)
    if not groups:
        return False
    pyplot = drawing_pyplot()
    heights = [len(rows) + 0.6 for rows in groups.values()]
    of_rows = sum(heights) * max(_ROW_INCHES, _DOT_INCHES * len(columns))
    names = [*(column.name for column in columns), _CHANCE, _PAPER]
    num_columns = max(1, min(3, int(_WIDTH_INCHES / (_LETTER_INCHES * (4 + max(map(len, names)))))))
    of_legend = _LEGEND_LINE_INCHES * -(-len(names) // num_columns)
    figure, all_axes = pyplot.subplots(
        *(len(groups), 1),
        figsize=(_WIDTH_INCHES, _MARGIN_INCHES + of_rows + of_legend + 0.35 * len(groups)),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        constrained_layout=True,
    )
    for axes, (suite, rows) in zip(all_axes[:, 0], groups.items(), strict=True):
        _draw_suite(axes, rows, columns)
        if len(groups) > 1 or suite in suites:
            axes.set_title(suite, loc="left", fontsize=10)
    last = all_axes[-1, 0]
    last.set_xlim(0, 100)
    last.set_xlabel("%")
    handles, labels = _legend(all_axes[:, 0])
    figure.legend(handles, labels, loc="outside upper center", ncols=min(num_columns, len(labels)), frameon=False)
    with atomic_write(path) as partial:
        save_figure(figure, partial, "png")
    return True


def _draw_suite(axes: "Axes", rows: list[Row], columns: Sequence[Column]) -> None:
    """Draw the rows of a suite from top to bottom."""
    colours = _colours(len(columns))
    for y, row in enumerate(rows):
        if row.result.chance is not None:
            axes.plot(row.result.chance, y, "|", color="#888888", markersize=9, label=_CHANCE)
        if row.paper is not None:
            axes.plot(row.paper, y, "D", color="none", markeredgecolor="#222222", label=_PAPER)
        for number, line in enumerate(row.lines):
            if line is None:
                continue
            place = y + (_SPREAD * (number / (len(columns) - 1) - 0.5) if len(columns) > 1 else 0.0)
            result, colour = line.result, colours[number]
            if result.low is not None and result.high is not None:
                axes.plot([result.low, result.high], [place, place], "-", color=colour, linewidth=1.4)
            axes.plot(result.value, place, "o", color=colour, markersize=4.5, label=columns[number].name)
    axes.set_yticks(range(len(rows)), [f"{row.title}, {row.result.shown}" for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.25)
    axes.hlines(range(len(rows)), 0, 100, color="#888888", alpha=0.15, linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _colours(count: int) -> list:
    """Return a colour for each model; of more than twenty, some share one."""
    if count <= len(COLOURS):
        return list(COLOURS)
    many = drawing_pyplot().get_cmap("tab20")
    return [many(number % many.N) for number in range(count)]


def _legend(all_axes: Sequence["Axes"]) -> tuple[list, list[str]]:
    """Return a handle for each label, the models first."""
    found: dict[str, object] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    last = (_CHANCE, _PAPER)
    labels = [label for label in found if label not in last] + [label for label in last if label in found]
    return [found[label] for label in labels], labels
