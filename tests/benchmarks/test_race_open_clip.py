"""The race beside open_clip: its validation artist and its ratios of times."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import add_member
from data.test_caption_kinds import picture
from timm.optim import muon

from benchmarks.race_open_clip import FP32_MAIN, VALIDATION_ARTIST, _split_by_artist, ratio_of_times
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


def test_ratios_of_times() -> None:
    # Ours passes 6 % after 1.5 of its four parts; the peer has it at the end.
    ours, theirs = curve(4, 8, 12, 16), curve(2, 4, 5, 6)
    assert ratio_of_times([ours], [theirs]) == "2.67 (one seed)"
    assert ratio_of_times([ours, curve(8, 8, 9, 9)], [theirs, theirs]) == "3.77 (0.05 to 308.29)"
    assert ratio_of_times([theirs], [ours]) == "reached by 0 of 1 seeds"
    assert ratio_of_times([ours, curve(1, 2, 3, 4)], [theirs, theirs]) == "reached by 1 of 2 seeds"


def test_the_peer_s_muon_iterates_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", stock := muon.zeropower_via_newtonschulz)
    asked = list[list[str]]()
    monkeypatch.setattr("open_clip_train.main.main", asked.append)
    monkeypatch.setattr("sys.argv", ["-c", "--opt", "timm/muon"])
    exec(FP32_MAIN, {})
    assert asked == [["--opt", "timm/muon"]]
    matrix, coefficients = torch.randn(4, 6), [(3.4445, -4.7750, 2.0315)]
    assert stock(matrix, 5, coefficients).dtype == torch.bfloat16
    assert muon.zeropower_via_newtonschulz(matrix, 5, coefficients).dtype == torch.float32


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
