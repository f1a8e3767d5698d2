"""Laws of scaling on published models and on points made by the laws themselves."""

import csv
from pathlib import Path

import numpy as np
import pytest

from flipscale.studies.laws import AdditiveLaw, Law, Points, PowerLaw, SaturatingLaw, fit_law, predict

# 29 models of LAION's scaling study (arXiv 2212.07143): model, data, samples seen, operations and two results.
LAION = Path(__file__).parents[1] / "fixtures/laion_scaling.csv"
MILLION, BILLION = 1e6, 1e9
PARAMETERS = {"B-32": 151 * MILLION, "B-16": 150 * MILLION, "L-14": 428 * MILLION, "H-14": 986e6, "g-14": 1367e6}


def count(text: str) -> float:
    return float(text[:-1]) * {"M": MILLION, "B": BILLION}[text[-1]]


def laion(result: str) -> Points:
    with LAION.open() as file:
        rows = list(csv.DictReader(file))
    return Points(
        np.array([f"{row['model']} {row['data']} {row['samples']}" for row in rows]),
        np.array([2e18 * float(row["gmac_1e9"]) for row in rows]),
        np.array([100 - float(row[result]) for row in rows]),
        np.array([PARAMETERS[row["model"]] for row in rows]),
        np.array([count(row["samples"]) for row in rows]),
        np.array([count(row["data"]) for row in rows]),
    )


def made(compute: np.ndarray, error: np.ndarray, **spent: np.ndarray) -> Points:
    same = np.ones(len(compute))
    spent = {"parameters": same, "samples": compute, "pairs": same, **spent}
    return Points(np.array([f"run{number}" for number in range(len(compute))]), compute, error, **spent)


@pytest.mark.parametrize(
    ("result", "slope", "interval"),
    [("imagenet_top1", -0.111, (-0.124, -0.103)), ("coco_image_r5", -0.082, (-0.094, -0.074))],
)
def test_laion_s_slopes(result: str, slope: float, interval: tuple[float, float]) -> None:
    points = laion(result)
    law = PowerLaw(points)
    fit = fit_law(law, points)
    assert round(fit.fitted[0], 3) == slope
    # The narrower interval counts equal points once, and holds the truth 84 times of 100.
    assert fit.low[0] < interval[0] < slope < interval[1] < fit.high[0]
    assert (fit.low[0], fit.high[0]) == pytest.approx(interval, abs=0.007)


def test_laion_s_largest_two() -> None:
    points = laion("imagenet_top1")
    held_out = np.array([name.startswith(("g-14", "H-14")) for name in points.names])
    giant, huge = predict(PowerLaw(points), points, held_out, 100)
    assert (round(giant.predicted, 1), round(huge.predicted, 1)) == (24.1, 22.5)
    assert (round(giant.error, 1), round(huge.error, 1)) == (23.3, 22.0)
    assert giant.low < giant.error < giant.high
    assert points.names[points.largest_budget()].tolist() == ["H-14 2B 34B"]


def grid() -> dict[str, np.ndarray]:
    parameters, samples, pairs = np.meshgrid([1e6, 4e6, 16e6], [1e6, 4e6, 16e6], [1e5, 1e6, 1e7])
    return {"parameters": parameters.ravel(), "samples": samples.ravel(), "pairs": pairs.ravel()}


def test_a_synthetic_additive_law() -> None:
    spent = grid()
    compute = spent["parameters"] * spent["samples"]
    middle = {name: np.exp(np.log(values).mean()) for name, values in spent.items()}
    truth = {"parameters": (0.35, 12.0), "samples": (0.5, 20.0), "pairs": (0.6, 9.0)}
    error = 15 + sum(size * (spent[name] / middle[name]) ** -power for name, (power, size) in truth.items())
    expected = [*(power for power, _ in truth.values()), *(size for _, size in truth.values()), 15]
    exact = made(compute, error, **spent)
    assert AdditiveLaw(exact).fit(exact) == pytest.approx(expected, rel=0.02)

    rng = np.random.default_rng(0)
    noisy = made(compute, error * np.exp(0.01 * rng.standard_normal(len(error))), **spent)
    fit = fit_law(AdditiveLaw(noisy), noisy, resamples=20)
    assert fit.law.parameters[-1] == "floor"
    assert ((fit.low <= expected) & (expected <= fit.high)).all()


def test_a_synthetic_saturating_law() -> None:
    compute = 1e15 * 1.7 ** np.arange(16)
    unit = np.exp(np.log(compute).mean())
    truth = [12.0, 0.05, -0.4, 18.0]
    error = truth[0] * (compute / unit + truth[1]) ** truth[2] + truth[3]
    exact = made(compute, error)
    assert SaturatingLaw(exact).fit(exact) == pytest.approx(truth, rel=0.01)
    noisy = made(compute, error * np.exp(0.003 * np.random.default_rng(2).standard_normal(16)))
    fit = fit_law(SaturatingLaw(noisy), noisy, resamples=60)
    assert ((fit.low <= truth) & (truth <= fit.high)).all()
    a, b, c, d = fit.fitted
    assert min(a, b, d, -c) >= 0


def test_an_axis_without_variation_is_no_term() -> None:
    compute = np.geomspace(1e15, 1e17, 6)
    law = AdditiveLaw(made(compute, 30 * (compute / 1e16) ** -0.2 + 5))
    assert law.parameters == ("exponent of samples", "samples", "floor")
    assert law.formula == "floor + samples x samples^-exponent"


def test_the_front() -> None:
    points = made(np.array([3.0, 1.0, 2.0, 2.0, 4.0, 1.0]), np.array([8.0, 9.0, 9.5, 8.5, 8.0, 9.0]))
    assert points.front().names.tolist() == ["run1", "run5", "run3", "run0"]


@pytest.mark.parametrize(
    ("law", "count", "message"),
    [
        (PowerLaw, 1, "power law: 1 points, too few for 2 parameters .at least 4"),
        (SaturatingLaw, 5, "saturating: 5 points, too few for 4 parameters .at least 6"),
        (AdditiveLaw, 4, "additive: 4 points, too few for 3 parameters .at least 5"),
    ],
)
def test_too_few_points(law: type[Law], count: int, message: str) -> None:
    compute = 1e15 * 2.0 ** np.arange(count)
    points = made(compute, 40 * (compute / 1e15) ** -0.1)
    with pytest.raises(ValueError, match=message):
        fit_law(law(points), points)
    with pytest.raises(ValueError, match="too few"):
        predict(law(points), points, points.largest_budget())


def test_refused_points() -> None:
    spent = {name: values[grid()["pairs"] < 1e7] for name, values in grid().items()}
    with pytest.raises(ValueError, match="two values of pairs"):
        AdditiveLaw(made(spent["samples"], spent["samples"], **spent))
    compute = np.arange(1.0, 9.0)
    with pytest.raises(ValueError, match="all points have the same parameters, samples, pairs"):
        AdditiveLaw(made(compute, 1 / compute, samples=np.ones(8)))
    with pytest.raises(ValueError, match="error of run1 is 0"):
        made(np.array([1.0, 2.0]), np.array([3.0, 0.0]))
