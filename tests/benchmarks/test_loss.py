"""What `flipscale bench loss` measures, and what it refuses."""

import importlib.util
import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from flipscale.benchmarks.loss import LossSetting, compare_losses, inputs, measure_loss
from flipscale.cli import main

needs_open_clip = pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed")


def test_figures_of_a_loss(capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "loss", "--n", "700", "--dim", "64", "--steps", "2", "--json"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    figures = json.loads(printed)
    assert figures.keys() >= {"seconds", "extra_peak_bytes", "flops", "share_of_matmul_peak", "loss"}
    assert figures["flops"] == 8 * 700**2 * 64
    achieved = figures["flops"] / figures["seconds"]
    assert figures["share_of_matmul_peak"] == pytest.approx(achieved / figures["matmul_peak_flops"])
    images, texts, scale = (t.detach().double() for t in inputs(700, LossSetting(dim=64), torch.device("cpu")))
    logits, target = scale * images @ texts.T, torch.arange(700)
    expected = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    assert figures["loss"] == pytest.approx(expected.item(), rel=1e-6)


@needs_open_clip
def test_ours_beside_open_clip_s(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = compare_losses([4096], [32], steps=1)
    assert row["loss"] == pytest.approx(row["open_clip_loss"], rel=1e-5)
    # open_clip holds the logits of both directions, their log-softmax and the gradients of these.
    square = 4 * 4096**2
    assert 2 * square < row["open_clip_extra_peak_bytes"] < 8 * square
    assert row["extra_peak_bytes"] < square / 2
    assert row["memory_ratio"] == row["open_clip_extra_peak_bytes"] / row["extra_peak_bytes"]
    monkeypatch.setattr("flipscale.benchmarks.loss.compare_losses", lambda *_: [row])
    main(["bench", "compare_loss"])
    assert [line.count("|") for line in capsys.readouterr().out.splitlines()] == [10, 10, 10]


@needs_open_clip
def test_a_measurement_that_fails_says_so() -> None:
    with pytest.raises(OSError, match=r"flipscale at n 64, dim 1000000 ended with 2: .*--dim is 1000000; it must be"):
        next(compare_losses([64], [1_000_000], steps=1))


@pytest.mark.parametrize("flag", ["--n", "--dim", "--steps"])
def test_nothing_to_measure(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "loss", flag, "0"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"flipscale: error: {flag} is 0; it must be at least 1")


def test_measured_twice_the_memory_is_as_much() -> None:
    first, second = (measure_loss(LossSetting(3000, 64, steps=1))["extra_peak_bytes"] for _ in range(2))
    assert 4 * 2**20 < second < 64 * 2**20
    assert abs(first - second) < 16 * 2**20
