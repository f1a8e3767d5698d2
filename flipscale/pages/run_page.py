"""The report of a finished run, `RUN/report.html`: the run, its results, and its answers for test pictures."""

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from flipscale.data.decode import decode_small
from flipscale.data.pairs import InputShape
from flipscale.data.samples import evenly
from flipscale.data.sources.opening import open_source
from flipscale.data.tokenizers import load_tokenizer
from flipscale.evaluation.model_results import data_name
from flipscale.evaluation.presentation.curves import read_curve
from flipscale.evaluation.results import BEFORE, CHANGED, CHANGES, THIS_MODEL, Result, with_changes, with_unit
from flipscale.evaluation.suite import planned_tasks
from flipscale.evaluation.test_set import kept_class_names
from flipscale.io.atomic import write_text
from flipscale.objectives.build import build_config, build_objective
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
from flipscale.pages.page import Picture, drawing, listed, rendered, shortened, thumbnail
from flipscale.recipe.recipe import Recipe, deciding_part
from flipscale.runs.last_lines import OWN_TASKS, evaluation_flags
from flipscale.training.console import only_describes
from flipscale.training.run_summary import RunSummary

REPORT = "report.html"
MOST_BYTES = 2_000_000

_SIDE, _MASK_SIDE = 112, 96
_MOST_SHOWN, _MOST_CLASSES, _MOST_WRONG, _LARGEST_MATRIX = 12, 6, 9, 12
_MOST_LETTERS = 90
_MOST_FIGURES, _MOST_RESULTS = 8, 60

Made = TypeVar("Made")

_log = logging.getLogger(__name__)


def offer_page(recipe: Recipe, load: Load) -> None:
    """Write the report of a finished run and log its path. A failure is one warning, because the run is complete."""
    path = Path(recipe.output_dir) / REPORT
    retry = ("flipscale", "pretrain", "--config", str(path.with_name("recipe.yaml")))
    with only_describes(path, path.parent, retry):
        write_report(recipe, load)
        _log.info("%s shows the run: open it in a browser", path)


def write_report(recipe: Recipe, load: Load) -> Path:
    """Write `report.html` into the run directory of a recipe and return its path. The page names its missing parts."""
    run_dir = Path(recipe.output_dir)
    curve, run = read_curve(run_dir), RunSummary(run_dir)
    config = json.loads((run_dir / "model/config.json").read_text(encoding="utf-8"))
    missing: list[str] = []
    shown = with_changes(curve.results)
    tests: dict[str, list[Result]] = {}
    for result in shown[:_MOST_RESULTS]:
        tests.setdefault(_test(result), []).append(result)
    data = run.recipe["data"]
    places = [source.get("dataset") or source.get("shards") for source in data.get("sources") or [data]]
    values = {
        "run": run,
        "config": config,
        "is_classifier": config.get("architectures") == ["FlipForImageClassification"],
        "origin": shortened(listed([data_name(place) for place in places if place]), 80),
        "speed": curve.images_per_s if run.trained_seconds else None,
        "main": [result for result in shown if result.headline and result.who == THIS_MODEL][:2],
        "tests": tests,
        "test_name": _test,
        "of_data": _of_data,
        "with_unit": with_unit,
        "this_model": THIS_MODEL,
        "changes": CHANGES,
        "changed": CHANGED if any(result.who == BEFORE for result in curve.results) else "",
        "seen": _seen(recipe, load, run.environment.get("mixed_precision", "no"), missing),
        "masks": try_part("What was masked", missing, lambda: mask_rows(recipe)) or {},
        "recipe": yaml.safe_dump(deciding_part(run.recipe, name_of=data_name), sort_keys=False, allow_unicode=True),
        "flags": evaluation_flags(recipe.loss.kind, "FOLDER"),
        "searches": recipe.loss.kind not in OWN_TASKS,
        "missing": missing,
        "written": time.strftime("%d %B %Y", time.localtime()),
    }
    figures = _figures(run_dir, missing)
    page = rendered("report.html", figures=figures, **values)
    while len(page.encode()) > MOST_BYTES and figures:
        figures.pop()
        page = rendered("report.html", figures=figures, **values)
    write_text(run_dir / REPORT, page)
    return run_dir / REPORT


def _seen(recipe: Recipe, load: Load, precision: str, missing: list[str]) -> dict[str, Any] | None:
    task = shown_task(planned_tasks(recipe.eval))
    if task is None:
        missing.append(
            "The model's answers for pictures: the recipe has no evaluation that names pictures or finds captions. "
            "eval.tasks lists evaluations."
        )
        return None
    folder = str(Path(recipe.output_dir) / "model")
    return try_part("The test pictures", missing, lambda: _section(answer_pictures(task, folder, load, precision)))


def _section(tested: Tested) -> dict[str, Any]:
    """Return the values of the section on a model's answers."""
    answers, rows = tested.answers, class_rows(tested.answers)
    half = min(_MOST_CLASSES, len(rows) // 2)
    what = "caption" if tested.task.kind == "retrieval" else "class"
    is_small = what == "class" and len(answers.names) <= _LARGEST_MATRIX

    def cards(examples: Iterable[ClassRow | Mistake]) -> list[tuple[ClassRow | Mistake, dict[str, Any]]]:
        return [(one, _card(tested, one.example)) for one in examples]

    return {
        "data": data_name(tested.task.data),
        "what": what,
        "taken": len(tested.rows),
        "total": len(tested.pictures),
        "num_right": answers.num_right,
        "answers": len(answers.names),
        "cards": [_card(tested, place) for place in evenly(len(tested.rows), _MOST_SHOWN)],
        "best": cards(row for row in rows[:half] if row.num_right),
        "worst": cards(row for row in rows[: -half - 1 : -1] if row.num_right < row.images),
        "mistakes": cards(mistakes(answers, _MOST_WRONG)),
        "classes": [_short(name) for name in answers.names] if is_small else [],
        "counts": confusion(answers) if is_small else [],
        "short": _short,
    }


def _card(tested: Tested, place: int) -> dict[str, Any]:
    """Return a test picture, its right answer with the rank, and its nearest answers with their shares in percent."""
    answers = tested.answers
    right = _short(answers.names[answers.right[place]])
    encoded = tested.pictures.image(int(tested.rows[place]))
    said = [
        (_short(answers.names[index]), 100 * float(share), index == int(answers.right[place]))
        for index, share in zip(answers.top[place].tolist(), answers.shares[place], strict=True)
    ]
    picture = thumbnail(decode_small(encoded, _SIDE), f"a test picture: {right}", _SIDE)
    return {"picture": picture, "right": right, "said": said, "rank": int(answers.ranks[place]) + 1}


def _short(text: str) -> str:
    return shortened(text, _MOST_LETTERS)


def mask_rows(recipe: Recipe, count: int = 6) -> dict[str, list[Picture]]:
    """Return the first `count` training pictures as each stage shows them, in rows by title. Patches that a mask
    removes are transparent."""
    source, shape = open_source(recipe.data), InputShape.of(build_config(recipe))
    objective = build_objective(recipe)
    tokenizer = load_tokenizer(recipe.data.tokenizer, shape.max_tokens) if objective.takes_text else None
    data = replace(recipe.data, pack_captions=False)  # a row of text for each caption
    # Mixup pairs pictures, so a classifier's batch stays even.
    positions = list(range(min(count, len(source)) if tokenizer else count))

    def batch(mask_ratio: float, image_size: int | None) -> dict[str, Any]:
        size = shape.at(image_size)
        dataset = objective.dataset(source, tokenizer, data, size, recipe.seed, mask_ratio, recipe.mask)
        return dataset.__getitems__(positions)

    whole = batch(0.0, None)
    if tokenizer is not None:
        decoded = tokenizer.batch_decode(whole["input_ids"], skip_special_tokens=True)
        texts = np.array([str(text).strip() for text in decoded], object).reshape(len(positions), -1)
        captions = [" / ".join(dict.fromkeys(filter(None, several))) for several in texts.tolist()]
    else:
        classes = kept_class_names(Path(recipe.output_dir), recipe.loss.options["num_classes"])
        captions = [" and ".join(classes[n] for n in dict.fromkeys(labels)) for labels in whole["labels"].tolist()]
    # Names by mask ratio and image size, with the whole crops first.
    stages: dict[tuple[float, int | None], list[str]] = {(0.0, None): []}
    for stage in recipe.stages:
        stages.setdefault((stage.mask_ratio, stage.image_size), []).append(stage.name)
    rows: dict[str, list[Picture]] = {}
    for (ratio, side), names in stages.items():
        columns, size = whole if (ratio, side) == (0.0, None) else batch(ratio, side), shape.at(side)
        words = f"{100 * ratio:g} % of the patches left out" if ratio else "whole"
        words += "" if side is None else f", at {side} x {side} pixels"
        everything = np.arange(size.num_patches)
        index = columns["patch_index"].numpy() if "patch_index" in columns else [everything] * len(positions)
        pictures = rows[f"{', '.join(names)}: {words}" if names else "the crops"] = []
        for patches, where, caption in zip(columns["patches"].numpy(), index, captions, strict=True):
            if where.ndim > 1:  # the first of several views
                patches, where = patches[0], where[0]
            alt = f"{caption or 'a training picture'}, {words}"
            pictures.append(thumbnail(_pasted(patches, where, size), alt, _MASK_SIDE))
    return rows


def _pasted(patches: np.ndarray, index: np.ndarray, shape: InputShape) -> np.ndarray:
    """Return patches at their places: uint8 RGBA `(size, size, 4)`, transparent elsewhere."""
    side, size = shape.side, shape.patch_size
    image = np.zeros((side, side, 4, size, size), np.uint8)
    rows, columns = np.divmod(index.astype(int), side)
    image[rows, columns, :3] = patches.reshape(-1, 3, size, size)
    image[rows, columns, 3] = 255
    return image.transpose(0, 3, 1, 4, 2).reshape(side * size, side * size, 4)


def _test(result: Result) -> str:
    name = result.kind.replace("_", "-") if result.task == result.kind else result.task
    return shortened(f"{name}{_of_data(result)}", 60)


def _of_data(result: Result) -> str:
    return f" of {data_name(result.made_by['data'])}" if result.made_by.get("data") else ""


def _figures(run_dir: Path, missing: list[str]) -> list[Picture]:
    """Return the figures of the run's own folder, or else of its model's card."""
    folders = (run_dir / "figures", run_dir / "model/figures")
    files = next((pngs for folder in folders if (pngs := sorted(folder.glob("*.png")))), [])
    if not files:
        missing.append("Figures: matplotlib draws them; pip install 'flipscale[plots]'.")
    places = {"loss": 0, "learning_rate": 2, "data_wait": 3}  # evaluations have place 1
    files.sort(key=lambda file: (places.get(file.stem, 1), file.stem))
    words = [f"{file.stem.replace('_', ' ').capitalize()} over the training" for file in files]
    made = (try_part(f.name, missing, partial(drawing, f, alt)) for f, alt in zip(files, words, strict=True))
    return [picture for picture in itertools.islice(made, _MOST_FIGURES) if picture is not None]


def try_part(name: str, missing: list[str], make: Callable[[], Made]) -> Made | None:
    """Return a part of the page; if it fails, add its name and the reason to `missing` and return None."""
    try:
        return make()
    except Exception as error:  # pictures, texts and files of the page may be anybody's, or gone
        missing.append(f"{name}: {shortened(str(error), 300).rstrip('.') or type(error).__name__}.")
        return None
