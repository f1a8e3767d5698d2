"""The choice of the attention kernel: both give the same numbers."""

import pytest
import torch
from conftest import TOWER

from flipscale.engines.device import best_attention
from flipscale.model import FlipConfig, FlipModel


@pytest.mark.parametrize(
    ("device", "dtype", "kernel"),
    [
        ("cpu", torch.bfloat16, "eager"),
        ("cpu", torch.float32, "sdpa"),
        ("cuda", torch.bfloat16, "sdpa"),
        ("cuda", torch.float32, "sdpa"),
    ],
)
def test_plain_products_for_bf16_on_cpus(device: str, dtype: torch.dtype, kernel: str) -> None:
    assert best_attention(torch.device(device), dtype) == kernel


def test_both_kernels_give_the_same_gradients() -> None:
    torch.manual_seed(0)
    config = FlipConfig(
        vision_config={**TOWER, "image_size": 32, "patch_size": 8},
        text_config={**TOWER, "vocab_size": 64, "max_position_embeddings": 8, "attend_to_padding": False},
        projection_dim=16,
    )
    model = FlipModel(config)
    images, captions = torch.randn(3, 3, 32, 32), torch.randint(1, 64, (3, 8))
    captions[0, 4:] = 0
    gradients = []
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(pixel_values=images, input_ids=captions, return_loss=True).loss.backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for plain, fused in zip(*gradients, strict=True):
        assert (plain - fused).abs().max() < 1e-5 * (1.0 + fused.abs().max())
