"""Runs side by side: differing fields of their recipes, curves over each other, and differences of their results."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from flipscale.evaluation.model_results import data_name
from flipscale.evaluation.presentation.curves import Curve, read_curve, times_to_equal
from flipscale.evaluation.presentation.figures import can_draw, draw_curves
from flipscale.evaluation.results import NOTHING, THIS_MODEL, Result, change_of
from flipscale.io.atomic import write_text
from flipscale.io.text_table import duration, markdown_table
from flipscale.pages.page import Picture, drawing, rendered, shortened
from flipscale.pages.run_page import try_part
from flipscale.training.run_summary import RunSummary

INTERVALS = """The interval of a difference is of paired answers where runs keep the answer to each query: top-1, and
recalls of image to text. Others are Newcombe's for independent figures, which are wider. No interval covers the
difference between seeds. A dash marks results of different tests."""
_MOST_LETTERS = 60


@dataclass(frozen=True)
class Comparison:
    """Runs to compare; the first is the one that the others are compared with. Tables begin with their head.

    Args:
        fields: rows of a differing field and its value in each run.
        results: rows of a result, its last value in each run, and its differences. The first two are the runs' lengths.
        notes: sentences on the results, and how much sooner the better run reaches the last result of the other.
    """

    curves: list[Curve]
    fields: list[list[str]]
    results: list[list[str]]
    notes: list[str]

    @classmethod
    def of(cls, run_dirs: Sequence[Path]) -> "Comparison":
        """Return the comparison of run directories. Raise UserError for one without a recipe or a record."""
        runs = [RunSummary(run_dir) for run_dir in run_dirs]
        assert all(run.batch_size for run in runs)  # reads and checks the recipe
        names = [run_dir.resolve().name for run_dir in run_dirs]
        if len(set(names)) < len(names):
            names = [str(run_dir) for run_dir in run_dirs]
        # Runs that differ only in their seeds are lines of their own, too.
        curves = [
            replace(read_curve(run_dir), name=name, learned=name, seed=-1)
            for run_dir, name in zip(run_dirs, names, strict=True)
        ]
        recipes = [dict(_flat({**run.recipe, "output_dir": None})) for run in runs]
        flags = dict.fromkeys(chain(*recipes))
        rows = [[flag, *(recipe.get(flag, NOTHING) for recipe in recipes)] for flag in flags]
        fields = [["field", *names], *(row for row in rows if len(set(row[1:])) > 1)]
        return cls(curves, fields, _results(curves), [INTERVALS.replace("\n", " "), *times_to_equal(curves)])

    def text(self) -> str:
        """Return the comparison without its curves, as Markdown."""
        fields = [[row[0], *(shortened(value, _MOST_LETTERS) for value in row[1:])] for row in self.fields]
        differing = markdown_table(fields, len(fields[0])) if len(fields) > 1 else "The recipes are equal."
        return "\n\n".join([differing, markdown_table(self.results, 1), *self.notes])


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page of a comparison. The page names its missing parts."""
    missing: list[str] = []
    figures = try_part("Curves", missing, partial(_draw, comparison.curves)) or []
    write_text(path, rendered("comparison.html", comparison=comparison, figures=figures, missing=missing))


def _draw(curves: list[Curve]) -> list[Picture]:
    if not can_draw():
        raise ModuleNotFoundError("matplotlib draws them; pip install 'flipscale[plots]'")
    pictures, names = [], " and ".join(curve.name for curve in curves)
    with tempfile.TemporaryDirectory() as folder:
        for along, words in (("samples_seen", "the samples seen"), ("trained_seconds", "the training time")):
            own = [replace(curve, along=along) for curve in curves]
            for task, result in draw_curves(own, Path(folder)):
                shown = f"{task}, {result.shown}," if result else "Loss"
                pictures.append(drawing(Path(folder, f"{task}.png"), f"{shown} of {names} against {words}"))
    return pictures


def _results(curves: Sequence[Curve]) -> list[list[str]]:
    by_run = [{r.name: r for r in curve.results if r.who == THIS_MODEL and not r.is_certain} for curve in curves]
    first, *others = by_run
    lasts = [curve.records[-1] for curve in curves]
    rows = [
        ["result", *(curve.name for curve in curves), *(f"{one.name} against {curves[0].name}" for one in curves[1:])],
        ["samples seen", *(f"{last['samples_seen']:,}" for last in lasts), *[""] * len(others)],
        ["training time", *(duration(last["trained_seconds"]) for last in lasts), *[""] * len(others)],
    ]
    for name in dict.fromkeys(chain(*by_run)):
        own = [results.get(name) for results in by_run]
        shown = next(result for result in own if result is not None)
        changes = [_change(results.get(name), first.get(name)) for results in others]
        values = [NOTHING if result is None else result.estimate_text for result in own]
        rows.append([f"{shown.task} {shown.shown}", *values, *changes])
    return rows


def _change(new: Result | None, old: Result | None) -> str:
    """Return a difference with its interval and a word, or a dash for results that do not belong to the same test."""
    if new is None or old is None or _test(new) != _test(old):
        return NOTHING
    change = change_of(new, old)
    return f"{change.estimate_text}, {change.who}"


def _test(result: Result) -> list[Any]:
    places = {name: data_name(value) for name, value in result.made_by.items() if isinstance(value, str)}
    return [result.kind, result.n, result.unit, {**result.made_by, **places}]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the fields of a recipe by their flags, such as `stages.masked.base_lr`, each with its value as text."""
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        value = {str(one.get("name", number)): one for number, one in enumerate(value)}
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
