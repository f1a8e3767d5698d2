"""The map of where masking pays, of runs whose curves are made up, so that what it must say is known."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest

from examples.masking_map.masking_map import Cell, MapRun, Place, cells_of, draw_map, map_text
from flipscale.evaluation.reports.curves import Curve
from flipscale.evaluation.results import Measured, Result

NAME = "zero_shot/top1"


def run(place: Place, last: float, seed: int = 0, pace: float = 100.0) -> MapRun:
    """A run of so many pairs a second whose result rises from chance, 1 %, on a line to `last`; of the data there are
    8,000 pairs."""
    seconds = 60 * place.minutes
    course = [
        Measured(Result("zero_shot", "zero_shot", "top1", value, 1000, value - 0.5, value + 0.5, chance=1.0), n, n, at)
        for n, (at, value) in enumerate([(seconds / 2, (1 + last) / 2), (seconds, last)], 1)
    ]
    records = [
        {"stage": "a", "samples_seen": pace * at, "trained_seconds": at, "images_per_s": pace}
        for at in (seconds / 2, seconds)
    ]
    masks = {"a": place.mask, "b": 0.0} if place.mask else {"a": 0.0}
    curve = Curve(f"run-seed{seed}", records, course, masks, seed=seed)
    return MapRun(place, 8000 * place.fraction, 1 - place.mask, curve)


def test_a_cell_says_how_many_times_as_fast_it_is_and_what_that_goes_with() -> None:
    masked, whole = Place(0.5, 4, 0.75), Place(0.5, 4, 0.0)
    (cell,) = cells_of([run(whole, 11.0, pace=100.0), run(masked, 21.0, pace=300.0)], NAME)
    # From 1 to 21 in 240 s, it is at 11 after 120 s.
    assert cell.ratio is not None
    assert cell.ratio.mean == pytest.approx(2.0)
    assert (cell.gain.mean, cell.seeds, cell.tuned) == (10.0, 1, True)
    assert (cell.epochs, cell.whole_epochs, cell.speed) == (300 * 240 / 4000, 100 * 240 / 4000, 3.0)
    assert (cell.end, cell.whole_end, cell.left) == (21.0, 11.0, 0.25)
    # Of a step of 1 s, three quarters of the tower's share s are left out: 1 - 0.75 s = 1 / 3.
    assert cell.tower == pytest.approx((2 / 3) / 0.75)


def test_where_the_masked_run_never_is_as_good_it_is_slower_by_what_mask_0_took_for_its_end() -> None:
    masked, whole = Place(1, 4, 0.5), Place(1, 4, 0.0)
    (cell,) = cells_of([run(whole, 21.0), run(masked, 11.0)], NAME)
    assert cell.ratio is not None
    assert cell.ratio.mean == pytest.approx(0.5)
    assert cell.gain.mean == -10.0


def test_seeds_are_compared_one_by_one_and_give_an_interval() -> None:
    masked, whole = Place(1, 4, 0.5), Place(1, 4, 0.0)
    runs = [run(whole, last, seed) for seed, last in enumerate((11.0, 13.0, 9.0))]
    runs += [run(masked, last, seed) for seed, last in enumerate((21.0, 20.0, 22.0))]
    (cell,) = cells_of(runs, NAME)
    ratios = [20 / 10, 19 / 12, 21 / 8]
    assert cell.ratio is not None
    assert cell.ratio.mean == pytest.approx(math.prod(ratios) ** (1 / 3))
    assert cell.ratio.low is not None
    assert cell.ratio.low < cell.ratio.mean
    assert cell.gain.mean == pytest.approx(10.0)
    (fewer,) = cells_of([*runs[:3], runs[4]], NAME)
    assert (fewer.seeds, fewer.gain.low) == (1, None), "only what both have is compared"


def test_nothing_is_said_of_a_baseline_that_is_no_better_than_chance() -> None:
    masked, whole = Place(1, 4, 0.5), Place(1, 4, 0.0)
    (cell,) = cells_of([run(whole, 1.4), run(masked, 11.0)], NAME)
    assert cell.ratio is None
    assert cells_of([run(masked, 11.0)], NAME) == []


@pytest.fixture
def a_map() -> Callable[[], tuple[list[Cell], set[Place]]]:
    """A map whose ratio falls with the epochs; at the largest data and the longest time nothing is finished."""

    def make() -> tuple[list[Cell], set[Place]]:
        places = {Place(f, m, mask) for f in (1 / 32, 1 / 8, 1.0) for m in (2.0, 8.0, 30.0) for mask in (0, 0.5, 0.75)}
        done = [place for place in places if (place.fraction, place.minutes) != (1.0, 30.0)]
        lasts = {
            place: 20 + (0 if not place.mask else 10 * math.log10(2 * place.fraction / place.minutes) + 12)
            for place in done
        }
        return cells_of([run(place, lasts[place], pace=100 * (1 + 2.4 * place.mask)) for place in done], NAME), places

    return make


def test_the_table_has_all_places_and_what_the_ratio_goes_with(a_map: Callable) -> None:
    text = map_text(*a_map(), "top-1")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[0:1] == "|"]
    assert len(rows) == 2 + 18
    assert rows[0][-5:] == ["points", "from", "to", "epochs", "at mask 0"]
    rows = rows[1:]
    assert rows[1][:4] == ["all", "2", "50%", "1"]
    assert rows[1][-5:] == ["+12.0", "20", "32", "3.30", "1.50"]
    assert rows[3] == ["all", "30", "50%", *7 * ["-"]]
    assert rows[9][:3] == ["1/32", "30", "50%"]
    # Between equal minutes are no ranks, so that it is not -1 with these.
    minutes = r"At 50%, over 8 cells, the rank correlation of times as fast is -0\.7\d with the minutes, "
    assert re.search(minutes + "-1.00 with the epochs of the masked run", text)
    assert "At a mask of 75% pairs come 2.8 times as fast, with 25% of the image tower's operations: the tower" in text
    assert "clocks" not in text


def test_the_table_names_the_places_where_clocks_differ() -> None:
    masked, whole = Place(1 / 8, 4, 0.5), Place(1 / 8, 4, 0.0)
    late = run(masked, 21.0)
    late.curve.records[-1]["trained_seconds"] = 250.0
    text = map_text(cells_of([run(whole, 11.0), late], NAME), [masked, whole], "top-1")
    assert text.endswith("Not at equal time, the clocks differ by more than 1 %: 1/8, 4 minutes, 50%.")


def test_the_figure_is_blue_where_masking_wins_red_where_it_loses_and_grey_where_nothing_is(
    a_map: Callable, tmp_path: Path
) -> None:
    cells, places = a_map()
    draw_map(cells, places, "top-1", tmp_path / "map.png")
    picture = cv2.imread(str(tmp_path / "map.png")).reshape(-1, 3).astype(int)
    blue, _, red = picture.T
    assert min((blue > red + 40).mean(), (red > blue + 40).mean()) > 0.03
    assert (picture == 0xEE).all(axis=1).mean() > 0.03
    draw_map([], places, "top-1", tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()
