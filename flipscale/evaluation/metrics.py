"""Metrics of scores and labels, as functions without a model.

Classes of equal score are in the order of `torch.topk`, as in CLIP_benchmark, so results do not depend on the number of
processes. Metrics that sort a whole set (average precision, AUC) are computed in fp64.
"""

import math

import numpy as np
import torch

from flipscale.evaluation.intervals import Estimate, bootstrapped, normal

_POINTS = 11  # VOC 2007: recall 0, 0.1, ... 1


def hits_by_class(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return, for each row of `scores` `(rows, classes)`, the label and whether it is the best class by `argmax`, the
    best by `topk`, and among the five best: int32 `(rows, 4)`.

    CLIP_benchmark counts classes by `argmax` and top-1 by `topk`. The two differ for classes of equal score."""
    nearest = scores.topk(5 if scores.shape[1] >= 5 else 1, dim=1).indices == labels[:, None]
    hits = torch.stack([scores.argmax(dim=1) == labels, nearest[:, 0], nearest.any(dim=1)], dim=1)
    return torch.cat([labels[:, None], hits], dim=1).int()


def recall_hits(scores: torch.Tensor, query_ids: torch.Tensor, target_ids: torch.Tensor, k: int) -> torch.Tensor:
    """Return whether a target with the query's id is among the k of highest score `(queries, targets)`: bool
    `(queries,)`."""
    nearest = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (target_ids[nearest] == query_ids[:, None]).any(dim=1)


def recall_chance(num_right: np.ndarray, num_targets: int, k: int) -> float:
    """Return the expected recall at k of random answers."""
    missed = np.ones(len(num_right))
    for drawn in range(min(k, num_targets)):
        missed *= np.maximum(num_targets - num_right - drawn, 0) / (num_targets - drawn)
    return float(1 - missed.mean())


def mean_per_class(hits: np.ndarray, counts: np.ndarray) -> Estimate:
    """Return the mean over classes of the share of hits; classes without queries are left out, as in scikit-learn.

    `counts` are the queries in each class. The variance is the sum of the class variances. Each class gets one more hit
    and one more miss for it, because a class of few images that are all right is not certain.
    """
    hits, counts = hits[counts > 0].astype(np.float64), counts[counts > 0].astype(np.float64)
    smooth = (hits + 1) / (counts + 2)
    deviation = math.sqrt((smooth * (1 - smooth) / counts).sum()) / len(counts)
    return normal(float((hits / counts).mean()), deviation)


def roc_auc(scores: np.ndarray, positive: np.ndarray) -> Estimate:
    """Return the area under the ROC curve with DeLong's interval. Ties of the two kinds count half; both must occur."""
    from scipy.stats import rankdata  # slow to import, and few tasks need it

    of_positive, of_negative = scores[positive].astype(np.float64), scores[~positive].astype(np.float64)
    num_positive, num_negative = len(of_positive), len(of_negative)
    ranks = rankdata(np.concatenate([of_positive, of_negative]))
    # Share of negatives below each positive, and of positives above each negative.
    below = (ranks[:num_positive] - rankdata(of_positive)) / num_negative
    above = 1 - (ranks[num_positive:] - rankdata(of_negative)) / num_positive
    variance = sum(float(part.var(ddof=1)) / len(part) for part in (below, above) if len(part) > 1)
    return normal(float(below.mean()), math.sqrt(variance))


def mean_average_precision(scores: np.ndarray, positive: np.ndarray, interpolated: bool) -> Estimate:
    """Return the mean over classes of the average precision, with a bootstrap interval over rows.

    A class without positives has 0, and rows of equal score are in the order of `torch.sort`, as in CLIP_benchmark.

    Args:
        interpolated: whether to use VOC 2007's form: the mean, over recall 0, 0.1, ... 1, of the highest precision at
            that recall or more. The other form is the mean of the precision at the rank of each positive.
    """
    orders = torch.from_numpy(scores.T).sort(dim=1, descending=True).indices.numpy()
    columns = [(order, right[order]) for order, right in zip(orders, positive.T, strict=True)]

    def measure(times: np.ndarray) -> float:
        return float(np.mean([_average_precision(times[order], right, interpolated) for order, right in columns]))

    return bootstrapped(measure, len(scores))


def average_precision_chance(positives: np.ndarray, n: int) -> float:
    """Return the expected mean over classes of the plain average precision of a random order, given the
    number of positives of each class, `(classes,)`."""
    harmonic = float((1 / np.arange(1, n + 1)).sum())
    others = (positives - 1) / max(n - 1, 1)
    return float(np.where(positives > 0, others + (1 - others) * harmonic / n, 0.0).mean())


def _average_precision(times: np.ndarray, right: np.ndarray, interpolated: bool) -> float:
    # The rows before the first drawn one have no precision.
    hits, drawn = np.cumsum(times * right), np.maximum(np.cumsum(times), 1)
    if not hits[-1]:
        return 0.0
    if not interpolated:
        return float((times * right * hits / drawn).sum() / hits[-1])
    best_from = np.maximum.accumulate((hits / drawn)[::-1])[::-1]
    # Whole numbers avoid rounding: recall hits / all >= p / 10 means 10 * hits >= p * all.
    first = np.searchsorted(hits * (_POINTS - 1), np.arange(_POINTS) * hits[-1])
    return float(best_from[first].mean())
