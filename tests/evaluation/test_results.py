"""Results: their intervals, how they are shown, their lines, and runs from before there were lines."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from flipscale.evaluation.intervals import mean_of, student, wilson
from flipscale.evaluation.kinds.zero_shot import ZeroShot
from flipscale.evaluation.presentation import figures
from flipscale.evaluation.presentation.curves import (
    Curve,
    by_recipe,
    comparison_table,
    over_seeds,
    read_curve,
    record_baselines,
    seconds_to,
    times_to_equal,
)
from flipscale.evaluation.presentation.figures import draw_loss, draw_result
from flipscale.evaluation.results import (
    BEFORE,
    THIS_MODEL,
    Measured,
    Result,
    append_results,
    drop_results_after,
    latest,
    read_baselines,
    read_results,
    with_changes,
)
from flipscale.io.errors import UserError

pytestmark = pytest.mark.usefixtures("real_figures")

TOP1 = Result("zero_shot", "zero_shot", "top1", 40.0, 200, 33.45, 46.91, chance=6.25, made_by={"data": "set"})
RANK = Result("ranks", "median_rank", "median", 3.25, unit="", label="median rank", higher_is_better=False)


def test_lines_come_back_and_later_ones_are_dropped(tmp_path: Path) -> None:
    for step in (10, 20):
        append_results(tmp_path, [TOP1, RANK], step, 16 * step, float(step))
    (tmp_path / "results.jsonl").open("a").write('{"step": 3')
    assert [(m.step, m.result) for m in read_results(tmp_path)] == [(10, TOP1), (10, RANK), (20, TOP1), (20, RANK)]
    drop_results_after(tmp_path, 10)
    assert [m.step for m in read_results(tmp_path)] == [10, 10]
    assert latest(read_results(tmp_path)) == [TOP1, RANK]


def test_what_a_training_changed() -> None:
    def found(hits: int, n: int, who: str, **fields: object) -> Result:
        low, high = wilson(hits, n)
        return Result("own", "zero_shot", "top1", 100 * hits / n, n, 100 * low, 100 * high, who=who, **fields)

    # Newcombe, Statistics in Medicine 17, 1998, page 873, his method 10.
    before, after = found(48, 80, BEFORE), found(56, 70, THIS_MODEL, chance=6.25)
    changed = with_changes([before, TOP1, after, RANK])
    change = changed[3]
    assert changed == [TOP1, after, before, change, RANK]
    assert (change.value, change.low, change.high) == pytest.approx((20.0, 5.24, 33.39), abs=0.005)
    assert (change.who, change.unit, change.chance) == ("won", "points", None)
    worse, better = found(48, 80, THIS_MODEL), found(56, 70, BEFORE)
    assert with_changes([better, worse])[-1].who == "lost"
    assert with_changes([found(50, 80, BEFORE), worse])[-1].who == "no clear change"
    assert with_changes([replace(one, higher_is_better=False) for one in (better, worse)])[-1].who == "won"
    assert with_changes([replace(one, low=None, high=None) for one in (better, worse)])[-1].who == "no clear change"
    assert with_changes([before]) == [before]
    # The test set was replaced, and the run went on.
    assert with_changes([replace(before, test="old"), replace(after, test="new")])[1:] == [replace(before, test="old")]


def test_answers_to_the_same_queries_are_compared_in_pairs() -> None:
    rng = np.random.default_rng(0)
    old = rng.random(203) < 0.6
    new = np.where(rng.random(203) < 0.1, ~old, old)
    task = ZeroShot("zero_shot", "data", "own")
    before, after = (task.proportion("top1", int(hits.sum()), 203, right=hits) for hits in (old, new))
    before = replace(before, who=BEFORE)
    change = with_changes([before, after])[-1]
    table = np.array([[np.sum(new & old), np.sum(new & ~old)], [np.sum(~new & old), np.sum(~new & ~old)]]) + 0.5
    share = table / table.sum()
    mean = share[0, 1] - share[1, 0]
    half = 1.959964 * np.sqrt((share[0, 1] + share[1, 0] - mean**2) / table.sum())
    assert change.value == pytest.approx(100 * (new.mean() - old.mean()))
    assert (change.low, change.high) == pytest.approx((100 * (mean - half), 100 * (mean + half)))
    independent = with_changes([replace(before, outcomes=""), after])[-1]
    assert change.high - change.low < 0.6 * (independent.high - independent.low)
    for damaged in ("zz" * 26, after.outcomes[2:]):
        assert with_changes([before, replace(after, outcomes=damaged)])[-1].low == independent.low
    assert task.proportion("top1", int(new.sum()), 203) == replace(after, outcomes="")


def test_results_that_any_model_reaches_are_left_out() -> None:
    found = [Result("five", "zero_shot", "top5", 100.0, 20, chance=100.0, who=who) for who in (BEFORE, THIS_MODEL)]
    assert with_changes([*found, TOP1]) == with_changes([*reversed(found), TOP1]) == [TOP1]
    assert not Result("odds", "association", "ratio", 100.0, unit="", chance=100.0).is_certain


@pytest.mark.parametrize(
    "line",
    [None, "", "{}", "[1]", "\0", '"value": NaN', '"value": "9"', '"low": "9"', '"who": 3', '"who": "this model"'],
)
def test_a_bad_file_of_baselines_is_refused(line: str | None, tmp_path: Path) -> None:
    file = tmp_path / "baselines.jsonl"
    good: dict[str, Any] = {"task": "t", "kind": "zero_shot", "metric": "top1", "value": 9, "who": "a"}
    if line is not None:
        bad = f"{json.dumps(good)[:-1]}, {line}}}" if line.startswith('"') else line
        file.write_text(f"{json.dumps(good)}\n{bad}" if line else line)
    with pytest.raises(UserError, match=r"--baselines is .*baselines\.jsonl"):
        read_baselines(file)
    file.write_text(json.dumps(good))
    assert read_baselines(file) == [Result(**good)]


def test_a_run_s_curve_and_its_baselines(tmp_path: Path) -> None:
    stages = [{"name": "small", "mask_ratio": 0.5, "image_size": 16}, {"name": "tuned", "mask_ratio": 0.0}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": stages}))
    record = {"step": 20, "samples_seen": 320, "trained_seconds": 4.0, "replaced/undecodable": 1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    append_results(tmp_path, [TOP1, RANK], 20, 320, 4.0)
    baseline = Result("zero_shot", "zero_shot", "top1", 12.5, who="nearest image")
    for value in (10.0, 12.5, 12.5):
        record_baselines(tmp_path, [replace(baseline, value=value)])
    assert len(read_results(tmp_path)) == 4
    curve = read_curve(tmp_path)
    assert curve.results == [TOP1, RANK, baseline]
    assert (curve.masks, curve.sizes, curve.tuned) == ({"small": 0.5, "tuned": 0.0}, {"small": 16}, True)
    assert curve.images_per_s == 80


def seeded(seed: int, values: list[float], learned: str = "one") -> Curve:
    """A run that was evaluated every ten seconds, a little later for each seed."""
    records = [{"step": 1, "samples_seen": 320, "trained_seconds": 4.0, "loss": 2.0, "lr": 0.1, "stage": "masked"}]
    measured = [
        Measured(replace(TOP1, value=value, low=None, high=None), number, 16, 10.0 * number + seed)
        for number, value in enumerate(values, 1)
    ]
    return Curve(f"s-seed{seed}", records, measured, {"masked": 0.5}, {}, seed, learned)


def test_the_time_to_equal_accuracy_is_a_ratio_with_an_interval_over_seeds() -> None:
    slow = [seeded(seed, [10.0, 20.0 + seed], "slow") for seed in range(3)]
    fast = [replace(seeded(seed, [20.0 + seed, 40.0], "fast"), name=f"f-seed{seed}") for seed in range(3)]
    (line,) = times_to_equal([*slow, *fast])
    # Each is where the other one ends after 10 of 20 seconds, and its seed's part of a second.
    ratios = [(20 + seed) / (10 + seed) for seed in range(3)]
    mean = math.exp(sum(map(math.log, ratios)) / 3)
    assert line.startswith(f"f reaches the last top-1 of s (21.0 %) {mean:.2f} times as fast (95 % interval over 3 ")
    assert times_to_equal([slow[0], fast[0]]) == [
        "f reaches the last top-1 of s (20.0 %) 2.00 times as fast; one seed, so no interval."
    ]
    never = [replace(fast[0], measured=slow[0].measured[:1]), fast[1], replace(fast[2], name="f-seed2")]
    assert times_to_equal([*slow, *never])[0].endswith("in 2 of 3 seeds only, so no ratio of times is given.")
    assert seconds_to(slow[0], TOP1.name, 15.0) == 15.0
    assert [mean_of([1.0, 3.0]).value, round(student(10), 3)] == [2.0, 2.228]


def test_runs_of_several_seeds_have_their_mean_and_a_band(tmp_path: Path) -> None:
    first, second, third = seeded(0, [10.0, 20.0]), seeded(1, [10.0, 30.0]), seeded(2, [10.0, 40.0])
    other = seeded(0, [5.0, 6.0], "two")
    curves = [first, second, third, other]
    assert by_recipe(curves) == [[first, second, third], [other]]
    assert by_recipe([first, replace(first, name="again")]) == [[first], [replace(first, name="again")]]
    times, means = over_seeds([first, second], TOP1.name)
    assert times.tolist() == [10.0, 20.0]
    assert means == [(10.0, 10.0, 10.0), (24.0, 0.0, pytest.approx(24 + 12.7062 * 4))]
    assert mean_of([98.0, 99.0, 100.0], "%").high == 100
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in comparison_table(curves).splitlines()]
    assert [row[-1] for row in rows[2:7]] == ["20.0 %", "30.0 %", "40.0 %", "6.0 %", "30.0 % (5.2 to 54.8)"]
    draw_result(curves, TOP1, tmp_path / "top1.png")
    draw_loss(curves, tmp_path / "loss.png")
    assert (tmp_path / "top1.png").stat().st_size > 10_000


def test_a_legend_lies_on_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    curves = [seeded(0, [10.0, 20.0], "one"), replace(seeded(0, [90.0, 5.0], "two"), name="two" * 9)]
    draw_result(curves, TOP1, tmp_path / "top1.png")
    draw_loss(curves, tmp_path / "loss.png")
    for figure in drawn:
        figure.draw_without_rendering()
        (axes,), legends = figure.axes, [*figure.legends, figure.axes[0].get_legend()]
        (legend,) = [legend for legend in legends if legend is not None]
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())
        assert axes.get_window_extent().height > 0.6 * figure.bbox.height
