"""Models side by side, as Markdown: a table for each suite, what the figures are not, and how they were made."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flipscale.evaluation.kinds.kinds import KINDS
from flipscale.evaluation.reports.record import Line
from flipscale.evaluation.results import NOTHING, Result, with_unit
from flipscale.evaluation.task_page import Reference, TaskPage, read_page, suite_pages
from flipscale.io.text_table import markdown_table

PAPER_MODEL = "FLIP L/14, LAION-400M"  # it has figures for every task of the paper
INTERVALS = """Intervals of 95 % take the n queries for independent draws; they say nothing of how another training run
would differ."""
_OTHER = "other tasks"


@dataclass(frozen=True)
class Column:
    """A model's column: what tables call it, and its lines."""

    name: str
    lines: Sequence[Line]

    def find(self, task: str, metric: str) -> Line | None:
        """Return its line of a task's metric."""
        return next((line for line in self.lines if (line.result.task, line.result.metric) == (task, metric)), None)


@dataclass(frozen=True)
class Row:
    """A task's metric, and the lines of the models that have it, None for those that have not."""

    task: str
    metric: str
    title: str
    page: TaskPage | None
    lines: tuple[Line | None, ...]

    @property
    def result(self) -> Result:
        """The result of the first model that has one."""
        return self.present[0].result

    @property
    def present(self) -> list[Line]:
        """The lines that there are."""
        return [line for line in self.lines if line is not None]

    @property
    def paper(self) -> float | None:
        """The paper's figure, where it may stand beside these."""
        reference = self._reference()
        return reference.value if reference and not self.why_not else None

    @property
    def paper_text(self) -> str:
        """The paper's figure, and what model it is of if not `PAPER_MODEL`; empty where it may not stand here."""
        reference = self._reference()
        if reference is None or self.why_not:
            return ""
        model = "" if reference.model == PAPER_MODEL else f" ({reference.model})"
        return with_unit(reference.value, self.result.unit) + model

    @property
    def why_not(self) -> str:
        """Why the paper's figure may not stand beside these; empty where it may, or there is none."""
        if self.page is None or self._reference() is None:
            return ""
        if not self.page.comparable:
            return self.page.why_not
        return next((reason for line in self.present for reason in _departures(line, self.page)), "")

    @property
    def is_main(self) -> bool:
        """Whether it belongs to the suite's table: a headline, or a metric that the paper reports."""
        return self.result.headline or self._reference() is not None

    def _reference(self) -> Reference | None:
        """Return the paper's figure of `PAPER_MODEL`, else the first that it has."""
        found = [one for one in self.page.reference if one.metric == self.metric] if self.page else []
        return next((one for one in found if one.model == PAPER_MODEL), next(iter(found), None))


def rows_of(columns: Sequence[Column]) -> list[Row]:
    """Return a row for each task and metric, in the order in which the models have them."""
    seen: dict[tuple[str, str], Line] = {}
    for column in columns:
        for line in column.lines:
            seen.setdefault((line.result.task, line.result.metric), line)
    rows = []
    for (task, metric), line in seen.items():
        page = read_page(line.about["page"]) if line.about.get("page") else None
        found = tuple(column.find(task, metric) for column in columns)
        rows.append(Row(task, metric, line.about.get("title") or task, page, found))
    return rows


def by_suite(rows: Iterable[Row], suites: Sequence[str], is_once: bool = False) -> dict[str, list[Row]]:
    """Return the rows of each of `suites`, and last those of none.

    Args:
        is_once: whether a row of several suites stands in the first of them only.
    """
    groups: dict[str, list[Row]] = {suite: [] for suite in (*suites, _OTHER)}
    for row in rows:
        own = [suite for suite in suites if row.page and suite in row.page.suites] or [_OTHER]
        for suite in own[: 1 if is_once else None]:
            groups[suite].append(row)
    return {suite: found for suite, found in groups.items() if found}


def suite_tables(columns: Sequence[Column], suites: Sequence[str]) -> str:
    """Return a table for each of `suites`, under its name and with its notes, and one of the other tasks."""
    groups = by_suite([row for row in rows_of(columns) if row.is_main], suites)
    return "\n\n".join(_suite(suite, rows, columns, len(groups) == 1) for suite, rows in groups.items())


def report(columns: Sequence[Column], suites: Sequence[str], picture: str | None) -> str:
    """Return `results.md`: the tables of the suites, the other figures, and how all were made; `picture` is a file."""
    blocks = ["# Results", suite_tables(columns, suites)]
    if picture:
        blocks.append(f"![The first headline of each task, with its 95 % interval]({picture})")
    others = [row for row in rows_of(columns) if not row.is_main]
    if others:
        blocks.append("## Other metrics\n\n" + _table(_head(columns, False), [_cells(row, None) for row in others]))
    kinds = dict.fromkeys(line.result.kind for column in columns for line in column.lines)
    protocols = [KINDS[kind].protocol for kind in kinds if kind in KINDS]
    blocks += ["## How they were made", *filter(None, protocols), INTERVALS, _made(columns)]
    return "\n\n".join(blocks) + "\n"


def _suite(suite: str, rows: list[Row], columns: Sequence[Column], is_alone: bool) -> str:
    """Return the table of a suite, the means over it, and its footnotes."""
    notes: dict[str, int] = {}
    for row in rows:
        if row.why_not:
            notes.setdefault(row.why_not, len(notes) + 1)
    has_paper = bool(notes) or any(row.paper_text for row in rows)
    cells = [_cells(row, notes if has_paper else None) for row in rows]
    means, missing = ([], "") if suite == _OTHER else _means(suite, rows, columns)
    heading = "" if suite == _OTHER and is_alone else f"## {suite.capitalize()}"
    blocks = [heading, _table(_head(columns, has_paper), [*cells, *means]), missing]
    blocks.append("\n".join(f"[{number}] Not comparable with the paper: {why}" for why, number in notes.items()))
    return "\n\n".join(filter(None, blocks))


def _means(suite: str, rows: list[Row], columns: Sequence[Column]) -> tuple[list[list[str]], str]:
    """Return the row of means over a suite, with those models that have every task of it; and what others lack."""
    pages = suite_pages(suite)
    values, said = [], []
    for number, column in enumerate(columns):
        lines = {(row.task, row.metric): row.lines[number] for row in rows}
        found = {page.name: line for page in pages if (line := lines.get((page.name, page.metric)))}
        missing = [page.name for page in pages if page.name not in found]
        values.append(NOTHING if missing else _mean(list(found.values())))
        if missing:
            some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            lacks = f"{len(missing)} of the suite's {len(pages)} tasks are missing ({some})"
            said.append(f"No mean for {column.name}: {lacks}.")
    has_mean = any(value != NOTHING for value in values)
    return [[f"mean of {len(pages)}", "", *values, "", "", ""]] if has_mean else [], "\n\n".join(said)


def _mean(lines: Sequence[Line]) -> str:
    """Return the mean of percentages; a dash where one is none."""
    mean = sum(line.result.value for line in lines) / len(lines)
    return f"{mean:.1f} %" if math.isfinite(mean) else NOTHING


def _head(columns: Sequence[Column], has_paper: bool) -> list[str]:
    paper = [f"{PAPER_MODEL}, in the paper"] if has_paper else []
    return ["task", "metric", *(column.name for column in columns), "n", "chance", *paper]


def _cells(row: Row, notes: dict[str, int] | None) -> list[str]:
    """Return the cells of a row; without `notes` it has none for the paper."""
    result, sizes = row.result, dict.fromkeys(line.result.n for line in row.present)
    cells = [row.title, result.shown, *(_value(line) for line in row.lines)]
    cells.append(" / ".join(NOTHING if n is None else f"{n:,}" for n in sizes))
    cells.append(NOTHING if result.chance is None else with_unit(result.chance, result.unit))
    if notes is not None:
        cells.append(f"[{notes[row.why_not]}]" if row.why_not else row.paper_text or NOTHING)
    return cells


def _value(line: Line | None) -> str:
    return NOTHING if line is None else line.result.estimate_text


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table whose columns are also aligned as plain text."""
    rows = [row[: len(head)] for row in rows]
    rows = [row + [""] * (len(head) - len(row)) for row in rows]
    return markdown_table([head, *rows], num_names=2)  # the task and the metric


def _departures(line: Line, page: TaskPage) -> Iterable[str]:
    """Yield what was done otherwise than the page has it."""
    about = line.about
    if about.get("mask"):
        yield "the images were masked"
    if about["data"].get("images") != page.images:
        yield f"{about['data'].get('images'):,} images here, {page.images:,} there"
    prompts = (about.get("prompts") or {}).get("number", 0)
    if page.num_prompts and prompts != page.num_prompts:
        yield f"{prompts} prompts here, {page.num_prompts} there"


def _made(columns: Sequence[Column]) -> str:
    """Return a table of the models: their weights, and what was done to images."""
    rows = []
    for column in columns:
        abouts = [line.about for line in column.lines]
        masks = (", ".join(f"{key} {value}" for key, value in about["mask"].items()) for about in abouts)
        versions = (", ".join(f"{name} {number}" for name, number in about["versions"].items()) for about in abouts)
        rows.append(
            [
                column.name,
                _all(f"`{about['weights'][:12]}`" for about in abouts),
                _all(f"{about['image_size']} px" for about in abouts),
                _all(mask or "whole" for mask in masks),
                _all(about["precision"] for about in abouts),
                _all(versions),
            ]
        )
    return _table(["model", "weights", "images", "seen", "precision", "versions"], rows)


def _all(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))
