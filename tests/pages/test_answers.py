"""Answers of a model beside a plain computation."""

import numpy as np

from flipscale.pages.run_page import answers_of, class_rows, mistakes


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_answers_are_the_nearest_and_their_shares() -> None:
    rng = np.random.default_rng(0)
    pictures, texts = unit(rng.standard_normal((700, 8))), unit(rng.standard_normal((5, 8)))
    right = rng.integers(5, size=700)
    answers = answers_of(pictures, texts, list("abcde"), right.tolist(), 20.0)
    cosines = pictures @ texts.T
    beliefs = np.exp(20.0 * cosines) / np.exp(20.0 * cosines).sum(axis=1, keepdims=True)
    order = np.argsort(-cosines, axis=1)
    assert (answers.top == order[:, :3]).all()
    np.testing.assert_allclose(answers.shares, np.take_along_axis(beliefs, order[:, :3], axis=1), rtol=1e-4)
    places = [order[row].tolist().index(right[row]) for row in range(700)]
    assert answers.ranks.tolist() == places
    assert answers.num_right == places.count(0)


def test_best_and_worst_and_most_confused() -> None:
    texts = np.eye(3, dtype=np.float32)
    # Two pictures of a are named right; of b one is, and two are taken for c; the one of c is taken for a.
    pictures = unit(np.array([[3, 1, 0], [3, 0, 1], [0, 3, 1], [0, 1, 3], [0, 1, 9], [2, 0, 1]]))
    answers = answers_of(pictures, texts, ["a", "b", "c"], [0, 0, 1, 1, 1, 2], 10.0)
    rows = class_rows(answers)
    assert [(row.name, row.num_right, row.images, row.taken_for) for row in rows] == [
        ("a", 2, 2, ""),
        ("b", 1, 3, "c"),
        ("c", 0, 1, "a"),
    ]
    assert [row.rank for row in rows] == [1.0, 1 + 2 / 3, 2.0]
    found = mistakes(answers, 5)
    assert [(one.right, one.given, one.count, one.example) for one in found] == [("b", "c", 2, 4), ("c", "a", 1, 5)]
    assert mistakes(answers, 1) == found[:1]


def test_one_answer_is_always_right() -> None:
    answers = answers_of(np.ones((2, 1), np.float32), np.ones((1, 1), np.float32), ["only"], [0, 0], 10.0)
    assert (answers.num_right, answers.top.tolist(), answers.shares.tolist()) == (2, [[0], [0]], [[1.0], [1.0]])
    assert mistakes(answers, 5) == []
