"""The map of where masking pays, from made-up curves."""

import math

import pytest

from examples.masking_map.masking_map import MapRun, Place, cells_of
from flipscale.evaluation.presentation.curves import Curve
from flipscale.evaluation.results import Measured, Result

pytestmark = pytest.mark.usefixtures("real_figures")

NAME = "zero_shot/top1"
WHOLE, MASKED = Place(0.5, 4, 0.0), Place(0.5, 4, 0.75)


def run(place: Place, last: float, seed: int = 0, pace: float = 100.0) -> MapRun:
    """A run of `pace` pairs a second on 8,000 pairs, whose result rises linearly from chance, 1 %, to `last`."""
    seconds = 60 * place.minutes
    course = [
        Measured(Result("zero_shot", "zero_shot", "top1", value, 1000, value - 0.5, value + 0.5, chance=1.0), n, n, at)
        for n, (at, value) in enumerate([(seconds / 2, (1 + last) / 2), (seconds, last)], 1)
    ]
    records = [{"stage": "a", "samples_seen": pace * at, "trained_seconds": at} for at in (seconds / 2, seconds)]
    masks = {"a": place.mask, "b": 0.0} if place.mask else {"a": 0.0}
    return MapRun(place, 8000 * place.fraction, 1 - place.mask, Curve("run", records, course, masks, seed=seed))


def test_a_cell() -> None:
    (cell,) = cells_of([run(WHOLE, 11.0, pace=100.0), run(MASKED, 21.0, pace=300.0)], NAME)
    # From 1 to 21 in 240 s, it is at 11 after 120 s.
    assert cell.ratio is not None
    assert cell.ratio.mean == pytest.approx(2.0)
    assert (cell.gain.mean, cell.seeds, cell.tuned) == (10.0, 1, True)
    assert (cell.epochs, cell.whole_epochs, cell.speed) == (300 * 240 / 4000, 100 * 240 / 4000, 3.0)
    assert (cell.end, cell.whole_end, cell.left) == (21.0, 11.0, 0.25)
    # Of a step of 1 s, three quarters of the tower's share s are left out: 1 - 0.75 s = 1 / 3.
    assert cell.tower == pytest.approx((2 / 3) / 0.75)
    # A masked run that never is as good is slower.
    (cell,) = cells_of([run(WHOLE, 21.0), run(MASKED, 11.0)], NAME)
    assert cell.ratio is not None
    assert (cell.ratio.mean, cell.gain.mean) == (pytest.approx(0.5), -10.0)
    # An unmasked run at chance gives no ratio.
    assert cells_of([run(WHOLE, 1.4), run(MASKED, 11.0)], NAME)[0].ratio is None
    assert cells_of([run(MASKED, 11.0)], NAME) == []


def test_seeds() -> None:
    runs = [run(WHOLE, last, seed) for seed, last in enumerate((11.0, 13.0, 9.0))]
    runs += [run(MASKED, last, seed) for seed, last in enumerate((21.0, 20.0, 22.0))]
    (cell,) = cells_of(runs, NAME)
    assert cell.ratio is not None
    assert cell.ratio.mean == pytest.approx(math.prod([20 / 10, 19 / 12, 21 / 8]) ** (1 / 3))
    assert cell.ratio.low is not None
    assert cell.gain.mean == pytest.approx(10.0)
    (fewer,) = cells_of([*runs[:3], runs[4]], NAME)
    assert (fewer.seeds, fewer.gain.low) == (1, None), "only common seeds are compared"
