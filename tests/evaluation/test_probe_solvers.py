"""The solvers of the linear probes: against scikit-learn, on several processes, and against a trace by hand."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, RidgeClassifier

from flipscale.evaluation.probe.lars import Head, Lars, LarsRecipe
from flipscale.evaluation.probe.logistic import MAX_ITERATIONS, fit
from flipscale.evaluation.probe.minimise import minimise
from flipscale.evaluation.probe.penalty import PENALTIES, search_penalty
from flipscale.evaluation.probe.ridge import CONSTANT, L2, ridge
from flipscale.evaluation.probe.rows import Classifier, Rows

ALONE = torch.Tensor.clone  # the sum over one process


@cache
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every second digit to learn from, with its number, and the others."""
    features, labels = load_digits(return_X_y=True)
    return features[::2] / 16, labels[::2].astype(np.int64), features[1::2] / 16


@cache
def reference(l2: float) -> LogisticRegression:
    features, labels, _ = digits()
    return LogisticRegression(C=1 / l2, tol=1e-9, max_iter=20_000).fit(features, labels)


def objective(weight: np.ndarray, bias: np.ndarray, features: np.ndarray, labels: np.ndarray, l2: float) -> float:
    scores = features @ weight.T + bias
    losses = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(labels)), labels]
    return losses.sum() + l2 / 2 * (weight**2).sum()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_objective_is_scikit_learn_s_on_any_number_of_processes(world: int, tmp_path: Path) -> None:
    features, labels, test = digits()
    np.savez(tmp_path / "data.npz", features=features, labels=labels)
    penalties = ("1", "0.01")
    done = processes.run("evaluation.probe_processes", ["fits", str(tmp_path), *penalties], world)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{world}-{rank}.json").read_text()) for rank in range(world)]
    assert all(found == ranks[0] for found in ranks), "a process has another classifier"
    for l2 in penalties:
        found, theirs = ranks[0][l2], reference(float(l2))
        weight, bias = (np.array(values) for values in found["weights"])
        assert found["converged"]
        best = objective(theirs.coef_, theirs.intercept_, features, labels, float(l2))
        assert found["objective"] == pytest.approx(best, rel=1e-6)
        assert objective(weight, bias, features, labels, float(l2)) == pytest.approx(found["objective"], rel=1e-12)
        answers = Classifier(torch.from_numpy(weight), torch.from_numpy(bias)).answers(torch.from_numpy(test))
        assert (answers.numpy() != theirs.predict(test)).sum() <= 1


@pytest.mark.parametrize(("offset", "scale", "l2"), [(0.0, 1.0, 1e-6), (50.0, 1.0, 1.0), (0.0, 100.0, 1e-3)])
def test_hard_problems_converge_within_the_steps_of_clip(offset: float, scale: float, l2: float) -> None:
    """Nearly no penalty, a large mean, and large features, against Newton's method, which factors the whole Hessian;
    scikit-learn's L-BFGS takes thousands of steps and ends higher."""
    features, labels, _ = digits()
    features = features * scale + offset
    found = fit(Rows(torch.from_numpy(features), torch.from_numpy(labels)), 10, l2, ALONE)
    assert found.converged
    assert found.iterations < MAX_ITERATIONS / 2
    newton = LogisticRegression(C=1 / l2, solver="newton-cholesky", tol=1e-12, max_iter=100).fit(features, labels)
    best = objective(newton.coef_, newton.intercept_, features, labels, l2)
    assert found.objective == pytest.approx(best, rel=1e-6)


def test_two_classes_and_a_class_without_images() -> None:
    features, labels, test = digits()
    features, labels = features[labels < 2], labels[labels < 2]
    theirs = LogisticRegression(C=1 / 0.1, tol=1e-9, max_iter=20_000).fit(features, labels)
    found = fit(Rows(torch.from_numpy(features), torch.from_numpy(labels * 3)), 5, 0.1, ALONE)
    ours = found.classifier.answers(torch.from_numpy(test)).numpy()
    assert set(ours) == {0, 3}
    assert (ours / 3 != theirs.predict(test)).sum() <= 1
    difference = (found.classifier.weight[3] - found.classifier.weight[0]).numpy()
    assert np.allclose(difference, theirs.coef_[0], atol=1e-3)
    assert found.classifier.bias.isinf().tolist() == [False, True, True, False, True]


def test_the_minimum_of_a_quadratic_and_a_function_that_cannot_fall() -> None:
    curvature = torch.tensor([1.0, 30.0, 1000.0], dtype=torch.float64)
    centre = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)

    def quadratic(point: torch.Tensor) -> tuple[float, torch.Tensor]:
        away = point - centre
        return 1 + (curvature * away.square()).sum().item() / 2, curvature * away

    found = minimise(quadratic, torch.zeros(3, dtype=torch.float64), 1e-12, 100)
    assert found.converged
    assert torch.allclose(found.at, centre, atol=1e-6)
    assert not minimise(quadratic, torch.zeros(3, dtype=torch.float64), 1e-12, 2).converged
    # Its gradient lies, as rounding can make one do.
    stuck = minimise(lambda point: (1.0, torch.ones(3)), torch.zeros(3), 1e-12, 100)
    assert (stuck.iterations, stuck.converged) == (0, True)


def test_the_search_looks_where_clip_s_does() -> None:
    assert len(PENALTIES) == 97
    assert (PENALTIES[0], PENALTIES[-1]) == (pytest.approx(1e-6), pytest.approx(1e2))
    looked: list[int] = []

    def accuracy(number: int) -> float:
        looked.append(number)
        return -abs(number - 53)

    assert search_penalty(accuracy) == 53
    assert looked == [0, 16, 32, 48, 64, 80, 96, 40, 56, 52, 60, 50, 54, 51, 53]
    assert search_penalty(lambda number: 0.5) == 0, "of equals the smallest"
    assert search_penalty(lambda number: float(number)) == 96


def test_lars_is_the_trace_by_hand() -> None:
    """Momentum 0.5 and trust 0.1, a matrix of norm 5 and a vector.

    Step 1: the gradient (0, 10) has norm 10, so the ratio is 0.1 x 5 / 10 = 0.05: what moves is (0, 0.5). At rate 2
    the matrix becomes (3, 4 - 1) = (3, 3). The vector takes its gradient as it is: 1 - 2 x 0.25 = 0.5.
    Step 2: no gradient, so the ratio is 1 and the momentum halves: (0, 0.25). At rate 4 the matrix becomes (3, 2).
    The vector moves by 0.125 x 4: 0.
    Step 3: the gradient (6, 4) has norm sqrt(52), the matrix sqrt(13), so the ratio is 0.1 x 1/2 = 0.05: (0.3, 0.2) on
    top of (0, 0.125) is (0.3, 0.325). At rate 10: (0, -1.25). The vector: 0.0625 + 1 = 1.0625, so -10.625.
    Step 4: the matrix has norm 1.25, the gradient (0, -0.5) has 0.5: the ratio is 0.25. (0.15, 0.1625 - 0.125) is
    (0.15, 0.0375). At rate 2: (-0.3, -1.325). The vector: 0.53125, so -11.6875.
    Step 5: rate 0 moves nothing.
    """
    matrix = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    vector = torch.tensor([1.0], dtype=torch.float64)
    lars = Lars([matrix, vector], momentum=0.5, trust=0.1)
    steps = [
        ([0.0, 10.0], 0.25, 2.0, [3.0, 3.0], 0.5),
        ([0.0, 0.0], 0.0, 4.0, [3.0, 2.0], 0.0),
        ([6.0, 4.0], 1.0, 10.0, [0.0, -1.25], -10.625),
        ([0.0, -0.5], 0.0, 2.0, [-0.3, -1.325], -11.6875),
        ([1.0, 1.0], 1.0, 0.0, [-0.3, -1.325], -11.6875),
    ]
    for of_matrix, of_vector, rate, matrix_after, vector_after in steps:
        lars.step([torch.tensor([of_matrix]).double(), torch.tensor([of_vector]).double()], rate)
        assert matrix[0].tolist() == pytest.approx(matrix_after, abs=1e-12)
        assert vector.item() == pytest.approx(vector_after, abs=1e-12)


def test_the_rate_is_the_paper_s() -> None:
    recipe = LarsRecipe()
    assert recipe.rate(0) == 0
    assert recipe.rate(5) == pytest.approx(0.01 * 64 / 2)
    assert recipe.rate(10) == pytest.approx(0.64)
    assert recipe.rate(50) == pytest.approx(0.32)
    assert recipe.rate(90) == pytest.approx(0)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_head_learns_as_autograd_does(batch_norm: bool) -> None:
    """Against torch's batch norm and cross-entropy, the batch in two parts as on two processes."""
    draws = torch.Generator().manual_seed(1)
    recipe = LarsRecipe(batch_norm=batch_norm, seed=3)
    features = torch.randn(12, 5, generator=draws, dtype=torch.float64) * 3 + 1
    labels = torch.randint(0, 4, (12,), generator=draws)
    head = Head(5, 4, recipe, ALONE, "cpu")
    assert head.weight.std() == pytest.approx(0.01, rel=0.5)
    norm = torch.nn.BatchNorm1d(5, eps=1e-6, affine=False).double()
    weight, bias = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    other = Lars([weight.data, bias.data], recipe.momentum, recipe.trust)
    for _ in range(3):
        scores = (norm(features) if batch_norm else features) @ weight.t() + bias
        loss = torch.nn.functional.cross_entropy(scores, labels)
        other.step(torch.autograd.grad(loss, (weight, bias)), 30.0)
        assert head.learn(Rows(features, labels), 12, 30.0) == pytest.approx(loss.item(), abs=1e-12)
        assert torch.allclose(head.weight, weight, atol=1e-12)
    plain = norm.eval()(features) if batch_norm else features
    expected = (plain @ weight.t() + bias).argmax(dim=1)
    assert torch.equal(head.classifier().answers(features), expected)


def test_ridge_is_scikit_learn_s() -> None:
    """On standardised features with the constant feature, targets -1 and 1."""
    features, labels, test = digits()
    some = slice(0, 60)
    found = ridge(Rows(torch.from_numpy(features[some]).float(), torch.from_numpy(labels[some])), 10, ALONE)
    known = features[some].astype(np.float32).astype(np.float64)
    mean, deviation = known.mean(axis=0), known.std(axis=0) + 1e-5

    def inputs(rows: np.ndarray) -> np.ndarray:
        return np.hstack([(rows - mean) / deviation, np.full((len(rows), 1), CONSTANT)])

    theirs = RidgeClassifier(alpha=L2, fit_intercept=False).fit(inputs(known), labels[some])
    assert (found.answers(torch.from_numpy(test)).numpy() == theirs.predict(inputs(test))).all()
    ours = found.weight.numpy() * deviation
    assert np.allclose(ours, theirs.coef_[:, :-1], atol=1e-9)


def test_a_recipe_that_cannot_be() -> None:
    with pytest.raises(
        ValueError, match=r"batch of 16,384 does not fit the 100 training images; give --global_batch_s"
    ):
        LarsRecipe().check(100)
    with pytest.raises(ValueError, match=r"epochs is 10, 10 of them to warm up; give epochs more than that"):
        LarsRecipe(epochs=10)
    with pytest.raises(ValueError, match=r"crop_scale is 0 1; give two shares above 0, at most 1, the least first"):
        LarsRecipe(crop_scale=(0, 1))
