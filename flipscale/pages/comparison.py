"""Runs side by side: differing fields of their recipes, curves over each other, and differences of their results."""

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml

from flipscale.evaluation.presentation.curves import Curve, read_curve, times_to_equal
from flipscale.evaluation.presentation.figures import can_draw, draw_curves
from flipscale.evaluation.results import NOTHING, THIS_MODEL, Result, change_of
from flipscale.io.atomic import write_text
from flipscale.io.text_table import duration, markdown_table
from flipscale.pages.page import Picture, drawing, rendered, shortened
from flipscale.pages.run_page import try_part
from flipscale.recipe.optim import StageRecipe
from flipscale.recipe.recipe import Recipe, to_yaml
from flipscale.records.run_summary import RunSummary

INTERVALS = """The interval of a difference is of paired answers where runs keep the answer to each query: top-1, and
recalls of image to text. Others are Newcombe's for independent figures, which are wider. No interval covers the
difference between seeds. A dash marks results of different tests, or of a test that a run has not recorded."""
_MOST_LETTERS = 60


@dataclass(frozen=True)
class Comparison:
    """Runs to compare; the first is the one that the others are compared with. Tables begin with their head.

    Args:
        fields: rows of a differing field, its value in each run and its default.
        shared: rows of a field that is equal in all runs and not its default, with its value and its default.
        results: rows of a result, its last value in each run, and its differences. The first two are the runs' lengths.
        notes: sentences on the results, and how much sooner the better run reaches the last result of the other.
    """

    curves: list[Curve]
    fields: list[list[str]]
    shared: list[list[str]]
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
        default_recipe = yaml.safe_load(to_yaml(Recipe(stages=[StageRecipe("")])))
        given = [default_recipe, *(run.recipe for run in runs)]
        defaults, *recipes = (dict(_flat({**recipe, "output_dir": None})) for recipe in given)
        rows = []
        for flag in dict.fromkeys(chain(*recipes)):
            default = defaults.get(re.sub(r"^stages\..*\.|^stages$", "stages.0.", flag), NOTHING)
            rows.append([flag, *(recipe.get(flag, NOTHING) for recipe in recipes), default])
        # A section that a run lacks is in the row of its list, and its defaults are no differences.
        fields = [row for row in rows if len(set(row[1:-1])) > 1 and {*row[1:]} != {NOTHING, row[-1]}]
        shared = [[row[0], *row[-2:]] for row in rows if len(set(row[1:-1])) == 1 and row[1] != row[-1]]
        curves, notes = _with_common_names(curves)
        # Times are compared in the same tests only.
        known = [replace(c, measured=[one for one in c.measured if one.result.test]) for c in curves]
        notes = [INTERVALS.replace("\n", " "), *notes, *times_to_equal(known)]
        heads = ["field", *names, "default"], ["field", "all runs", "default"]
        return cls(curves, [heads[0], *fields], [heads[1], *shared], _results(curves), notes)

    def text(self) -> str:
        """Return the comparison without its curves, as Markdown."""
        short = [
            [[shortened(cell, _MOST_LETTERS) for cell in row] for row in rows] for rows in (self.fields, self.shared)
        ]
        tables = [markdown_table(rows, len(rows[0])) for rows in short if len(rows) > 1]
        equal = ["The recipes are equal."] if len(self.fields) == 1 else []
        return "\n\n".join([*equal, *tables, markdown_table(self.results, 1), *self.notes])


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


def _with_common_names(curves: Sequence[Curve]) -> tuple[list[Curve], list[str]]:
    """Return the curves with tasks of one name if, and only if, they are one test, and sentences about the names."""
    names: dict[str, str] = {}  # by test
    named, notes = [], []
    for curve in curves:
        own = {result.task: result.test or f" {result.task}" for result in curve.results if result.who == THIS_MODEL}
        for task, test in own.items():
            what, others = "the same" if test in names else "other", (f"{task} ({number})" for number in count(2))
            names.setdefault(test, next(name for name in chain([task], others) if name not in names.values()))
            if names[test] != task:
                notes.append(f"{names[test]} is {task} of {curve.name}, with {what} images, answers and options.")
            if test == f" {task}":
                notes.append(f"{curve.name} did not record the test of {task}, so its differences are unknown.")
        tasks = {task: names[test] for task, test in own.items()}
        results = [replace(one.result, task=tasks.get(one.result.task, one.result.task)) for one in curve.measured]
        measured = [replace(one, result=result) for one, result in zip(curve.measured, results, strict=True)]
        named.append(replace(curve, measured=measured))
    return named, notes


def _change(new: Result | None, old: Result | None) -> str:
    """Return a difference with its interval and a word, or a dash for results that do not belong to the same test."""
    if new is None or old is None or not new.test or (new.test, new.n, new.unit) != (old.test, old.n, old.unit):
        return NOTHING
    change = change_of(new, old)
    return f"{change.estimate_text}, {change.who}"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the fields of a recipe by their flags, such as `stages.masked.base_lr`, each with its value as text. The
    value of a list of sections is their names in order."""
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        names = [str(one.get("name") or number) for number, one in enumerate(value)]
        yield name, ", ".join(names)
        names = names if len(set(names)) == len(names) else [str(number) for number in range(len(value))]
        value = {key: {**one, "name": None} for key, one in zip(names, value, strict=True)}
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
