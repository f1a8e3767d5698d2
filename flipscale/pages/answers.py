"""What a model answers for pictures of a test set: the nearest names or captions, and how near the right one is."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROWS = 256  # pictures at a time, to bound the memory


@dataclass(frozen=True)
class Answers:
    """The answers for pictures.

    Args:
        names: of all answers that there are.
        right: the number of each picture's right answer, int64 `(pictures,)`.
        top: the numbers of the nearest answers, the nearest first, int64 `(pictures, k)`.
        shares: how the model divides its belief over them, fp32 `(pictures, k)`; over all answers it sums to one.
        ranks: how many answers are nearer than the right one, int64 `(pictures,)`.
        leads: by how much the right answer is nearer in cosine, or has more of a classifier's logit, than the best of
            the others, fp32 `(pictures,)`; below 0 where it is not the nearest.
    """

    names: list[str]
    right: np.ndarray
    top: np.ndarray
    shares: np.ndarray
    ranks: np.ndarray
    leads: np.ndarray

    @property
    def num_right(self) -> int:
        """How many pictures have the right answer as their nearest."""
        return int((self.ranks == 0).sum())


def answers_of(
    pictures: np.ndarray, texts: np.ndarray, names: Sequence[str], right: Sequence[int], scale: float, k: int = 3
) -> Answers:
    """Return the answers of embeddings of unit length, or of logits.

    Args:
        pictures: fp32 `(pictures, dim)`; of a classifier its logits.
        texts: fp32 `(answers, dim)`; of a classifier the identity.
        names: of the answers.
        right: the number of each picture's right answer.
        scale: the model's inverse temperature; of a classifier 1.
        k: how many of the nearest are kept.
    """
    known, k = np.asarray(right, dtype=np.int64), min(k, len(names))
    columns: list[tuple[np.ndarray, ...]] = []
    for first in range(0, len(pictures), _ROWS):
        cosines = pictures[first : first + _ROWS] @ texts.T
        own = known[first : first + _ROWS, None]
        mine = np.take_along_axis(cosines, own, axis=1)
        top = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(cosines, top, axis=1)
        weights = np.exp(scale * (cosines - best[:, :1]))
        shares = np.exp(scale * (best - best[:, :1])) / weights.sum(axis=1, keepdims=True)
        others = cosines.copy()
        np.put_along_axis(others, own, -np.inf, axis=1)
        lead = mine[:, 0] - others.max(axis=1) if len(names) > 1 else mine[:, 0]
        columns.append((top, shares, (others > mine).sum(axis=1), lead))
    return Answers(list(names), known, *(np.concatenate(parts) for parts in zip(*columns, strict=True)))


@dataclass(frozen=True)
class ClassRow:
    """How pictures of one right answer fared.

    Args:
        name: of the right answer.
        images, num_right: pictures, and those of them that it is the nearest of.
        rank: the right answer's mean place among all, 1 for the nearest.
        example: the number of the picture that is furthest from what is right of a bad row, nearest of a good one.
        taken_for: the answer that took its place most often; empty where none did.
    """

    name: str
    images: int
    num_right: int
    rank: float
    example: int
    taken_for: str


def class_rows(answers: Answers) -> list[ClassRow]:
    """Return a row for each right answer that a picture has, the best first: by the share that is named right, then by
    the place of the right answer, then by how far it leads."""
    rows = []
    for number in np.unique(answers.right).tolist():
        mine = np.flatnonzero(answers.right == number)
        good = answers.ranks[mine] == 0
        wrong = Counter(answers.top[mine[~good], 0].tolist()).most_common(1)
        share, lead = float(good.mean()), float(answers.leads[mine].mean())
        example = mine[answers.leads[mine].argmax() if share >= 0.5 else answers.leads[mine].argmin()]
        name, rank = answers.names[number], float(answers.ranks[mine].mean()) + 1
        taken_for = answers.names[wrong[0][0]] if wrong else ""
        row = ClassRow(name, len(mine), int(good.sum()), rank, int(example), taken_for)
        rows.append(((-share, rank, -lead), row))
    return [row for _, row in sorted(rows, key=lambda row: row[0])]


@dataclass(frozen=True)
class Mistake:
    """Two answers of which one was given for the other.

    Args:
        right, given: their names.
        count: how often.
        example: the number of the picture for which the model believes most in the wrong one.
    """

    right: str
    given: str
    count: int
    example: int


def mistakes(answers: Answers, most: int) -> list[Mistake]:
    """Return the pairs that are confused most often, and of equal ones those that are confused most surely."""
    found: dict[tuple[int, int], list[int]] = {}
    for picture in np.flatnonzero(answers.ranks > 0).tolist():
        found.setdefault((int(answers.right[picture]), int(answers.top[picture, 0])), []).append(picture)
    rows = []
    for (right, given), pictures in found.items():
        surest = max(pictures, key=lambda picture: answers.shares[picture, 0])
        row = Mistake(answers.names[right], answers.names[given], len(pictures), surest)
        rows.append(((-len(pictures), -float(answers.shares[surest, 0])), row))
    return [row for _, row in sorted(rows, key=lambda row: row[0])[:most]]


def matrix(answers: Answers) -> list[list[int]]:
    """Return how often each answer (column) was given for each right one (row)."""
    size = len(answers.names)
    cells = np.bincount(answers.right * size + answers.top[:, 0], minlength=size * size)
    return cells.reshape(size, size).tolist()
