"""The report of a finished run, `RUN/report.html`: what it is, what it achieves, and what it says of pictures."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import yaml

from flipscale.data.decode import decode_small
from flipscale.data.faults import BadSample
from flipscale.evaluation.reports.curves import Curve, read_curve
from flipscale.evaluation.reports.record import data_name
from flipscale.evaluation.results import BEFORE, CHANGED, CHANGES, THIS_MODEL, Result, with_changes, with_unit
from flipscale.io.atomic import write_text
from flipscale.pages.answers import Answers, ClassRow, Mistake, class_rows, matrix, mistakes
from flipscale.pages.facts import Facts
from flipscale.pages.masks import mask_rows
from flipscale.pages.page import Picture, drawing, evenly, rendered, shortened, thumbnail
from flipscale.pages.tested import Load, Tested, answer_pictures, shown_task
from flipscale.training.recipe import Recipe
from flipscale.training.report import OWN_TASKS, evaluation_flags

REPORT = "report.html"
MOST_BYTES = 2_000_000

_SIDE = 112
_MOST_SHOWN, _MOST_CLASSES, _MOST_MISTAKES, _LARGEST_MATRIX = 12, 6, 9, 12
_MOST_LETTERS = 90
_MOST_FIGURES, _MOST_RESULTS = 8, 60

Made = TypeVar("Made")

_log = logging.getLogger(__name__)


def offer_report(recipe: Recipe, load: Load) -> None:
    """Write the report of a finished run and say where it is. That fails with one warning: a run is not worse for want
    of a page.

    Args:
        load: returns the model and the tokenizer of a folder.
    """
    path = Path(recipe.output_dir) / REPORT
    try:
        write_report(recipe, load)
        _log.info("%s shows the run: open it in a browser", path)
    except Exception as error:  # a page of anybody's pictures, texts and files: any
        _log.warning("%s was not written (%s); the run is whole without it", path, _reason(error))


def write_report(recipe: Recipe, load: Load) -> Path:
    """Write `report.html` into the run directory of a recipe and return its path. What the run has not recorded, or
    cannot be read any more, is left out and named on the page.

    Raises:
        ValueError: the run has no record.
        OSError: the disk is full or not writable.
    """
    run_dir = Path(recipe.output_dir)
    curve, facts = read_curve(run_dir), Facts.of(run_dir)
    missing: list[str] = []
    seen = _seen(recipe, load, facts.environment.get("mixed_precision", "no"), missing)
    masks = _tried("What was masked", missing, lambda: mask_rows(recipe)) or []
    figures = _figures(run_dir, curve, missing)
    values = {
        "name": run_dir.name,
        "sentence": facts.sentence(curve),
        "headline": headline(curve),
        "tiles": facts.tiles(curve),
        "results": result_rows(curve),
        "changed": CHANGED if any(result.who == BEFORE for result in curve.results) else "",
        "seen": seen,
        "masks": masks,
        "facts": facts.rows(curve),
        "recipe": facts.recipe_text(),
        "commands": _commands(run_dir, recipe.loss.kind),
        "missing": missing,
        "written": time.strftime("%d %B %Y", time.localtime()),
        "version": facts.environment.get("flipscale", ""),
    }
    path = run_dir / REPORT
    page = rendered("report.html", figures=figures, **values)
    while len(page.encode()) > MOST_BYTES and figures:
        figures.pop()
        page = rendered("report.html", figures=figures, **values)
    write_text(path, page)
    return path


def _seen(recipe: Recipe, load: Load, precision: str, missing: list[str]) -> "Seen | None":
    """Return what the model says of test pictures, None where it cannot be said."""
    task = shown_task(recipe.eval.planned())
    if task is None:
        missing.append(
            "What the model says of pictures: the recipe has no evaluation that names pictures or finds captions. "
            "eval.tasks lists evaluations."
        )
        return None
    folder = str(Path(recipe.output_dir) / "model")
    return _tried("The test pictures", missing, lambda: answered(answer_pictures(task, folder, load, precision)))


@dataclass(frozen=True)
class Card:
    """A test picture with what the model says of it.

    Args:
        picture: shrunk.
        right: its right answer.
        said: the nearest answers, each with its share in percent and whether it is the right one.
        note: a few words below.
    """

    picture: Picture
    right: str
    said: list[tuple[str, float, bool]]
    note: str = ""


@dataclass(frozen=True)
class Seen:
    """What a page shows of a model's answers.

    Args:
        data: what people call the test set.
        what: the answers are: `class` or `caption`.
        taken, total, num_right: pictures asked, all of the set, and those named right.
        answers: how many answers there are.
        cards: pictures evenly spread over the set.
        best, worst: of the classes or captions, with a picture of each.
        mistakes: those made most often.
        classes, counts: names of the classes, and how often each was said (column) of each (row); empty where there are
            too many for a table.
    """

    data: str
    what: str
    taken: int
    total: int
    num_right: int
    answers: int
    cards: list[Card]
    best: list[Card]
    worst: list[Card]
    mistakes: list[Card]
    classes: list[str]
    counts: list[list[int]]


def answered(tested: Tested) -> Seen:
    """Return what a page shows of answers.

    Raises:
        OSError: a shard cannot be read.
    """
    answers, rows = tested.answers, class_rows(tested.answers)
    half = min(_MOST_CLASSES, len(rows) // 2)
    best = [_card(tested, row.example, _fared(row)) for row in rows[:half] if row.num_right]
    worst = [_card(tested, row.example, _fared(row)) for row in rows[: -half - 1 : -1] if row.num_right < row.images]
    wrong = [
        _card(tested, mistake.example, f"taken for {_short(mistake.given)}, {_sure(answers, mistake)}")
        for mistake in mistakes(answers, _MOST_MISTAKES)
    ]
    what = "caption" if tested.task.kind == "retrieval" else "class"
    is_small = what == "class" and len(answers.names) <= _LARGEST_MATRIX
    return Seen(
        data=data_name(tested.task.data),
        what=what,
        taken=len(tested.rows),
        total=len(tested.pictures),
        num_right=answers.num_right,
        answers=len(answers.names),
        cards=[_card(tested, place) for place in evenly(len(tested.rows), _MOST_SHOWN)],
        best=best,
        worst=worst,
        mistakes=wrong,
        classes=[_short(name) for name in answers.names] if is_small else [],
        counts=matrix(answers) if is_small else [],
    )


def _card(tested: Tested, place: int, note: str = "") -> Card:
    answers: Answers = tested.answers
    right = answers.names[answers.right[place]]
    encoded = tested.pictures.image(int(tested.rows[place]))
    picture = thumbnail(decode_small(encoded, _SIDE), f"a test picture: {_short(right)}", _SIDE)
    said = [
        (_short(answers.names[number]), 100 * float(share), number == int(answers.right[place]))
        for number, share in zip(answers.top[place].tolist(), answers.shares[place], strict=True)
    ]
    if not note and not any(is_right for _, _, is_right in said):
        note = f"the right one is in place {answers.ranks[place] + 1:,}"
    return Card(picture, _short(right), said, note)


def _fared(row: ClassRow) -> str:
    if row.num_right == row.images:
        return "named right" if row.images == 1 else f"all {row.images} named right"
    place = f"the right answer in place {row.rank:,.0f}"
    if row.images > 1:
        place = f"{row.num_right} of {row.images} named right, {place} on average"
    often = "most often " if row.images - row.num_right > 1 else ""
    return f"{place}; {often}taken for {_short(row.taken_for)}"


def _sure(answers: Answers, mistake: Mistake) -> str:
    if mistake.count > 1:
        return f"{mistake.count}\u00a0times"
    return f"{100 * answers.shares[mistake.example, 0]:.0f}\u00a0% sure"


def _short(text: str) -> str:
    return shortened(text, _MOST_LETTERS)


def headline(curve: Curve) -> str | None:
    """Return the first headline result in words, None without a result."""
    result = next((r for r in curve.results if r.headline and r.who == THIS_MODEL), None)
    if result is None:
        return None
    interval = f" (95 % interval {result.interval_text})" if result.interval_text else ""
    chance = "" if result.chance is None else f"; guessing would reach {with_unit(result.chance, result.unit)}"
    if result.kind in ("zero_shot", "classification") and result.metric == "top1" and result.n is not None:
        where = _data(result)
        return f"Of {result.n:,} pictures{where} it names {result.value_text} right at once{interval}{chance}."
    queries = "" if result.n is None else f" over {result.n:,} queries"
    return f"{_test(result).capitalize()}, {result.shown}{queries}: {result.value_text}{interval}{chance}."


def result_rows(curve: Curve) -> dict[str, list[dict[str, str]]]:
    """Return the rows of the table of results by their tests, each by the names of its columns."""
    tests: dict[str, list[dict[str, str]]] = {}
    for result in with_changes(curve.results)[:_MOST_RESULTS]:
        row = {
            "metric": result.shown,
            "who": {THIS_MODEL: "", **dict(zip(CHANGES, CHANGES, strict=True))}.get(result.who, f"of {result.who}"),
            "value": result.value_text,
            "interval": result.interval_text,
            "chance": "" if result.chance is None else with_unit(result.chance, result.unit),
            "n": "" if result.n is None else f"{result.n:,}",
        }
        tests.setdefault(_test(result), []).append(row)
    return tests


def _test(result: Result) -> str:
    name = result.kind.replace("_", "-") if result.task == result.kind else result.task
    return shortened(f"{name}{_data(result)}", 60)


def _data(result: Result) -> str:
    return f" of {data_name(result.made_by['data'])}" if result.made_by.get("data") else ""


def _figures(run_dir: Path, curve: Curve, missing: list[str]) -> list[Picture]:
    """Return the run's figures: those of its own folder, else those of its model's card."""
    folders = (run_dir / "figures", run_dir / "model/figures")
    files = next((found for folder in folders if (found := sorted(folder.glob("*.png")))), [])
    if not files:
        missing.append("Figures: matplotlib draws them; pip install 'flipscale[plots]'.")
    places = {"loss": 0, "learning_rate": 2, "data_wait": 3}  # evaluations between them
    files.sort(key=lambda file: (places.get(file.stem, 1), file.stem))
    return [
        picture
        for file in files[:_MOST_FIGURES]
        if (picture := _tried(file.name, missing, partial(drawing, file, _figure_words(file.stem, curve))))
    ]


def _figure_words(stem: str, curve: Curve) -> str:
    """Return what a figure shows, in words that stand for it."""
    words = stem.replace("_", " ")
    values = curve.points({"learning_rate": "lr", "data_wait": "data_wait_share"}.get(stem, stem))[1]
    course = [m.result for m in curve.measured if m.result.task == stem and m.result.headline]
    if values:
        return f"{words.capitalize()} over the training: from {values[0]:.3g} to {values[-1]:.3g}"
    if course:
        first, last = course[0], next(r for r in reversed(course) if r.name == course[0].name)
        return f"{words.capitalize()}, {first.shown}, over the training: from {first.value_text} to {last.value_text}"
    return f"{words.capitalize()} over the training"


def _commands(run_dir: Path, loss_kind: str) -> Sequence[tuple[str, str]]:
    search = ("find your own pictures with it", f"flipscale search {run_dir} FOLDER 'a red apple'")
    return [
        *([] if loss_kind in OWN_TASKS else [search]),
        ("measure it on another test set", f"flipscale evaluate {run_dir} {evaluation_flags(loss_kind, 'FOLDER')}"),
        ("share it", f"flipscale push {run_dir} ORG/NAME"),
    ]


def _tried(what: str, missing: list[str], make: Callable[[], Made]) -> Made | None:
    """Return what `make` returns; where it fails, None, and a line of what is missing."""
    try:
        return make()
    except (ValueError, OSError, BadSample, RuntimeError, yaml.YAMLError, json.JSONDecodeError) as error:
        missing.append(f"{what}: {_reason(error)}.")
        return None


def _reason(error: Exception) -> str:
    return shortened(str(error), 300).rstrip(".") or type(error).__name__
