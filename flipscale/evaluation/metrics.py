"""The figures of scores and labels, and their 95 % intervals: functions that know no model and no process.

Scores of hits are fp32 tensors on the CPU. Classes and answers of equal score stand in the order of `torch.topk`, as in
CLIP_benchmark: the same in every run, whatever the processes. What sorts a whole set (average precision, AUC) is in
fp64.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

Z95 = 1.959964  # the normal quantile of a two-sided 95 % interval
_DRAWS = 200  # of a bootstrap, which only gives a standard deviation
_POINTS = 11  # VOC 2007: recall 0, 0.1, ... 1


class Estimate(NamedTuple):
    """A figure and its 95 % interval, as fractions."""

    value: float
    low: float
    high: float


def wilson(hits: float, n: float) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion, as two fractions. It assumes independent queries."""
    share, z2 = hits / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def clustered_share(hits: np.ndarray, counts: np.ndarray) -> Estimate:
    """Return the share of hits among queries that come in clusters, such as the captions of one image.

    The interval is Wilson's of as many independent queries as have the variance between clusters; never more than
    there are queries.

    Args:
        hits: of each cluster, `(clusters,)`.
        counts: the queries of each cluster, at least 1.
    """
    n, clusters = int(counts.sum()), len(counts)
    share = float(hits.sum() / n)
    variance = float(((hits - share * counts) ** 2).sum()) / n**2 * clusters / max(clusters - 1, 1)
    # Without any variance to see, each cluster counts once.
    independent = min(share * (1 - share) / variance, n) if variance > 0 else clusters
    return Estimate(share, *wilson(share * independent, independent))


def hits_at(scores: torch.Tensor, labels: torch.Tensor, ks: Sequence[int]) -> torch.Tensor:
    """Return whether the label is among the k best classes, bool `(rows, len(ks))`.

    Args:
        scores: `(rows, classes)`.
        labels: the right class of each row.
        ks: none above the number of classes.
    """
    right = scores.topk(max(ks), dim=1).indices == labels[:, None]
    return torch.stack([right[:, :k].any(dim=1) for k in ks], dim=1)


def any_hits(scores: torch.Tensor, label_sets: torch.Tensor) -> torch.Tensor:
    """Return whether the best class is one of the row's labels, bool `(rows,)`.

    Args:
        scores: `(rows, classes)`.
        label_sets: bool `(rows, classes)`.
    """
    return label_sets[torch.arange(len(scores)), scores.argmax(dim=1)]


def recall_hits(scores: torch.Tensor, query_ids: torch.Tensor, target_ids: torch.Tensor, k: int) -> torch.Tensor:
    """Return whether a target of the query's id is among the k of highest score, bool `(queries,)`.

    Args:
        scores: `(queries, targets)`.
        query_ids: `(queries,)`.
        target_ids: `(targets,)`.
        k: at most all targets count.
    """
    nearest = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (target_ids[nearest] == query_ids[:, None]).any(dim=1)


def recall_chance(num_right: np.ndarray, num_targets: int, k: int) -> float:
    """Return the share of queries that have a right answer among k drawn without looking.

    Args:
        num_right: the right answers of each query.
        num_targets: among how many answers they are.
        k: how many answers are drawn.
    """
    missed = np.ones(len(num_right))
    for drawn in range(min(k, num_targets)):
        missed *= np.maximum(num_targets - num_right - drawn, 0) / (num_targets - drawn)
    return float(1 - missed.mean())


def mean_per_class(hits: np.ndarray, counts: np.ndarray) -> Estimate:
    """Return the mean over classes of the share of hits; a class without queries is left out, as in scikit-learn.

    The variance is the sum of the classes' own, each with one hit and one miss added, so that a class of a few images
    that were all right does not count as certain.

    Args:
        hits: of each class, `(classes,)`.
        counts: the queries of each class; one at least is not 0.
    """
    hits, counts = hits[counts > 0].astype(np.float64), counts[counts > 0].astype(np.float64)
    smooth = (hits + 1) / (counts + 2)
    deviation = math.sqrt((smooth * (1 - smooth) / counts).sum()) / len(counts)
    return _normal(float((hits / counts).mean()), deviation)


def mean_of_two(once: int, twice: int, n: int) -> Estimate:
    """Return the mean of top-1 and top-5, as of queries that achieve 0, 1/2 or 1, with a normal interval.

    Args:
        once: the queries right at top-1.
        twice: the queries right at top-5, those among them.
        n: all queries.
    """
    value = (once + twice) / (2 * n)
    variance = (once + (twice - once) / 4) / n - value**2
    return _normal(value, math.sqrt(max(variance, 0.0) / n))


def roc_auc(scores: np.ndarray, positive: np.ndarray) -> Estimate:
    """Return the area under the ROC curve; a tie of a positive and a negative counts half. The interval is DeLong's.

    Args:
        scores: `(rows,)`.
        positive: bool `(rows,)`; both kinds are there.
    """
    of_positive, of_negative = scores[positive].astype(np.float64), scores[~positive].astype(np.float64)
    num_positive, num_negative = len(of_positive), len(of_negative)
    ranks = _mid_ranks(np.concatenate([of_positive, of_negative]))
    # The share of negatives below each positive, and of positives above each negative.
    below = (ranks[:num_positive] - _mid_ranks(of_positive)) / num_negative
    above = 1 - (ranks[num_positive:] - _mid_ranks(of_negative)) / num_positive
    variance = sum(float(part.var(ddof=1)) / len(part) for part in (below, above) if len(part) > 1)
    return _normal(float(below.mean()), math.sqrt(variance))


def mean_average_precision(scores: np.ndarray, positive: np.ndarray, interpolated: bool) -> Estimate:
    """Return the mean over classes of the average precision.

    A class without positives has 0, and rows of equal score are in the order of `torch.sort`, as in CLIP_benchmark. The
    interval is 1.96 standard deviations of 200 bootstrap draws of rows, of a fixed seed.

    Args:
        scores: `(rows, classes)`.
        positive: bool `(rows, classes)`.
        interpolated: VOC 2007's form: the mean, over recall 0, 0.1, ... 1, of the highest precision at that recall or
            more; else the mean of the precisions at the rank of each positive.
    """
    precision = _interpolated_precision if interpolated else _average_precision
    columns = [
        (order, positive[order, column])
        for column in range(scores.shape[1])
        for order in [torch.from_numpy(scores[:, column]).sort(descending=True).indices.numpy()]
    ]

    def measure(times: np.ndarray) -> float:
        return float(np.mean([precision(times[order], right) for order, right in columns]))

    return bootstrapped(measure, len(scores))


def average_precision_chance(positives: np.ndarray, n: int) -> float:
    """Return the expected mean over classes of the plain average precision of a random order of `n` rows.

    Args:
        positives: the positives of each class, `(classes,)`.
        n: the rows.
    """
    harmonic = float((1 / np.arange(1, n + 1)).sum())
    others = (positives - 1) / max(n - 1, 1)
    return float(np.where(positives > 0, others + (1 - others) * harmonic / n, 0.0).mean())


def bootstrapped(measure: Callable[[np.ndarray], float], n: int) -> Estimate:
    """Return what `measure` says of `n` rows, with 1.96 standard deviations over bootstrap draws of a fixed seed.

    Args:
        measure: takes how often each row is there, int64 `(n,)`.
        n: the rows.
    """
    rng = np.random.default_rng(0)
    draws = [measure(np.bincount(rng.integers(n, size=n), minlength=n)) for _ in range(_DRAWS)]
    return _normal(measure(np.ones(n, np.int64)), float(np.std(draws, ddof=1)))


def _average_precision(times: np.ndarray, right: np.ndarray) -> float:
    found = np.cumsum(times * right)
    if not found[-1]:
        return 0.0
    # A row that the bootstrap left out before all others has no precision.
    return float((times * right * found / np.maximum(np.cumsum(times), 1)).sum() / found[-1])


def _interpolated_precision(times: np.ndarray, right: np.ndarray) -> float:
    found = np.cumsum(times * right)
    if not found[-1]:
        return 0.0
    precision = found / np.maximum(np.cumsum(times), 1)
    best_from = np.maximum.accumulate(precision[::-1])[::-1]
    # Recall found / all is at least p / 10 where 10 * found is at least p * all, in whole numbers.
    first = np.searchsorted(found * (_POINTS - 1), np.arange(_POINTS) * found[-1])
    return float(best_from[first].mean())


def _mid_ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value from 1; equal values share the mean of their ranks."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]


def _normal(value: float, deviation: float) -> Estimate:
    half = Z95 * deviation
    return Estimate(value, max(value - half, 0.0), min(value + half, 1.0))
