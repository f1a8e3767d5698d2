"""The report of a finished run, `RUN/report.html`: the run, its results, and its answers for test pictures."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml

from flipscale.data.decode import decode_small
from flipscale.data.samples import BadSample
from flipscale.evaluation.reports.curves import Curve, read_curve
from flipscale.evaluation.reports.record import data_name
from flipscale.evaluation.results import BEFORE, CHANGED, CHANGES, THIS_MODEL, Result, with_changes, with_unit
from flipscale.io.atomic import write_text
from flipscale.io.text_table import duration, rounded
from flipscale.pages.answers import (
    ClassRow,
    Load,
    Mistake,
    Tested,
    answer_pictures,
    class_rows,
    confusion,
    mistakes,
    shown_task,
)
from flipscale.pages.masks import mask_rows
from flipscale.pages.page import Picture, drawing, evenly, listed, rendered, shortened, thumbnail
from flipscale.training.recipe import Recipe, deciding_part
from flipscale.training.report import OWN_TASKS, evaluation_flags
from flipscale.training.run_summary import RunSummary

REPORT = "report.html"
MOST_BYTES = 2_000_000

_SIDE = 112
_MOST_SHOWN, _MOST_CLASSES, _MOST_MISTAKES, _LARGEST_MATRIX = 12, 6, 9, 12
_MOST_LETTERS, _MOST_RECIPE = 90, 20_000
_MOST_FIGURES, _MOST_RESULTS = 8, 60
# Pictures, texts and files on the page may be anybody's, or gone.
_FAULTS = (ValueError, OSError, BadSample, RuntimeError, yaml.YAMLError)

Made = TypeVar("Made")

_log = logging.getLogger(__name__)


def offer_report(recipe: Recipe, load: Load) -> None:
    """Write the report of a finished run and log its path. A failure is one warning, because the run is complete."""
    path = Path(recipe.output_dir) / REPORT
    try:
        write_report(recipe, load)
        _log.info("%s shows the run: open it in a browser", path)
    except _FAULTS as error:
        _log.warning("%s was not written (%s); the run is complete without it", path, _reason(error))


def write_report(recipe: Recipe, load: Load) -> Path:
    """Write `report.html` into the run directory of a recipe and return its path. The page names its missing parts."""
    run_dir = Path(recipe.output_dir)
    curve, run = read_curve(run_dir), RunSummary(run_dir)
    config = json.loads((run_dir / "model/config.json").read_text(encoding="utf-8"))
    missing: list[str] = []
    seen = _seen(recipe, load, run.environment.get("mixed_precision", "no"), missing)
    masks = _try_part("What was masked", missing, lambda: mask_rows(recipe)) or []
    figures = _figures(run_dir, curve, missing)
    values = {
        "name": run_dir.name,
        "sentence": run_sentence(run, config),
        "headline": _headline(curve),
        "tiles": _tiles(run, config, curve),
        "results": _result_rows(curve),
        "changed": CHANGED if any(result.who == BEFORE for result in curve.results) else "",
        "seen": seen,
        "masks": masks,
        "facts": [(name, text) for name, text in fact_rows(run) if text],
        "recipe": _recipe_text(run.recipe),
        "commands": _commands(run_dir, recipe.loss.kind),
        "missing": missing,
        "written": time.strftime("%d %B %Y", time.localtime()),
        "version": run.environment.get("flipscale", ""),
    }
    path = run_dir / REPORT
    page = rendered("report.html", figures=figures, **values)
    while len(page.encode()) > MOST_BYTES and figures:
        figures.pop()
        page = rendered("report.html", figures=figures, **values)
    write_text(path, page)
    return path


def run_sentence(run: RunSummary, config: dict[str, Any]) -> str:
    """Return a few sentences about the model, its data and its training; `config` is the model's."""
    samples, image_size = _samples(config), config["vision_config"]["image_size"]
    parameters = run.environment.get("num_parameters") or 0
    count = f"{parameters:,}" if parameters < 1e6 else f"{parameters / 1e6:,.1f} million"
    size = f" of {count} parameters" if parameters else ""
    model = f"pictures and words{size}"
    if samples == "pictures":
        model = f"pictures{size} that knows {len(config['id2label']):,} classes"
    sizes = {stage["name"]: stage["image_size"] for stage in run.recipe["stages"] if stage.get("image_size")}
    other_sizes = listed([f"{size} x {size} in the stage {name}" for name, size in sizes.items()])
    return (
        f"A model of {model}. It learned from {run.records[-1]['samples_seen']:,} {samples}{_data_words(run)} in "
        f"{duration(run.trained_seconds)} of training, {_mask_words(run, samples)}; its pictures have {image_size} x "
        f"{image_size} pixels{', ' + other_sizes if other_sizes else ''}."
    )


def _samples(config: dict[str, Any]) -> str:
    """Return the name of the training samples: a classifier learns from labelled pictures."""
    return "pictures" if config.get("architectures") == ["FlipForImageClassification"] else "pairs"


def _data_words(run: RunSummary) -> str:
    data, count = run.recipe["data"], run.environment.get("data_samples")
    sources = [source.get("dataset") or source.get("shards") or "" for source in data.get("sources") or []]
    names = [data_name(place) for place in (sources or [data.get("shards") or ""]) if place]
    words = f" of {shortened(listed(names), 80)}" if names else ""
    return words + (f" (which holds {count:,})" if count else "")


def _mask_words(run: RunSummary, samples: str) -> str:
    ratios = [stage.get("mask_ratio") or 0.0 for stage in run.recipe["stages"]]
    most = max(ratios)
    method = f" ({'FLIP' if most else 'CLIP'})" if samples == "pairs" else ""
    if not most:
        return f"with every picture whole{method}"
    if ratios[-1] == 0 < ratios[0]:
        return f"first with {100 * ratios[0]:g} % of each picture left out, at the end with whole pictures{method}"
    return f"with {100 * most:g} % of each picture left out{method}"


def _tiles(run: RunSummary, config: dict[str, Any], curve: Curve) -> list[tuple[str, str]]:
    """Return the large figures at the top, each with its name."""
    main = [r for r in curve.results if r.headline and r.who == THIS_MODEL][:2]
    return [
        *((result.value_text, result.shown) for result in main),
        (f"{run.records[-1]['samples_seen']:,}", f"{_samples(config)} seen"),
        (duration(run.trained_seconds), "of training"),
        *([(f"{curve.images_per_s:,.0f}", f"{_samples(config)} a second")] if run.trained_seconds else []),
    ]


def fact_rows(run: RunSummary) -> Iterator[tuple[str, str]]:
    """Yield names and values about the machine, the time and the cost; unknown values are empty."""
    environment, cost = run.environment, run.cost
    hours, co2, dollars, kwh = run.device_hours, run.co2_kg, run.dollars, run.energy.kwh
    waited, peak = run.latest("data_wait_share"), run.peak_memory_bytes
    precision = str(environment.get("mixed_precision", ""))
    bad, skipped = run.total("num_replaced"), run.total("num_skipped")
    versions = [f"{name} {environment[name]}" for name in ("flipscale", "torch", "python") if environment.get(name)]
    yield "machine", listed(run.hardware)
    yield "processes", listed(list(dict.fromkeys(_processes(start) for start in run.kept_starts)))
    yield "precision", "fp32" if precision == "no" else precision
    yield "training", duration(run.trained_seconds) + ", without evaluations and saves"
    yield "device hours", "" if hours is None else rounded(hours)
    yield "energy", "" if kwh is None else f"{rounded(kwh)} kWh, {run.energy.words}"
    yield "emissions", f"{rounded(co2)} kg of CO2 at {cost.kwh_co2_grams:g} g a kWh" if co2 else ""
    yield "cost", f"{rounded(dollars)} dollars at {cost.device_hour_dollars:g} an hour" if dollars else ""
    yield "waiting for data", "" if waited is None else f"{100 * waited:.1f} % of the last interval"
    yield "memory", f"{peak / 2**30:.1f} GiB at most, of the main process" if peak else ""
    yield "bad samples", f"{bad:,} replaced" if bad else "none"
    yield "skipped steps", f"{skipped:,}, not finite" if skipped else "none"
    yield "versions", ", ".join(versions)


def _processes(start: dict[str, Any]) -> str:
    count = start["num_processes"]
    return f"{count} process{'es' * (count != 1)}" + (f" under {start['engine']}" if start.get("engine") else "")


def _recipe_text(recipe: dict[str, Any]) -> str:
    """Return the recipe's fields that decide what is learned, without paths of this machine."""
    text = yaml.safe_dump(deciding_part(recipe, name_of=data_name), sort_keys=False, allow_unicode=True)
    return text if len(text) <= _MOST_RECIPE else f"{text[:_MOST_RECIPE]}\n# ... the rest is in recipe.yaml"


@dataclass(frozen=True)
class Card:
    """A test picture, the right answer, the nearest answers (share in percent, whether right), and words below."""

    picture: Picture
    right: str
    said: list[tuple[str, float, bool]]
    note: str = ""


@dataclass(frozen=True)
class Seen:
    """The section on a model's answers.

    Args:
        what: kind of the answers, `class` or `caption`.
        taken: number of answered pictures.
        total: number of pictures in the set.
        answers: number of possible answers.
        cards: pictures evenly spread over the set.
        best: best classes or captions, with a picture of each.
        worst: worst classes or captions, with a picture of each.
        classes: names of the classes; empty if there are too many for a table.
        counts: confusion matrix; empty if there are too many classes.
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


def _seen(recipe: Recipe, load: Load, precision: str, missing: list[str]) -> Seen | None:
    task = shown_task(recipe.eval.planned())
    if task is None:
        missing.append(
            "The model's answers for pictures: the recipe has no evaluation that names pictures or finds captions. "
            "eval.tasks lists evaluations."
        )
        return None
    folder = str(Path(recipe.output_dir) / "model")
    return _try_part("The test pictures", missing, lambda: _section(answer_pictures(task, folder, load, precision)))


def _section(tested: Tested) -> Seen:
    answers, rows = tested.answers, class_rows(tested.answers)
    half = min(_MOST_CLASSES, len(rows) // 2)
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
        best=[_card(tested, row.example, _row_note(row)) for row in rows[:half] if row.num_right],
        worst=[
            _card(tested, row.example, _row_note(row)) for row in rows[: -half - 1 : -1] if row.num_right < row.images
        ],
        mistakes=[
            _card(tested, mistake.example, _mistake_note(tested, mistake))
            for mistake in mistakes(answers, _MOST_MISTAKES)
        ],
        classes=[_short(name) for name in answers.names] if is_small else [],
        counts=confusion(answers) if is_small else [],
    )


def _card(tested: Tested, place: int, note: str = "") -> Card:
    answers = tested.answers
    right = _short(answers.names[answers.right[place]])
    encoded = tested.pictures.image(int(tested.rows[place]))
    picture = thumbnail(decode_small(encoded, _SIDE), f"a test picture: {right}", _SIDE)
    said = [
        (_short(answers.names[index]), 100 * float(share), index == int(answers.right[place]))
        for index, share in zip(answers.top[place].tolist(), answers.shares[place], strict=True)
    ]
    if not note and not any(is_right for _, _, is_right in said):
        note = f"the right answer has rank {answers.ranks[place] + 1:,}"
    return Card(picture, right, said, note)


def _row_note(row: ClassRow) -> str:
    if row.num_right == row.images:
        return "named right" if row.images == 1 else f"all {row.images} named right"
    rank = f"the right answer has rank {row.rank:,.0f}"
    if row.images > 1:
        rank = f"{row.num_right} of {row.images} named right, mean rank {row.rank:,.0f}"
    often = "most often " if row.images - row.num_right > 1 else ""
    return f"{rank}; {often}taken for {_short(row.taken_for)}"


def _mistake_note(tested: Tested, mistake: Mistake) -> str:
    share = tested.answers.shares[mistake.example, 0]
    count = f"{mistake.count}\u00a0times" if mistake.count > 1 else f"{100 * share:.0f}\u00a0% sure"
    return f"taken for {_short(mistake.given)}, {count}"


def _short(text: str) -> str:
    return shortened(text, _MOST_LETTERS)


def _headline(curve: Curve) -> str | None:
    """Return a sentence about the first headline result, or None without results."""
    result = next((r for r in curve.results if r.headline and r.who == THIS_MODEL), None)
    if result is None:
        return None
    interval = f" (95 % interval {result.interval_text})" if result.interval_text else ""
    chance = "" if result.chance is None else f"; guessing would reach {with_unit(result.chance, result.unit)}"
    if result.kind in ("zero_shot", "classification") and result.metric == "top1" and result.n is not None:
        return f"Of {result.n:,} pictures{_of_data(result)} it names {result.value_text} right{interval}{chance}."
    queries = "" if result.n is None else f" over {result.n:,} queries"
    return f"{_test(result).capitalize()}, {result.shown}{queries}: {result.value_text}{interval}{chance}."


def _result_rows(curve: Curve) -> dict[str, list[dict[str, str]]]:
    """Return the rows of the table of results by test, each as a dictionary of its columns."""
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
    return shortened(f"{name}{_of_data(result)}", 60)


def _of_data(result: Result) -> str:
    return f" of {data_name(result.made_by['data'])}" if result.made_by.get("data") else ""


def _figures(run_dir: Path, curve: Curve, missing: list[str]) -> list[Picture]:
    """Return the figures of the run's own folder, or else of its model's card."""
    folders = (run_dir / "figures", run_dir / "model/figures")
    files = next((pngs for folder in folders if (pngs := sorted(folder.glob("*.png")))), [])
    if not files:
        missing.append("Figures: matplotlib draws them; pip install 'flipscale[plots]'.")
    places = {"loss": 0, "learning_rate": 2, "data_wait": 3}  # evaluations have place 1
    files.sort(key=lambda file: (places.get(file.stem, 1), file.stem))
    return [
        picture
        for file in files[:_MOST_FIGURES]
        if (picture := _try_part(file.name, missing, partial(drawing, file, _figure_words(file.stem, curve))))
    ]


def _figure_words(stem: str, curve: Curve) -> str:
    """Return a text that replaces a figure for readers who cannot see it."""
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


def _try_part(name: str, missing: list[str], make: Callable[[], Made]) -> Made | None:
    """Return a part of the page; if it fails, add its name and the reason to `missing` and return None."""
    try:
        return make()
    except _FAULTS as error:
        missing.append(f"{name}: {_reason(error)}.")
        return None


def _reason(error: Exception) -> str:
    return shortened(str(error), 300).rstrip(".") or type(error).__name__
