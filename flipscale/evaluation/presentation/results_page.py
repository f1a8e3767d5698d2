"""`results.md` and `results.png`: models side by side, with tables by suite, the paper's figures, and a dot plot."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flipscale.evaluation.model_results import Line
from flipscale.evaluation.presentation.figures import COLOURS, drawing_pyplot, save_figure, tidy
from flipscale.evaluation.results import CHANGED, CHANGES, NOTHING, Result, with_unit
from flipscale.evaluation.suite import KINDS
from flipscale.evaluation.task_page import PAPER_MODEL, Reference, TaskPage, read_page, suite_pages
from flipscale.io.text_table import markdown_table

INTERVALS = """The 95 % intervals (Wilson's, for shares) treat the n queries as independent draws. They do not cover the
difference between training runs."""
_OTHER = "other tasks"


@dataclass(frozen=True)
class Column:
    name: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Row:
    """A task's metric, and each model's line; None for a model without.

    Args:
        present: the lines of the models with one.
        result: result of the first of them.
        reference: the paper's figure of `PAPER_MODEL`, else its first figure of this metric.
        why_not: reason why `reference` does not compare with these results; empty if it does.
    """

    title: str
    page: TaskPage | None
    lines: tuple[Line | None, ...]
    present: list[Line]
    result: Result
    reference: Reference | None
    why_not: str


def results_table(columns: Sequence[Column], suites: Sequence[str]) -> str:
    """Return `results.md`: the tables of the suites, further metrics, and how the results were made."""
    blocks = ["# Results", suite_tables(columns, suites)]
    if others := [row for row in _rows_of(columns) if not _is_main(row)]:
        blocks.append("## Other metrics\n\n" + _table(_head(columns, False), [_cells(row, None) for row in others]))
    methods = protocols([line for column in columns for line in column.lines])
    blocks += ["## How they were made", *filter(None, [methods]), _made(columns)]
    return "\n\n".join(blocks) + "\n"


def protocols(lines: Sequence[Line]) -> str | None:
    """Return paragraphs about the methods of the evaluations, or None without results."""
    kinds = dict.fromkeys(line.result.kind for line in lines)
    paragraphs = [KINDS[kind].protocol for kind in kinds if kind in KINDS]
    if any(line.result.interval_text for line in lines):
        paragraphs.append(INTERVALS)
    if any(line.result.who in CHANGES for line in lines):
        paragraphs.append(CHANGED)
    return "\n\n".join(filter(None, paragraphs)) or None


def suite_tables(columns: Sequence[Column], suites: Sequence[str]) -> str:
    """Return a table with notes for each of `suites`, and a table of the other tasks."""
    groups: dict[str, list[Row]] = {suite: [] for suite in (*suites, _OTHER)}
    for row in filter(_is_main, _rows_of(columns)):
        for suite in [suite for suite in suites if row.page and suite in row.page.suites] or [_OTHER]:
            groups[suite].append(row)
    groups = {suite: rows for suite, rows in groups.items() if rows}
    return "\n\n".join(_suite(suite, rows, columns, len(groups) == 1) for suite, rows in groups.items())


def draw_results(columns: Sequence[Column], path: Path) -> None:
    """Draw each task's first headline, if in percent: a row with a dot and a 95 % interval for each model."""
    first: dict[str, Row] = {}
    for row in _rows_of(columns):
        if row.result.headline and row.result.unit == "%":
            first.setdefault(row.result.task, row)
    if not (rows := list(first.values())):
        return
    row_inches = max(0.3, 0.1 * len(columns))
    size = (8.0, 1.2 + 0.2 * len(columns) + row_inches * len(rows))
    figure, axes = drawing_pyplot().subplots(figsize=size, constrained_layout=True)
    for number, column in enumerate(columns):
        colour = COLOURS[number % len(COLOURS)]
        label: str | None = column.name
        for y, row in enumerate(rows):
            if (line := row.lines[number]) is None:
                continue
            result, place = line.result, y + 0.6 * (number - (len(columns) - 1) / 2) / len(columns)
            if result.low is not None and result.high is not None:
                axes.plot([result.low, result.high], [place, place], color=colour, linewidth=1.4)
            axes.plot(result.value, place, "o", color=colour, markersize=4.5, label=label)
            label = None
    chances = [row.result.chance for row in rows]
    papers = [row.reference.value if row.reference and not row.why_not else None for row in rows]
    for label, marker, values in (("chance", "|", chances), ("the paper's", "d", papers)):
        places = [(value, y) for y, value in enumerate(values) if value is not None]
        if places:
            axes.plot(*zip(*places, strict=True), marker, color="#888888", label=label, zorder=1)
    axes.set_yticks(range(len(rows)), [f"{row.title}, {row.result.shown}" for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, min(100.0, axes.get_xlim()[1]))
    axes.set_xlabel("%")
    tidy(axes, "x")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    save_figure(figure, path)


def _is_main(row: Row) -> bool:
    """Return whether a row belongs to its suite's table: a headline, or a metric that the paper reports."""
    return row.result.headline or row.reference is not None


def _rows_of(columns: Sequence[Column]) -> list[Row]:
    by_model = [{(line.result.task, line.result.metric): line for line in column.lines} for column in columns]
    rows = []
    for key in dict.fromkeys(key for lines in by_model for key in lines):
        own = tuple(lines.get(key) for lines in by_model)
        present = [line for line in own if line is not None]
        about = present[0].about
        page = read_page(about["page"]) if about.get("page") else None
        figures = [one for one in page.reference if one.metric == key[1]] if page else []
        reference = next((one for one in figures if one.model == PAPER_MODEL), next(iter(figures), None))
        why_not = ""
        if page and reference:
            departures = (reason for line in present for reason in _departures(line.about, page))
            why_not = next(departures, "") if page.comparable else page.why_not
        rows.append(Row(about.get("title") or key[0], page, own, present, present[0].result, reference, why_not))
    return rows


def _departures(about: Mapping[str, Any], page: TaskPage) -> Iterable[str]:
    if about.get("mask"):
        yield "the images were masked"
    if about.get("dims"):
        yield f"the embeddings were cut to {about['dims']} numbers"
    if about["data"].get("images") != page.images:
        yield f"{about['data'].get('images'):,} images here, {page.images:,} there"
    prompts = (about.get("prompts") or {}).get("number", 0)
    if page.templates and prompts != len(page.templates):
        yield f"{prompts} prompts here, {len(page.templates)} there"


def _suite(suite: str, rows: list[Row], columns: Sequence[Column], is_alone: bool) -> str:
    notes = {why: number for number, why in enumerate(dict.fromkeys(row.why_not for row in rows if row.why_not), 1)}
    has_paper = any(row.reference for row in rows)
    cells = [_cells(row, notes if has_paper else None) for row in rows]
    means, missing = ([], "") if suite == _OTHER else _means(suite, rows, columns)
    heading = "" if suite == _OTHER and is_alone else f"## {suite.capitalize().replace('_', ' ')}"
    blocks = [heading, _table(_head(columns, has_paper), [*cells, *means]), missing]
    blocks.append("\n".join(f"[{number}] Not comparable with the paper: {why}" for why, number in notes.items()))
    return "\n\n".join(filter(None, blocks))


def _means(suite: str, rows: list[Row], columns: Sequence[Column]) -> tuple[list[list[str]], str]:
    """Return the row of means for models with every task of the suite, and the missing tasks of the others."""
    pages = suite_pages(suite)
    values, notes = [], []
    for column, lines in zip(columns, zip(*(row.lines for row in rows), strict=True), strict=True):
        by_metric = {(line.result.task, line.result.metric): line.result.value for line in lines if line}
        own = {page.name: by_metric[page.name, page.metric] for page in pages if (page.name, page.metric) in by_metric}
        missing = [page.name for page in pages if page.name not in own]
        mean = sum(own.values()) / max(len(own), 1)
        values.append(NOTHING if missing or not math.isfinite(mean) else f"{mean:.1f} %")
        if missing:
            some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            lacks = f"{len(missing)} of the suite's {len(pages)} tasks are missing ({some})"
            notes.append(f"No mean for {column.name}: {lacks}.")
    has_mean = any(value != NOTHING for value in values)
    return [[f"mean of {len(pages)}", "", *values]] if has_mean else [], "\n\n".join(notes)


def _head(columns: Sequence[Column], has_paper: bool) -> list[str]:
    paper = [f"{PAPER_MODEL}, in the paper"] if has_paper else []
    return ["task", "metric", *(column.name for column in columns), "n", "chance", "protocol", *paper]


def _cells(row: Row, notes: Mapping[str, int] | None) -> list[str]:
    """Return the cells of a row; without `notes`, no cell for the paper."""
    result, reference, sizes = row.result, row.reference, dict.fromkeys(line.result.n for line in row.present)
    cells = [row.title, result.shown, *(NOTHING if line is None else line.result.estimate_text for line in row.lines)]
    cells.append(" / ".join(NOTHING if n is None else f"{n:,}" for n in sizes))
    cells.append(NOTHING if result.chance is None else with_unit(result.chance, result.unit))
    cells.append(_protocol(row))
    if notes is not None and row.why_not:
        cells.append(f"[{notes[row.why_not]}]")
    elif notes is not None and reference is not None:
        model = "" if reference.model == PAPER_MODEL else f" ({reference.model})"
        cells.append(with_unit(reference.value, result.unit) + model)
    elif notes is not None:
        cells.append(NOTHING)
    return cells


def _protocol(row: Row) -> str:
    """Return the right answers of a retrieval, and the crops of the models' images."""
    groups = "group_by_caption" if row.result.made_by.get("group_by_caption") else "own captions"
    right = [groups] if hasattr(KINDS.get(row.result.kind), "group_by_caption") else []
    crops = dict.fromkeys(line.about.get("crop", NOTHING) for line in row.present)
    return "; ".join([*right, " / ".join(crops)])


def _table(head: list[str], rows: list[list[str]]) -> str:
    padded = [(row + [""] * len(head))[: len(head)] for row in rows]
    return markdown_table([head, *padded], num_names=2)  # The task and the metric.


def _made(columns: Sequence[Column]) -> str:
    rows = []
    for column in columns:
        abouts = [line.about for line in column.lines]
        facts = (
            [f"`{about['weights'][:12]}`" for about in abouts],
            [f"{about['image_size']} px" for about in abouts],
            [_seen(about) for about in abouts],
            [about["precision"] for about in abouts],
            [", ".join(f"{name} {number}" for name, number in about["versions"].items()) for about in abouts],
        )
        rows.append([column.name, *("; ".join(dict.fromkeys(values)) for values in facts)])
    return _table(["model", "weights", "images", "seen", "precision", "versions"], rows)


def _seen(about: Mapping[str, Any]) -> str:
    """Return the mask of the images and the width that embeddings were cut to, or `whole`."""
    cut = [f"{about['dims']} numbers"] if about.get("dims") else []
    return ", ".join([*(f"{key} {value}" for key, value in about["mask"].items()), *cut]) or "whole"
