"""The report of a finished run, `RUN/report.html`: the run, its results, and its answers for test pictures."""

import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from scipy.special import softmax
from transformers import PreTrainedTokenizerBase

from flipscale.data.captions import tokenise
from flipscale.data.decode import decode_small
from flipscale.data.pairs import InputShape
from flipscale.data.samples import evenly
from flipscale.data.sources.opening import open_source
from flipscale.data.tokenizers import load_tokenizer
from flipscale.engines.device import best_attention
from flipscale.evaluation.kinds.retrieval import Retrieval
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.kinds.zero_shot import Classification, ZeroShot
from flipscale.evaluation.model_results import data_name
from flipscale.evaluation.presentation.curves import read_curve
from flipscale.evaluation.presentation.figures import can_draw
from flipscale.evaluation.presentation.last_lines import OWN_TASKS, evaluation_flags
from flipscale.evaluation.results import BEFORE, CHANGED, CHANGES, THIS_MODEL, Result, with_changes, with_unit
from flipscale.evaluation.suite import planned_tasks
from flipscale.evaluation.test_set import TestSet, kept_class_names
from flipscale.evaluation.whole_images import whole_square
from flipscale.io.atomic import write_text
from flipscale.model import FlipPreTrainedModel
from flipscale.model.modeling_flip import normalise_embeds
from flipscale.objectives.build_objective import build_config, build_objective
from flipscale.pages.page import Picture, drawing, listed, rendered, shortened, thumbnail
from flipscale.pages.pictures import ShardPictures, embed_pictures
from flipscale.process.console import only_describes
from flipscale.recipe.recipe import Recipe, deciding_part
from flipscale.records.run_summary import RunSummary

REPORT = "report.html"
MOST_BYTES = 2_000_000

_SIDE, _MASK_SIDE = 112, 96
_MOST_SHOWN, _MOST_CLASSES, _MOST_WRONG = 12, 6, 9
_MOST_LETTERS = 90
_MOST_FIGURES, _MOST_RESULTS = 8, 60

Made = TypeVar("Made")

_log = logging.getLogger(__name__)
_ROWS = 256  # pictures at a time, to bound the memory
_NEAREST = 3  # answers that are kept for a picture
# A page needs fewer pictures than an evaluation, and no more than a minute.
_MOST_PICTURES, _MOST_SECONDS, _MOST_TEXTS, _TEXT_BATCH = 2000, 60.0, 20_000, 256

# Returns the model and the tokenizer of a folder; a classifier has no tokenizer.
Load = Callable[[str], tuple[FlipPreTrainedModel, PreTrainedTokenizerBase | None]]


@dataclass(frozen=True)
class Answers:
    """Answers for pictures.

    Args:
        names: names of all possible answers.
        right: index of each picture's right answer, int64 `(pictures,)`.
        top: indices of the nearest answers, nearest first, int64 `(pictures, k)`.
        shares: the model's probabilities of these answers, fp32 `(pictures, k)`; all answers sum to one.
        ranks: number of answers nearer than the right one, int64 `(pictures,)`.
    """

    names: list[str]
    right: np.ndarray
    top: np.ndarray
    shares: np.ndarray
    ranks: np.ndarray

    @property
    def num_right(self) -> int:
        """Number of pictures whose nearest answer is right."""
        return int((self.ranks == 0).sum())


def answers_of(
    pictures: np.ndarray, texts: np.ndarray, names: Sequence[str], right: Sequence[int], scale: float
) -> Answers:
    """Return the answers of embeddings of unit length, or of a classifier's logits.

    Args:
        pictures: embeddings or logits, fp32 `(pictures, dim)`.
        texts: embeddings of the answers, fp32 `(answers, dim)`; the identity for a classifier.
        right: index of each picture's right answer.
        scale: inverse temperature of the model; 1 for a classifier.
    """
    known = np.asarray(right, dtype=np.int64)
    columns: list[tuple[np.ndarray, ...]] = []
    for first in range(0, len(pictures), _ROWS):
        cosines = pictures[first : first + _ROWS] @ texts.T
        own = known[first : first + _ROWS, None]
        top = np.argsort(-cosines, axis=1, kind="stable")[:, :_NEAREST]
        shares = np.take_along_axis(softmax(scale * cosines, axis=1), top, axis=1)
        columns.append((top, shares, (cosines > np.take_along_axis(cosines, own, axis=1)).sum(axis=1)))
    return Answers(list(names), known, *(np.concatenate(parts) for parts in zip(*columns, strict=True)))


@dataclass(frozen=True)
class ClassRow:
    """Results for the pictures of one right answer.

    Args:
        rank: mean rank of the right answer, from 1.
        example: index of the picture with the surest right answer if most are right, else with the surest wrong one.
        taken_for: most frequent wrong answer; empty if there is none.
    """

    name: str
    images: int
    num_right: int
    rank: float
    example: int
    taken_for: str


def class_rows(answers: Answers) -> list[ClassRow]:
    """Return a row for each right answer, best first: by accuracy, then by mean rank."""
    rows = []
    for index in np.unique(answers.right).tolist():
        mine = np.flatnonzero(answers.right == index)
        good = answers.ranks[mine] == 0
        wrong = Counter(answers.top[mine[~good], 0].tolist()).most_common(1)
        alike = mine[good == (good.mean() >= 0.5)]
        example = int(alike[answers.shares[alike, 0].argmax()])
        rank, taken_for = float(answers.ranks[mine].mean()) + 1, answers.names[wrong[0][0]] if wrong else ""
        row = ClassRow(answers.names[index], len(mine), int(good.sum()), rank, example, taken_for)
        rows.append(((-float(good.mean()), rank), row))
    return [row for _, row in sorted(rows, key=lambda row: row[0])]


@dataclass(frozen=True)
class Mistake:
    """A wrong answer for a right one. `example`: index of the picture with the highest probability of it."""

    right: str
    given: str
    count: int
    example: int


def mistakes(answers: Answers, most: int) -> list[Mistake]:
    """Return the most frequent mistakes; equal counts are ordered by the probability of the wrong answer."""
    pairs: dict[tuple[int, int], list[int]] = {}
    for picture in np.flatnonzero(answers.ranks > 0).tolist():
        pairs.setdefault((int(answers.right[picture]), int(answers.top[picture, 0])), []).append(picture)
    sure = answers.shares[:, 0]
    rows = [
        Mistake(answers.names[right], answers.names[given], len(pictures), max(pictures, key=sure.__getitem__))
        for (right, given), pictures in pairs.items()
    ]
    return sorted(rows, key=lambda row: (-row.count, -sure[row.example]))[:most]


@dataclass(frozen=True)
class Tested:
    """A model's answers for pictures of a test set, at the indices `rows`, int64 `(rows,)`, evenly spread."""

    task: Task
    pictures: ShardPictures
    rows: np.ndarray
    answers: Answers


def shown_task(tasks: Sequence[Task]) -> Task | None:
    """Return the task for the report: the first classification or zero-shot task, else the first retrieval, or None."""
    named = [t for t in tasks if isinstance(t, Classification) or (isinstance(t, ZeroShot) and t.labels is None)]
    return next(iter([*named, *(task for task in tasks if isinstance(task, Retrieval))]), None)


def answer_pictures(task: Task, folder: str, load: Load, precision: str = "no") -> Tested:
    """Return the answers of the model in `folder` for at most 2,000 pictures of a test set, in about a minute.

    `precision` is the mixed precision of the run, in accelerate's words, as in its evaluations.
    """
    test_set = TestSet.open(task.data)
    pictures = ShardPictures(test_set.source)
    model, tokenizer = load(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.set_attn_implementation(best_attention(device))
    model = model.to(device).eval()  # type: ignore[arg-type]
    decode = partial(whole_square, InputShape.of(model.config).at(task.image_size))
    # A random order leaves an even sample if the time ends early.
    order = np.random.default_rng(0).permutation(evenly(len(pictures), _MOST_PICTURES)).tolist()

    def features(columns: dict[str, torch.Tensor]) -> torch.Tensor:
        on_device: Any = {**{name: c.to(device) for name, c in columns.items()}, "image_size": task.image_size}
        if isinstance(task, Classification):
            return model(**on_device).logits
        return normalise_embeds(model.get_image_features(**on_device).pooler_output)

    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        embedded = embed_pictures(pictures, order, decode, features, _MOST_SECONDS)
        by_row = np.argsort(embedded.rows)
        rows, embeds = embedded.rows[by_row], embedded.embeds[by_row]
        names, right, prompts = _questions(task, test_set, [pictures.place(row) for row in rows.tolist()])
        if isinstance(task, Classification):
            # Logits are scores of classes already.
            return Tested(task, pictures, rows, answers_of(embeds, np.eye(len(names), dtype="f4"), names, right, 1.0))
        assert tokenizer is not None
        length, parts = model.config.caption_config.max_position_embeddings, []
        texts = [prompt.replace("{c}", name) for name in names for prompt in prompts]
        for first in range(0, len(texts), _TEXT_BATCH):
            tokens = tokenise(tokenizer, texts[first : first + _TEXT_BATCH], length)["input_ids"].to(device)
            with torch.no_grad():
                parts.append(normalise_embeds(model.get_text_features(tokens).pooler_output).cpu())
    means = torch.cat(parts).reshape(len(names), len(prompts), -1).mean(dim=1)
    scale = model.loss_values()["logit_scale"].item()
    return Tested(task, pictures, rows, answers_of(embeds, normalise_embeds(means).numpy(), names, right, scale))


def _questions(task: Task, test_set: TestSet, places: list[tuple[int, int]]) -> tuple[list[str], list[int], list[str]]:
    """Return the possible answers, the index of each picture's right answer, and the prompts of an answer."""
    if isinstance(task, ZeroShot | Classification):
        names = test_set.class_names()
        prompts = task.prompts(test_set)[: max(1, _MOST_TEXTS // len(names))]
        return names, [test_set.label(len(names), *place) for place in places], prompts
    captions = [test_set.captions_of(*place)[0] for place in places]
    names = list(dict.fromkeys(captions))
    index = {name: at for at, name in enumerate(names)}
    return names, [index[caption] for caption in captions], ["{c}"]


def offer_page(recipe: Recipe, load: Load) -> None:
    """Write the report of a finished run and log its path. A failure is one warning, because the run is complete."""
    path = Path(recipe.output_dir) / REPORT
    retry = ("flipscale", "pretrain", "--config", str(path.with_name("recipe.yaml")))
    with only_describes(path, path.parent, retry):
        write_run_page(recipe, load)
        _log.info("%s shows the run: open it in a browser", path)


def write_run_page(recipe: Recipe, load: Load) -> Path:
    """Write `report.html` into the run directory of a recipe and return its path. The page names its missing parts."""
    run_dir = Path(recipe.output_dir)
    curve, run = read_curve(run_dir), RunSummary(run_dir)
    config = json.loads((run_dir / "model/config.json").read_text(encoding="utf-8"))
    missing: list[str] = []
    shown = with_changes(curve.results)
    tests: dict[str, list[list[Result]]] = {}  # rows of a result, and perhaps of it before and of its change
    own = {THIS_MODEL, BEFORE, *CHANGES}
    for _, row in itertools.groupby(shown[:_MOST_RESULTS], lambda one: (one.name, one.who in own or one.who)):
        (first, *rest) = row
        tests.setdefault(_test(first), []).append([first, *rest])
    if len(shown) > _MOST_RESULTS:
        missing.append(f"{len(shown) - _MOST_RESULTS:,} more results: results.jsonl has them.")
    shows = not recipe.model.embedded
    if not shows:
        missing.append("The model's answers: `flipscale search` has them for models with towers of other libraries.")
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
        "before": BEFORE,
        "told": {who: [one for one in shown if one.headline and one.who == who] for who in CHANGES[1::-1]},
        "changed": CHANGED if any(result.who == BEFORE for result in curve.results) else "",
        "seen": _seen(recipe, load, run.environment.get("mixed_precision", "no"), missing) if shows else None,
        "masks": (try_part("What was masked", missing, lambda: mask_rows(recipe)) or {}) if shows else {},
        "recipe": yaml.safe_dump(deciding_part(run.recipe, name_of=data_name), sort_keys=False, allow_unicode=True),
        "flags": evaluation_flags(OWN_TASKS.get(recipe.loss.kind, "zero_shot"), "FOLDER"),
        "searches": recipe.loss.kind not in OWN_TASKS,
        "missing": missing,
        "written": time.strftime("%d %B %Y", time.localtime()),
    }
    figures = _figures(run_dir, missing)
    page = rendered("report.html", figures=figures, **values)
    while len(page.encode()) > MOST_BYTES and figures:
        missing.append(f"{figures.pop().alt}: the page would have more than {MOST_BYTES / 1e6:.0f} MB.")
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
    if not files and can_draw():
        missing.append("Figures: the run has none; they need two records of the loss.")
    elif not files:
        missing.append("Figures: matplotlib draws them; pip install 'flipscale[plots]'.")
    if len(files) > _MOST_FIGURES:
        missing.append(f"{len(files) - _MOST_FIGURES:,} more figures: {files[0].parent.relative_to(run_dir)} has them.")
    places = {"loss": 0, "learning_rate": 2, "data_wait": 3}  # evaluations have place 1
    files.sort(key=lambda file: (places.get(file.stem, 1), file.stem))
    words = [f"{file.stem.replace('_', ' ')} over the training" for file in files]
    made = (try_part(f.name, missing, partial(drawing, f, alt)) for f, alt in zip(files, words, strict=True))
    return [picture for picture in itertools.islice(made, _MOST_FIGURES) if picture is not None]


def try_part(name: str, missing: list[str], make: Callable[[], Made]) -> Made | None:
    """Return a part of the page; if it fails, add its name and the reason to `missing` and return None."""
    try:
        return make()
    except Exception as error:  # pictures, texts and files of the page may be anybody's, or gone
        missing.append(f"{name}: {shortened(str(error), 300).rstrip('.') or type(error).__name__}.")
        return None
