"""The race beside open_clip: its trials, its validation artist, its ratios of times and its tables."""

import json
import tarfile
from pathlib import Path

import pytest
from conftest import add_member
from data.test_caption_kinds import picture

from benchmarks.race_open_clip import (
    TRIALS,
    VALIDATION_ARTIST,
    _split_by_artist,
    ratio_of_times,
    report,
    tune,
)
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.presentation.curves import Curve
from flipscale.evaluation.results import Measured, Result
from flipscale.evaluation.test_set import TestSet


def curve(*values: float, seconds: float = 360.0, seed: int = 0) -> Curve:
    """Return a run of evenly spaced results in `seconds`, from a chance of 0 %."""
    places = [(n, 100 * n, seconds * n / len(values)) for n in range(1, len(values) + 1)]
    measured = [
        Measured(Result("test", "zero_shot", metric, value, n=100, chance=0.0), *place)
        for place, value in zip(places, values, strict=True)
        for metric in ("top1", "top5")
    ]
    records = [dict(zip(("step", "samples_seen", "trained_seconds"), place, strict=True)) for place in places]
    return Curve("run", records, measured, {}, seed=seed)


@pytest.mark.parametrize(
    ("best", "fourth"), [(0.0005, (0.0005, 0.2)), (0.002, (0.002, 0.05)), (0.004, (0.008, 0.2)), (0.1, (0.008, 0.2))]
)
def test_the_fourth_trial_goes_on_where_the_best_was(best: float, fourth: tuple[float, float]) -> None:
    tried: list[tuple[float, float]] = []

    def trial(rate: float, decay: float) -> float:
        tried.append((rate, decay))
        return abs(rate - best) + decay / 1000

    (rates, decay) = TRIALS["open_clip", "adamw"]
    tuned = tune(("open_clip", "adamw"), trial)
    assert tried == [*((rate, decay) for rate in rates), fourth]
    assert (tuned["rate"], tuned["decay"]) == min(tried, key=lambda one: abs(one[0] - best) + one[1] / 1000)
    assert len(tuned) == 2 + 4


def test_every_trainer_has_as_many_trials() -> None:
    assert {len(rates) for rates, _ in TRIALS.values()} == {3}
    assert {("open_clip", name) for name in ("adamw", "timm/muon", "timm/adamuon")} < TRIALS.keys()


def test_ratios_of_times() -> None:
    # Ours passes 6 % after 1.5 of its four parts; the peer has it at the end.
    ours, theirs = curve(4, 8, 12, 16), curve(2, 4, 5, 6)
    assert ratio_of_times([ours], [theirs]) == "2.67 (one seed)"
    assert ratio_of_times([ours, curve(8, 8, 9, 9)], [theirs, theirs]) == "3.77 (0.05 to 308.29)"
    assert ratio_of_times([theirs], [ours]) == "reached by 0 of 1 seeds"
    assert ratio_of_times([ours, curve(1, 2, 3, 4)], [theirs, theirs]) == "reached by 1 of 2 seeds"


def test_the_tables(tmp_path: Path) -> None:
    curves = {
        1.5: {"masked_muon": [curve(2, 7, seconds=90), curve(3, 9, seconds=90, seed=1)]},
        6.0: {
            "open_clip_muon": [curve(2, 4, 5, 6), curve(2, 4, 5, 6.5, seed=1)],
            "masked_muon": [curve(4, 8, 12, 16), curve(4, 8, 12, 17, seed=1)],
        },
    }
    parts = {
        "masked_muon": curves[6.0]["masked_muon"],
        "whole": [curve(1, 2, 3, 6), curve(1, 2, 3, 7, seed=1)],
        "open_clip_muon": curves[6.0]["open_clip_muon"],
        "open_clip_words_only": [curve(1, 2, 3, 6), curve(1, 2, 3, 6.5, seed=1)],
    }
    trials = {"flipscale, muon, 6 minutes": {"rate": 2, "decay": 0.3, "rate 1, decay 0.3": 30, "rate 2, decay 0.3": 20}}
    text = report(curves, parts, trials, tmp_path / "race.png")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert sum(line.startswith("| 6 | open_clip, Muon | 2 |") for line in lines) == 1
    assert any("| flipscale, Muon, 75 % masked | open_clip, Muon | 2.56 (1.54 to 4.26) |" in line for line in lines)
    sentence = (
        "flipscale, Muon, 75 % masked of 1.5 minutes, 4.00 times shorter, ends above open_clip, Muon of 6 minutes"
    )
    assert f"{sentence} in all seeds." in lines
    assert any(line.startswith("| without a mask |") and line.endswith("| -10.0 (-10.0 to -10.0) |") for line in lines)
    assert any("text tower without a layer" in line and line.endswith("| +0.0 (+0.0 to +0.0) |") for line in lines)
    assert "| flipscale, muon, 6 minutes | rate 2, decay 0.3 | **20.0** |" in lines
    assert (tmp_path / "race.png").exists()


def test_an_artist_is_held_out_for_trials(tmp_path: Path) -> None:
    drawn = [("noto", "cat"), (VALIDATION_ARTIST, "cat"), ("twemoji", "dog"), (VALIDATION_ARTIST, "only mine")]
    drawn += [(VALIDATION_ARTIST, "dog"), ("noto", "cow")]
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(3 * shard, 3 * shard + 3):
                artist, name = drawn[number]
                add_member(tar, f"{number:06}.png", picture())
                add_member(tar, f"{number:06}.txt", name.encode())
                add_member(tar, f"{number:06}.json", json.dumps({"artist": artist}).encode())
    (tmp_path / "split").mkdir()
    _split_by_artist(tmp_path, tmp_path / "split")
    train = TarSource(str(tmp_path / "split/train"))
    assert train.shard_sizes == [2, 1]
    places = [(0, 0), (0, 1), (1, 0)]
    assert [train.read(*place).captions for place in places] == [(b"cat",), (b"dog",), (b"cow",)]
    held = TestSet.open(str(tmp_path / "split/validation"))
    assert held.class_names() == ["cat", "dog"]
    assert [(held.source.read(0, row).captions, held.source.read(0, row).label) for row in range(2)] == [
        ((b"cat",), 0),
        ((b"dog",), 1),
    ]
