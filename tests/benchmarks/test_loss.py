"""benchmarks/loss.py: its figures, and ours beside open_clip's."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks.loss import inputs, main


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
