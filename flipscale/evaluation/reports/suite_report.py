"""`results.md` and `results.png`: models side by side, with tables by suite, the paper's figures, and a dot plot."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flipscale.evaluation.reports.figures import COLOURS, can_draw, drawing_pyplot, save_figure, tidy
from flipscale.evaluation.reports.record import Line
from flipscale.evaluation.results import NOTHING, Result, with_unit
from flipscale.evaluation.suite import KINDS
from flipscale.evaluation.task_page import PAPER_MODEL, Reference, TaskPage, read_page, suite_pages
from flipscale.io.atomic import atomic_write, write_text
from flipscale.io.text_table import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_log = logging.getLogger(__name__)

INTERVALS = """Intervals of 95 % treat the n queries as independent draws. They do not include the variation between
training runs."""
_OTHER = "other tasks"
_WIDTH_INCHES, _ROW_INCHES, _DOT_INCHES, _MARGIN_INCHES = 8.0, 0.3, 0.1, 0.9
_LEGEND_LINE_INCHES, _LETTER_INCHES = 0.22, 0.09
_CHANCE, _PAPER = "chance", "the paper's FLIP L/14"
_SPREAD = 0.5  # Distance of the outer models' dots, as a share of a row.


@dataclass(frozen=True)
class Column:
    name: str
    lines: Sequence[Line]

    def find(self, task: str, metric: str) -> Line | None:
        return next((line for line in self.lines if (line.result.task, line.result.metric) == (task, metric)), None)


@dataclass(frozen=True)
class Row:
    """A task's metric, and each model's line; None for a model without."""

    task: str
    metric: str
    title: str
    page: TaskPage | None
    lines: tuple[Line | None, ...]

    @property
    def result(self) -> Result:
        return self.present[0].result

    @property
    def present(self) -> list[Line]:
        return [line for line in self.lines if line is not None]

    @property
    def paper(self) -> Reference | None:
        """The paper's figure; None if it does not compare with these results."""
        return None if self.why_not else self._reference

    @property
    def paper_text(self) -> str:
        """The paper's value, and its model if that is not `PAPER_MODEL`; a dash if it does not compare."""
        if self.paper is None:
            return NOTHING
        model = "" if self.paper.model == PAPER_MODEL else f" ({self.paper.model})"
        return with_unit(self.paper.value, self.result.unit) + model

    @property
    def why_not(self) -> str:
        """Reason why the paper's value does not compare; empty if it does, or if there is no value."""
        if self.page is None or self._reference is None:
            return ""
        if not self.page.comparable:
            return self.page.why_not
        return next((reason for line in self.present for reason in _departures(line, self.page)), "")

    @property
    def is_main(self) -> bool:
        """Whether the row belongs to the suite's table: a headline, or a metric that the paper reports."""
        return self.result.headline or self._reference is not None

    @property
    def _reference(self) -> Reference | None:
        """The paper's figure of `PAPER_MODEL`, else its first figure of this metric."""
        figures = [one for one in self.page.reference if one.metric == self.metric] if self.page else []
        return next((one for one in figures if one.model == PAPER_MODEL), next(iter(figures), None))


def write_reports(columns: Sequence[Column], suites: Sequence[str], home: Path) -> None:
    """Write `results.md` and, if matplotlib is installed, `results.png` into the folder `home`."""
    home.mkdir(parents=True, exist_ok=True)
    picture = home / "results.png"
    # It may show other models or tasks.
    picture.unlink(missing_ok=True)
    if not can_draw():
        _log.info("matplotlib is not installed, so there is no results.png; pip install 'flipscale[plots]'")
    is_drawn = can_draw() and draw_results(columns, suites, picture)
    write_text(home / "results.md", report(columns, suites, picture.name if is_drawn else None))
    _log.info("written: %s%s", home / "results.md", f" and {picture.name}" if is_drawn else "")


def report(columns: Sequence[Column], suites: Sequence[str], picture: str | None) -> str:
    """Return `results.md`: the tables of the suites, further metrics, and how the results were made."""
    blocks = ["# Results", suite_tables(columns, suites)]
    if picture:
        blocks.append(f"![The first headline of each task, with its 95 % interval]({picture})")
    others = [row for row in _rows_of(columns) if not row.is_main]
    if others:
        blocks.append("## Other metrics\n\n" + _table(_head(columns, False), [_cells(row, None) for row in others]))
    kinds = dict.fromkeys(line.result.kind for column in columns for line in column.lines)
    protocols = [KINDS[kind].protocol for kind in kinds if kind in KINDS]
    blocks += ["## How they were made", *filter(None, protocols), INTERVALS, _made(columns)]
    return "\n\n".join(blocks) + "\n"


def suite_tables(columns: Sequence[Column], suites: Sequence[str]) -> str:
    """Return a table with notes for each of `suites`, and a table of the other tasks."""
    groups = _by_suite([row for row in _rows_of(columns) if row.is_main], suites)
    return "\n\n".join(_suite(suite, rows, columns, len(groups) == 1) for suite, rows in groups.items())


def _rows_of(columns: Sequence[Column]) -> list[Row]:
    seen: dict[tuple[str, str], Line] = {}
    for column in columns:
        for line in column.lines:
            seen.setdefault((line.result.task, line.result.metric), line)
    rows = []
    for (task, metric), line in seen.items():
        page = read_page(line.about["page"]) if line.about.get("page") else None
        own = tuple(column.find(task, metric) for column in columns)
        rows.append(Row(task, metric, line.about.get("title") or task, page, own))
    return rows


def _by_suite(rows: Iterable[Row], suites: Sequence[str], is_once: bool = False) -> dict[str, list[Row]]:
    """Return the rows of each of `suites`, then those of no suite; with `is_once`, each row in its first suite only."""
    groups: dict[str, list[Row]] = {suite: [] for suite in (*suites, _OTHER)}
    for row in rows:
        own = [suite for suite in suites if row.page and suite in row.page.suites] or [_OTHER]
        for suite in own[: 1 if is_once else None]:
            groups[suite].append(row)
    return {suite: group for suite, group in groups.items() if group}


def _suite(suite: str, rows: list[Row], columns: Sequence[Column], is_alone: bool) -> str:
    notes: dict[str, int] = {}
    for row in rows:
        if row.why_not:
            notes.setdefault(row.why_not, len(notes) + 1)
    has_paper = bool(notes) or any(row.paper for row in rows)
    cells = [_cells(row, notes if has_paper else None) for row in rows]
    means, missing = ([], "") if suite == _OTHER else _means(suite, rows, columns)
    heading = "" if suite == _OTHER and is_alone else f"## {suite.capitalize()}"
    blocks = [heading, _table(_head(columns, has_paper), [*cells, *means]), missing]
    blocks.append("\n".join(f"[{number}] Not comparable with the paper: {why}" for why, number in notes.items()))
    return "\n\n".join(filter(None, blocks))


def _means(suite: str, rows: list[Row], columns: Sequence[Column]) -> tuple[list[list[str]], str]:
    """Return the row of means for models with every task of the suite, and the missing tasks of the others."""
    pages = suite_pages(suite)
    values, notes = [], []
    for number, column in enumerate(columns):
        lines = {(row.task, row.metric): row.lines[number] for row in rows}
        own = {page.name: line for page in pages if (line := lines.get((page.name, page.metric)))}
        missing = [page.name for page in pages if page.name not in own]
        mean = sum(line.result.value for line in own.values()) / max(len(own), 1)
        values.append(NOTHING if missing or not math.isfinite(mean) else f"{mean:.1f} %")
        if missing:
            some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            lacks = f"{len(missing)} of the suite's {len(pages)} tasks are missing ({some})"
            notes.append(f"No mean for {column.name}: {lacks}.")
    has_mean = any(value != NOTHING for value in values)
    return [[f"mean of {len(pages)}", "", *values, "", "", ""]] if has_mean else [], "\n\n".join(notes)


def _head(columns: Sequence[Column], has_paper: bool) -> list[str]:
    paper = [f"{PAPER_MODEL}, in the paper"] if has_paper else []
    return ["task", "metric", *(column.name for column in columns), "n", "chance", *paper]


def _cells(row: Row, notes: dict[str, int] | None) -> list[str]:
    """Return the cells of a row; without `notes`, no cell for the paper."""
    result, sizes = row.result, dict.fromkeys(line.result.n for line in row.present)
    cells = [row.title, result.shown, *(NOTHING if line is None else line.result.estimate_text for line in row.lines)]
    cells.append(" / ".join(NOTHING if n is None else f"{n:,}" for n in sizes))
    cells.append(NOTHING if result.chance is None else with_unit(result.chance, result.unit))
    if notes is not None:
        cells.append(f"[{notes[row.why_not]}]" if row.why_not else row.paper_text)
    return cells


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table of rows cut or padded to the head's length."""
    padded = [(row + [""] * len(head))[: len(head)] for row in rows]
    return markdown_table([head, *padded], num_names=2)  # The task and the metric.


def _departures(line: Line, page: TaskPage) -> Iterable[str]:
    about = line.about
    if about.get("mask"):
        yield "the images were masked"
    if about["data"].get("images") != page.images:
        yield f"{about['data'].get('images'):,} images here, {page.images:,} there"
    prompts = (about.get("prompts") or {}).get("number", 0)
    if page.templates and prompts != len(page.templates):
        yield f"{prompts} prompts here, {len(page.templates)} there"


def _made(columns: Sequence[Column]) -> str:
    rows = []
    for column in columns:
        abouts = [line.about for line in column.lines]
        facts = (
            [f"`{about['weights'][:12]}`" for about in abouts],
            [f"{about['image_size']} px" for about in abouts],
            [", ".join(f"{key} {value}" for key, value in about["mask"].items()) or "whole" for about in abouts],
            [about["precision"] for about in abouts],
            [", ".join(f"{name} {number}" for name, number in about["versions"].items()) for about in abouts],
        )
        rows.append([column.name, *("; ".join(dict.fromkeys(values)) for values in facts)])
    return _table(["model", "weights", "images", "seen", "precision", "versions"], rows)


def draw_results(columns: Sequence[Column], suites: Sequence[str], path: Path) -> bool:
    """Draw each task's first headline in percent as a row of dots with 95 % intervals. Return whether there was one."""
    shown: dict[str, Row] = {}
    for row in _rows_of(columns):
        if row.result.headline and row.result.unit == "%":
            shown.setdefault(row.task, row)
    groups = _by_suite(shown.values(), suites, is_once=True)
    if not groups:
        return False
    heights = [len(rows) + 0.6 for rows in groups.values()]
    of_rows = sum(heights) * max(_ROW_INCHES, _DOT_INCHES * len(columns))
    names = [*(column.name for column in columns), _CHANCE, _PAPER]
    num_columns = max(1, min(3, int(_WIDTH_INCHES / (_LETTER_INCHES * (4 + max(map(len, names)))))))
    of_legend = _LEGEND_LINE_INCHES * -(-len(names) // num_columns)
    figure, all_axes = drawing_pyplot().subplots(
        *(len(groups), 1),
        figsize=(_WIDTH_INCHES, _MARGIN_INCHES + of_rows + of_legend + 0.35 * len(groups)),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        constrained_layout=True,
    )
    handles: dict[str, object] = {}
    for axes, (suite, rows) in zip(all_axes[:, 0], groups.items(), strict=True):
        _draw_suite(axes, rows, columns)
        if len(groups) > 1 or suite in suites:
            axes.set_title(suite, loc="left", fontsize=10)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    last = all_axes[-1, 0]
    last.set_xlim(0, 100)
    last.set_xlabel("%")
    labels = sorted(handles, key=lambda label: (_CHANCE, _PAPER).index(label) if label in (_CHANCE, _PAPER) else -1)
    figure.legend(
        [handles[label] for label in labels], labels, loc="outside upper center",
        ncols=min(num_columns, len(labels)), frameon=False,
    )  # fmt: skip
    with atomic_write(path) as partial:
        save_figure(figure, partial, "png")
    return True


def _draw_suite(axes: "Axes", rows: list[Row], columns: Sequence[Column]) -> None:
    # More than twenty models share colours.
    few = len(columns) <= len(COLOURS)
    colours = COLOURS if few else drawing_pyplot().get_cmap("tab20").colors
    for y, row in enumerate(rows):
        if row.result.chance is not None:
            axes.plot(row.result.chance, y, "|", color="#888888", markersize=9, label=_CHANCE)
        if row.paper is not None:
            axes.plot(row.paper.value, y, "D", color="none", markeredgecolor="#222222", label=_PAPER)
        for number, line in enumerate(row.lines):
            if line is None:
                continue
            place = y + (_SPREAD * (number / (len(columns) - 1) - 0.5) if len(columns) > 1 else 0.0)
            result, colour = line.result, colours[number % len(colours)]
            if result.low is not None and result.high is not None:
                axes.plot([result.low, result.high], [place, place], "-", color=colour, linewidth=1.4)
            axes.plot(result.value, place, "o", color=colour, markersize=4.5, label=columns[number].name)
    axes.set_yticks(range(len(rows)), [f"{row.title}, {row.result.shown}" for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    tidy(axes, "x")
    axes.hlines(range(len(rows)), 0, 100, color="#888888", alpha=0.15, linewidth=0.6, zorder=0)
