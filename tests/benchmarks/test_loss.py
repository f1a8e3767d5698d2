"""benchmarks/loss.py: its figures, and ours beside open_clip's."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks.loss import compare_losses, inputs, main


def test_figures(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--code", "flipscale", "--n", "700", "--dim", "64", "--steps", "2"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["flops"] == 8 * 700**2 * 64
    achieved = figures["flops"] / figures["seconds"]
    assert figures["share_of_matmul_peak"] == pytest.approx(achieved / figures["matmul_peak_flops"])
    images, texts, scale = (t.detach().double() for t in inputs(700, 64, torch.device("cpu")))
    logits, target = scale * images @ texts.T, torch.arange(700)
    expected = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    assert figures["loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.long
def test_comparison(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("open_clip")
    row = compare_losses(4096, 32, steps=1)
    assert row["loss"] == pytest.approx(row["open_clip_loss"], rel=1e-5)
    # open_clip holds the logits of both directions, their log-softmax and the gradients of these.
    square = 4 * 4096**2
    assert 2 * square < row["open_clip_extra_peak_bytes"] < 8 * square
    assert row["extra_peak_bytes"] < square / 2
    monkeypatch.setattr("benchmarks.loss.compare_losses", lambda *_: row)
    main(["--n", "4096", "--dim", "32"])
    assert [line.count("|") for line in capsys.readouterr().out.splitlines()] == [10, 10, 10]
