"""The map of where masking pays, from made-up curves."""

import math
import re
from dataclasses import replace
from pathlib import Path

import cv2
import pytest

from examples.masking_map.masking_map import MapRun, Place, cells_of, draw_map, map_text
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


def test_the_map(tmp_path: Path) -> None:
    """The ratio falls with the epochs. The largest data and the longest time are unfinished."""
    places = {Place(f, m, mask) for f in (1 / 32, 1 / 8, 1.0) for m in (2.0, 8.0, 30.0) for mask in (0, 0.5, 0.75)}
    runs = []
    for place in places:
        last = 20 + (10 * math.log10(2 * place.fraction / place.minutes) + 12 if place.mask else 0)
        if (place.fraction, place.minutes) != (1.0, 30.0):
            runs.append(run(place, last, pace=100 * (1 + 2.4 * place.mask)))
    cells = cells_of(runs, NAME)
    text = map_text(cells, places, "top-1")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[0:1] == "|"]
    assert len(rows) == 2 + 18
    assert rows[2][:4] + rows[2][-5:] == ["all", "2", "50%", "1", "+12.0", "20", "32", "3.30", "1.50"]
    assert rows[4] == ["all", "30", "50%", *7 * ["-"]]
    # -0.7, because equal minutes have no ranks.
    assert re.search(r"At 50%, over 8 cells, .* -0\.7\d with the minutes, -1.00 with the epochs", text)
    assert "At a mask of 75% pairs come 2.8 times as fast, with 25% of the image tower's operations" in text
    assert "clocks" not in text
    late = replace(cells[0], off=0.02)
    assert "the clocks differ by more than 1 %: 1/32, 2 minutes, 50%." in map_text([late], places, "top-1")

    draw_map(cells, places, "top-1", tmp_path / "map.png")
    picture = cv2.imread(str(tmp_path / "map.png")).reshape(-1, 3).astype(int)
    blue, _, red = picture.T
    assert min((blue > red + 40).mean(), (red > blue + 40).mean()) > 0.03, "blue wins, red loses"
    assert (picture == 0xEE).all(axis=1).mean() > 0.03, "grey is unfinished"
