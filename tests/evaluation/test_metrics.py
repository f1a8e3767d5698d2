"""Metrics against hand-worked cases and scikit-learn."""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score

from flipscale.evaluation.intervals import clustered_share, wilson
from flipscale.evaluation.metrics import (
    average_precision_chance,
    mean_average_precision,
    mean_per_class,
    recall_chance,
    roc_auc,
)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(15, 50, 0.1910, 0.4375), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)]
)
def test_wilson_s_interval(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-4)


def test_mean_per_class_is_scikit_learn_s_balanced_accuracy() -> None:
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.zeros(40, int), np.full(7, 1), np.full(3, 3)])  # class 2 is empty
    predicted = rng.integers(4, size=len(labels))
    hits = np.bincount(labels[labels == predicted], minlength=4)
    found = mean_per_class(hits, np.bincount(labels, minlength=4))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        theirs = balanced_accuracy_score(labels, predicted)
    assert found.value == pytest.approx(theirs, abs=1e-12)
    assert 0 <= found.low < found.value < found.high <= 1


def test_average_precision_by_hand() -> None:
    # In the order of scores: right, wrong, right, wrong, wrong, right: precisions 1, 2/3, 1/2 at recalls 1/3, 2/3, 1.
    scores, right = np.array([[6.0], [5.0], [4.0], [3.0], [2.0], [1.0]]), np.array([[1], [0], [1], [0], [0], [1]], bool)
    assert mean_average_precision(scores, right, False).value == pytest.approx((1 + 2 / 3 + 1 / 2) / 3, abs=1e-12)
    # Recalls 0 to 0.3 have 1, 0.4 to 0.6 have 2/3, 0.7 to 1 have 1/2.
    assert mean_average_precision(scores, right, True).value == pytest.approx((4 + 3 * 2 / 3 + 4 / 2) / 11, abs=1e-12)


def test_recall_of_three_tenths_is_reached_by_three_of_ten() -> None:
    """In binary fractions 0.1 x 3 is above 3 / 10."""
    right = np.array([1, 1, 1, 0] + [0] * 10 + [1] * 7, bool)[:, None]
    found = mean_average_precision(-np.arange(21.0)[:, None], right, True)
    # 1 at recalls 0 to 0.3; from there the best precision is that of the last: 10 of 21.
    assert found.value == pytest.approx((4 + 7 * 10 / 21) / 11, abs=1e-12)


def test_a_class_without_positives_counts_as_0() -> None:
    scores, right = np.array([[2.0, 2.0], [1.0, 1.0]]), np.array([[0, 0], [1, 0]], bool)
    for interpolated in (False, True):
        assert mean_average_precision(scores, right, interpolated).value == pytest.approx((1 / 2 + 0) / 2, abs=1e-12)


def test_average_precision_is_scikit_learn_s() -> None:
    rng = np.random.default_rng(0)
    scores, right = rng.normal(size=(300, 5)), rng.random((300, 5)) < [0.5, 0.3, 0.1, 0.05, 0.01]
    found = mean_average_precision(scores, right, False)
    assert found.value == pytest.approx(average_precision_score(right, scores), abs=1e-9)
    assert 0 < found.low < found.value < found.high < 1
    assert mean_average_precision(scores, right, False) == found, "the bootstrap has a fixed seed"


def test_chance_of_average_precision() -> None:
    rng = np.random.default_rng(0)
    right = np.arange(20)[:, None] < np.array([[3, 10, 0]])
    drawn = [
        np.mean([average_precision_score(right[:, c], rng.random(20)) for c in (0, 1)] + [0.0]) for _ in range(400)
    ]
    assert average_precision_chance(right.sum(axis=0), 20) == pytest.approx(np.mean(drawn), abs=0.02)


def test_roc_auc_by_hand_and_scikit_learn() -> None:
    scores, positive = np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, False, True, True])
    assert roc_auc(scores, positive).value == pytest.approx(3.5 / 4, abs=1e-12)
    rng = np.random.default_rng(0)
    positive = rng.random(500) < 0.3
    for scores in (rng.normal(size=500) + positive, rng.integers(4, size=500) + positive):
        assert roc_auc(scores, positive).value == pytest.approx(roc_auc_score(positive, scores), abs=1e-9)


def test_intervals_hold_19_times_of_20() -> None:
    rng = np.random.default_rng(0)
    shares, counts, positive = rng.uniform(0.1, 0.9, 30), rng.integers(2, 40, 30), np.arange(120) < 40
    auc = 0.5 * (1 + math.erf(0.5))  # of two normal curves, 1 apart
    for truth, draw in (
        (shares.mean(), lambda: mean_per_class(rng.binomial(counts, shares), counts)),
        (auc, lambda: roc_auc(rng.normal(size=120) + positive, positive)),
    ):
        assert 0.92 < np.mean([e.low <= truth <= e.high for e in (draw() for _ in range(400))]) < 0.99


def test_captions_of_one_image_are_no_independent_queries() -> None:
    counts = np.full(40, 5)
    alike, mixed = np.array([5] * 20 + [0] * 20), np.array([3, 2] * 20)
    assert clustered_share(alike, counts).low == pytest.approx(wilson(20, 40)[0], abs=0.01), "40 queries, not 200"
    assert clustered_share(mixed, counts)[1:] == pytest.approx(wilson(100, 200)), "no more than 200"
    assert clustered_share(counts, counts)[1:] == pytest.approx(wilson(40, 40))


def test_chance_of_recall() -> None:
    assert recall_chance(np.array([1]), 20, 5) == pytest.approx(5 / 20)
    assert recall_chance(np.array([2, 1]), 4, 2) == pytest.approx(((1 - 2 / 4 * 1 / 3) + 2 / 4) / 2)
    assert recall_chance(np.array([3]), 4, 9) == 1.0
