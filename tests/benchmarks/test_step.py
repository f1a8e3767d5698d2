"""The training step and open_clip's at a tiny size."""

import json
from functools import partial, partialmethod
from typing import Any

import pytest
import torch
from open_clip.model import CLIP
from open_clip.transformer import ResidualAttentionBlock

from benchmarks.open_clip_step import WAYS, missing, open_clip_step
from benchmarks.step import compare_steps
from benchmarks.step_times import StepSetting, StepTimes, flip_step, matmul_peak, step_figures
from flipscale.model import FlipConfig
from flipscale.planning.flops import StepShape, forward_flops

CPU = torch.device("cpu")


def tiny_config() -> FlipConfig:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return FlipConfig(
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        text_config={**tower, "vocab_size": 64, "max_position_embeddings": 8},
        projection_dim=16,
    )


def tiny(mask_ratio: float = 0.75, dtype: str = "bf16", num_steps: int = 2) -> StepSetting:
    return StepSetting(tiny_config(), "tiny", mask_ratio, batch_size=4, dtype=dtype, num_steps=num_steps)


def test_figures_of_a_step() -> None:
    setting, times = tiny(), StepTimes([0.25, 0.5, 0.75], 1.0)
    figures = json.loads(json.dumps(step_figures(setting, times, 1e12)))
    assert figures["images_per_s"] == 4 / 0.5
    assert figures["flops_per_pair"] == forward_flops(tiny_config(), StepShape(1, 0.75)).training
    assert figures["share_of_matmul_peak"] == pytest.approx(8.0 * figures["flops_per_pair"] / 1e12)
    assert matmul_peak(CPU, "fp32") > 1e9


def test_a_step_uses_the_kernels_of_training() -> None:
    """The trainer, too, leaves products in fp32 at torch's default, without TF32."""
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        flip_step(tiny())()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.long
def test_rows_beside_open_clip() -> None:
    rows = list(compare_steps(tiny(num_steps=3)))
    assert [(row["dtype"], row["mask_ratio"]) for row in rows] == [
        (dtype, mask_ratio) for dtype in ("bf16", "fp32") for mask_ratio in (0.0, 0.5, 0.75)
    ]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["open_clip_median_s"] / row["median_s"])


@pytest.mark.parametrize(("mask_ratio", "way"), [(0.0, None), *((0.5, way) for way in (None, *WAYS))])
def test_open_clip_trains_every_weight_on_the_kept_patches(
    mask_ratio: float, way: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way and (lack := missing(way, 1)):
        pytest.skip(lack)
    built, tokens = [], []
    init = CLIP.__init__

    def keep(self: CLIP, *arguments: Any, **named: Any) -> None:
        init(self, *arguments, **named)
        built.append(self)

    def attend(block: Any, x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        tokens.append(sorted(x.shape))
        return forward(block, x, *arguments, **named)

    forward = ResidualAttentionBlock.forward
    monkeypatch.setattr(CLIP, "__init__", keep)
    monkeypatch.setattr(ResidualAttentionBlock, "forward", attend)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    torch.compiler.reset()
    step = open_clip_step(tiny_config(), None, 4, mask_ratio, CPU, True, way)
    before = {name: weight.detach().clone() for name, weight in built[0].named_parameters()}
    step()
    kept = 1 + round(16 * (1 - mask_ratio))  # with the class token
    assert sorted((4, kept, 32)) in tokens
    assert {name for name, weight in built[0].named_parameters() if torch.equal(weight, before[name])} == set()
