"""CIDEr, BLEU-4 and ROUGE-L of generated captions, with the numbers of COCO's tools (pycocoevalcap 1.2).

They are written anew, because those tools come with 100 MB of Java programs, have had no release since 2020, and their
BLEU is by its header not for commercial use; tests compare the two. Captions are lists of words (`caption_words`), and
each image has one candidate and one reference or more.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from flipscale.evaluation.metrics import Z95, Estimate, bootstrapped

Words = list[str]
Gram = tuple[str, ...]

_LONGEST = 4  # words of an n-gram
_SIGMA = 6.0  # of CIDEr's penalty on another length, in bigrams
_BETA = 1.2  # ROUGE-L's weight of recall
_SMALL, _TINY = 1e-9, 1e-15  # by which COCO's BLEU keeps from dividing by 0 and from being 0


def cider(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """Return the CIDEr of each image, fp64 `(images,)` in [0, 10]: Vedantam et al. (arXiv 1411.5726), in the form that
    COCO's server uses, with clipped counts and a penalty on another length.

    The inverse document frequency is that of all references that are given, so a part of a set has other scores.
    """
    documents = Counter(
        gram for some in references for gram in {gram for words in some for gram in _ngrams(words, _LONGEST)}
    )
    most = math.log(max(len(references), 1))

    def vectors(words: Words) -> tuple[list[dict[Gram, float]], list[float], int]:
        by_length: list[dict[Gram, float]] = [{} for _ in range(_LONGEST)]
        for gram, count in _ngrams(words, _LONGEST).items():
            by_length[len(gram) - 1][gram] = count * (most - math.log(max(documents[gram], 1)))
        norms = [math.sqrt(sum(value * value for value in vector.values())) for vector in by_length]
        return by_length, norms, max(len(words) - 1, 0)

    found = []
    for candidate, some in zip(candidates, references, strict=True):
        mine, my_norms, my_length = vectors(candidate)
        total = 0.0
        for words in some:
            other, norms, length = vectors(words)
            products = [
                sum(min(value, theirs[gram]) * theirs[gram] for gram, value in ours.items() if gram in theirs)
                / (my_norm * norm if my_norm and norm else 1.0)
                for ours, theirs, my_norm, norm in zip(mine, other, my_norms, norms, strict=True)
            ]
            total += sum(products) / _LONGEST * math.exp(-((my_length - length) ** 2) / (2 * _SIGMA**2))
        found.append(10.0 * total / len(some))
    return np.array(found)


def bleu_4(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> Estimate:
    """Return the BLEU-4 of the whole set, in [0, 1], with a bootstrap interval over images: Papineni et al. (2002),
    with the reference length that is nearest to each candidate's, the shorter of two."""
    counts = np.array(
        [_bleu_counts(words, some) for words, some in zip(candidates, references, strict=True)], np.float64
    )

    def measure(times: np.ndarray) -> float:
        total = times @ counts
        right, tried, (length, reference) = total[:_LONGEST], total[_LONGEST : 2 * _LONGEST], total[2 * _LONGEST :]
        precision = float(np.prod((right + _TINY) / (tried + _SMALL))) ** (1 / _LONGEST)
        ratio = (length + _TINY) / (reference + _SMALL)
        return precision * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)

    return bootstrapped(measure, len(counts))


def rouge_l(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """Return the ROUGE-L of each image, fp64 `(images,)` in [0, 1]: Lin (2004), by the longest common subsequence, of
    the references' best precision and best recall."""
    found = []
    for candidate, some in zip(candidates, references, strict=True):
        # COCO's tools take an empty caption for one empty word.
        shared = [(_common(candidate or [""], words or [""]), len(words or [""])) for words in some]
        precision = max(length for length, _ in shared) / len(candidate or [""])
        recall = max(length / words for length, words in shared)
        both = recall + _BETA**2 * precision
        found.append((1 + _BETA**2) * precision * recall / both if both else 0.0)
    return np.array(found)


def mean_estimate(scores: np.ndarray) -> Estimate:
    """Return the mean of scores of images, at least 0, with a normal 95 % interval."""
    mean = float(scores.mean())
    half = Z95 * float(scores.std(ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
    return Estimate(mean, max(mean - half, 0.0), mean + half)


def _ngrams(words: Words, longest: int) -> Counter[Gram]:
    """Return how often each run of up to `longest` words is there."""
    return Counter(
        tuple(words[first : first + length])
        for length in range(1, longest + 1)
        for first in range(len(words) - length + 1)
    )


def _bleu_counts(candidate: Words, references: Sequence[Words]) -> list[int]:
    """Return how many n-grams are right and how many there are, by their length, and the lengths of the candidate and
    of the nearest reference."""
    most: Counter[Gram] = Counter()
    for words in references:
        most |= _ngrams(words, _LONGEST)
    right = [0] * _LONGEST
    for gram, count in (_ngrams(candidate, _LONGEST) & most).items():
        right[len(gram) - 1] += count
    length = len(candidate)
    nearest = min((abs(len(words) - length), len(words)) for words in references)[1]
    return [*right, *(max(length - longer, 0) for longer in range(_LONGEST)), length, nearest]


def _common(one: Words, other: Words) -> int:
    """Return the length of the longest common subsequence."""
    before = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for place, theirs in enumerate(other):
            row.append(before[place] + 1 if word == theirs else max(before[place + 1], row[place]))
        before = row
    return before[-1]
