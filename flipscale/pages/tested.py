"""Pictures of a run's test set with what its model answers for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from flipscale.data.captions import tokenise
from flipscale.data.decode import decode_box, visible_patches
from flipscale.engines.device import best_attention
from flipscale.evaluation.kinds.classification import Classification
from flipscale.evaluation.kinds.retrieval import Retrieval
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.kinds.zero_shot import ZeroShot
from flipscale.evaluation.test_set import TestSet
from flipscale.model import FlipModel
from flipscale.pages.answers import Answers, answers_of
from flipscale.pages.embedded import embed_pictures, unit
from flipscale.pages.library import ShardPictures
from flipscale.pages.page import evenly

# A page is no evaluation: enough pictures to show what the model knows, in a time that nobody minds.
_MOST_PICTURES, _MOST_SECONDS, _MOST_TEXTS, _TEXT_BATCH = 2000, 60.0, 20_000, 256

# Returns the model and the tokenizer of a folder; a classifier has none.
Load = Callable[[str], tuple[Any, Any]]


@dataclass(frozen=True)
class Tested:
    """A model's answers for pictures of a test set.

    Args:
        task: whose test set it is.
        pictures: of the test set.
        rows: the numbers of the pictures that were taken, evenly spread, int64 `(rows,)`.
        answers: for these.
    """

    task: Task
    pictures: ShardPictures
    rows: np.ndarray
    answers: Answers


def shown_task(tasks: Sequence[Task]) -> Task | None:
    """Return the task whose pictures a page shows: the first that names classes, by their words or by a head, else the
    first that finds captions; None if there is neither."""
    named = [t for t in tasks if isinstance(t, Classification) or (isinstance(t, ZeroShot) and t.labels is None)]
    return next(iter([*named, *(task for task in tasks if isinstance(task, Retrieval))]), None)


def answer_pictures(task: Task, folder: str, load: Load, precision: str = "no") -> Tested:
    """Return what the model in `folder` answers for at most 2,000 pictures of a task's test set, in about a minute.

    Args:
        load: returns the model and the tokenizer of a folder, which a classifier lacks.
        precision: of the run, in accelerate's words; the model computes here as it did in its evaluations.

    Raises:
        ValueError: the model cannot be loaded, or the test set is not as its task needs it.
        OSError: a shard cannot be read.
    """
    test_set = TestSet.open(task.data)
    pictures = ShardPictures(test_set.source)
    model, tokenizer = load(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.set_attn_implementation(best_attention(device))
    model = model.to(device).eval()
    vision = model.config.vision_config
    decode = partial(_patches, task.image_size or vision.image_size, vision.patch_size)
    # In an order that leaves an even sample, wherever the time ends.
    rows = np.random.default_rng(0).permutation(evenly(len(pictures), _MOST_PICTURES)).tolist()

    def features(columns: dict[str, torch.Tensor]) -> torch.Tensor:
        on_device = {name: column.to(device) for name, column in columns.items()}
        if isinstance(task, Classification):
            logits: torch.Tensor = model(**on_device, image_size=task.image_size).logits
            return logits
        return unit(model.get_image_features(**on_device, image_size=task.image_size).pooler_output)

    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        found = embed_pictures(pictures, rows, decode, features, _MOST_SECONDS)
        order = np.argsort(found.rows)
        rows, embeds = found.rows[order], found.embeds[order]
        names, right, prompts = _asked(task, test_set, [pictures.place(row) for row in rows.tolist()])
        if isinstance(task, Classification):
            # Logits are scores of classes as they are.
            return Tested(task, pictures, rows, answers_of(embeds, np.eye(len(names), dtype="f4"), names, right, 1.0))
        texts = _text_embeds(model, tokenizer, [p.replace("{c}", name) for name in names for p in prompts], device)
    texts = texts.reshape(len(names), len(prompts), -1).mean(axis=1)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    scale = float(model.logit_scale.detach().exp().clamp(1.0, 100.0))
    return Tested(task, pictures, rows, answers_of(embeds, texts, names, right, scale))


def _patches(image_size: int, patch_size: int, encoded: bytes, row: int) -> dict[str, np.ndarray]:
    return {"patches": visible_patches(decode_box(encoded, None, image_size, (1.0, 1.0)), patch_size, None)}


def _asked(task: Task, test_set: TestSet, places: Sequence[tuple[int, int]]) -> tuple[list[str], list[int], list[str]]:
    """Return the answers that there are, the number of each picture's right one, and the prompts of an answer."""
    if isinstance(task, ZeroShot | Classification):
        names = test_set.class_names()
        prompts = task.prompts(test_set)[: max(1, _MOST_TEXTS // len(names))]
        return names, [test_set.label(len(names), *place) for place in places], prompts
    captions = [test_set.captions_of(*place)[0] for place in places]
    names = list(dict.fromkeys(captions))
    number = {name: place for place, name in enumerate(names)}
    return names, [number[caption] for caption in captions], ["{c}"]


@torch.no_grad()
def _text_embeds(model: FlipModel, tokenizer: Any, texts: list[str], device: torch.device) -> np.ndarray:
    length, parts = model.config.text_config.max_position_embeddings, []
    for first in range(0, len(texts), _TEXT_BATCH):
        tokens = tokenise(tokenizer, texts[first : first + _TEXT_BATCH], length)["input_ids"].to(device)
        found = model.get_text_features(tokens).pooler_output
        parts.append(unit(found).cpu().numpy())
    return np.concatenate(parts)
