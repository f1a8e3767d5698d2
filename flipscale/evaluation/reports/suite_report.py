"""`results.md`: models side by side, with tables by suite and the paper's figures."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flipscale.evaluation.reports.record import Line
from flipscale.evaluation.results import NOTHING, Result, with_unit
from flipscale.evaluation.suite import KINDS
from flipscale.evaluation.task_page import PAPER_MODEL, Reference, TaskPage, read_page, suite_pages
from flipscale.io.text_table import markdown_table

INTERVALS = """Intervals of 95 % treat the n queries as independent draws. They do not include the variation between
training runs."""
_OTHER = "other tasks"


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


def report(columns: Sequence[Column], suites: Sequence[str]) -> str:
    """Return `results.md`: the tables of the suites, further metrics, and how the results were made."""
    blocks = ["# Results", suite_tables(columns, suites)]
    others = [row for row in _rows_of(columns) if not row.is_main]
    if others:
        blocks.append("## Other metrics\n\n" + _table(_head(columns, False), [_cells(row, None) for row in others]))
    kinds = dict.fromkeys(line.result.kind for column in columns for line in column.lines)
    protocols = [KINDS[kind].protocol for kind in kinds if kind in KINDS]
    blocks += ["## How they were made", *filter(None, protocols), INTERVALS, _made(columns)]
    return "\n\n".join(blocks) + "\n"


def suite_tables(columns: Sequence[Column], suites: Sequence[str]) -> str:
    """Return a table with notes for each of `suites`, and a table of the other tasks."""
    groups: dict[str, list[Row]] = {suite: [] for suite in (*suites, _OTHER)}
    for row in (row for row in _rows_of(columns) if row.is_main):
        for suite in [suite for suite in suites if row.page and suite in row.page.suites] or [_OTHER]:
            groups[suite].append(row)
    groups = {suite: rows for suite, rows in groups.items() if rows}
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
