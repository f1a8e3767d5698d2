"""A model's answers for pictures of its test set: the nearest names or captions, and the rank of the right one."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from transformers import PreTrainedTokenizerBase

from flipscale.data.captions import tokenise
from flipscale.data.pairs import InputShape
from flipscale.data.samples import evenly
from flipscale.engines.device import best_attention
from flipscale.evaluation.kinds.retrieval import Retrieval
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.kinds.zero_shot import Classification, ZeroShot
from flipscale.evaluation.test_set import TestSet
from flipscale.evaluation.whole_images import whole_square
from flipscale.model import FlipPreTrainedModel
from flipscale.model.modeling_flip import normalise_embeds
from flipscale.pages.pictures import ShardPictures, embed_pictures

_ROWS = 256  # pictures at a time, to bound the memory
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
        leads: cosine (or logit) of the right answer minus the best other, fp32 `(pictures,)`; negative for wrong ones.
    """

    names: list[str]
    right: np.ndarray
    top: np.ndarray
    shares: np.ndarray
    ranks: np.ndarray
    leads: np.ndarray

    @property
    def num_right(self) -> int:
        """Number of pictures whose nearest answer is right."""
        return int((self.ranks == 0).sum())


def answers_of(
    pictures: np.ndarray, texts: np.ndarray, names: Sequence[str], right: Sequence[int], scale: float, k: int = 3
) -> Answers:
    """Return the answers of embeddings of unit length, or of a classifier's logits.

    Args:
        pictures: embeddings or logits, fp32 `(pictures, dim)`.
        texts: embeddings of the answers, fp32 `(answers, dim)`; the identity for a classifier.
        right: index of each picture's right answer.
        scale: inverse temperature of the model; 1 for a classifier.
        k: number of nearest answers to keep.
    """
    known, k = np.asarray(right, dtype=np.int64), min(k, len(names))
    columns: list[tuple[np.ndarray, ...]] = []
    for first in range(0, len(pictures), _ROWS):
        cosines = pictures[first : first + _ROWS] @ texts.T
        own = known[first : first + _ROWS, None]
        top = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        shares = np.take_along_axis(softmax(scale * cosines, axis=1), top, axis=1)
        mine = np.take_along_axis(cosines, own, axis=1)
        np.put_along_axis(cosines, own, -np.inf, axis=1)  # the others are left
        lead = mine[:, 0] - cosines.max(axis=1) if len(names) > 1 else mine[:, 0]
        columns.append((top, shares, (cosines > mine).sum(axis=1), lead))
    return Answers(list(names), known, *(np.concatenate(parts) for parts in zip(*columns, strict=True)))


@dataclass(frozen=True)
class ClassRow:
    """Results for the pictures of one right answer.

    Args:
        rank: mean rank of the right answer, from 1.
        example: index of the picture with the largest lead if most are right, else the smallest.
        taken_for: most frequent wrong answer; empty if there is none.
    """

    name: str
    images: int
    num_right: int
    rank: float
    example: int
    taken_for: str


def class_rows(answers: Answers) -> list[ClassRow]:
    """Return a row for each right answer, best first: by accuracy, then mean rank, then mean lead."""
    rows = []
    for index in np.unique(answers.right).tolist():
        mine = np.flatnonzero(answers.right == index)
        good, leads = answers.ranks[mine] == 0, answers.leads[mine]
        wrong = Counter(answers.top[mine[~good], 0].tolist()).most_common(1)
        example = int(mine[leads.argmax() if good.mean() >= 0.5 else leads.argmin()])
        rank, taken_for = float(answers.ranks[mine].mean()) + 1, answers.names[wrong[0][0]] if wrong else ""
        row = ClassRow(answers.names[index], len(mine), int(good.sum()), rank, example, taken_for)
        rows.append(((-float(good.mean()), rank, -float(leads.mean())), row))
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


def confusion(answers: Answers) -> list[list[int]]:
    """Return the confusion matrix: counts of given answers (column) for right answers (row)."""
    counts = np.zeros([len(answers.names)] * 2, np.int64)
    np.add.at(counts, (answers.right, answers.top[:, 0]), 1)
    return counts.tolist()


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
        length, parts = model.config.text_config.max_position_embeddings, []
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
