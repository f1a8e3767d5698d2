"""Runs with fp8 products and tuned kernels beside the trainer's own."""

from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import pytest
import torch

from benchmarks.products import compare, compiling
from flipscale.engines import first_weights
from flipscale.io.errors import UserError
from flipscale.pretrain import pretrain
from flipscale.start.complete_recipe import parse_recipe


def test_fp8_learns_nearly_as_bf16(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In no extra: with it installed, transformers imports it at every start.
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    folders = [tmp_path / way for way in ("bf16", "fp8")]
    for folder in folders:
        with compiling(folder.name):
            pretrain(parse_recipe(["--config", str(write_recipe(folder)), "--model.compile=true"]))
    _, _, ours, fp8 = (line.strip("| ").split(" | ") for line in compare(folders))
    assert [ours[0], fp8[0]] == ["bf16", "fp8"]
    assert float(ours[2]) == 0.0
    assert 0.0 < float(fp8[2]) < 0.1
    first, *_, last = map(float, fp8[3:])
    assert last < first - 0.1
    assert ours[3:] != fp8[3:]
    assert len(fp8) == 13


def test_kernels_are_tuned_in_the_mode_of_this_name(monkeypatch: pytest.MonkeyPatch) -> None:
    config = torch._inductor.config
    with config.patch(max_autotune=False, coordinate_descent_tuning=False), compiling("max-autotune-no-cudagraphs"):
        first_weights.compile_blocks(torch.nn.Linear(2, 2))
        assert config.max_autotune
        assert config.coordinate_descent_tuning
        assert not config.triton.cudagraphs


def test_other_runs_are_not_compared(tmp_path: Path) -> None:
    for name, samples in (("one", 16), ("other", 32)):
        (tmp_path / name).mkdir()
        record = f'{{"step": 1, "samples_seen": {samples}, "loss": 1.0}}\n'
        (tmp_path / name / "metrics.jsonl").write_text(record)
    with pytest.raises(UserError, match=r"one.*other"):
        next(compare([tmp_path / "one", tmp_path / "other"]))
