"""The attention kernel chosen is one that the models have, and gives the same numbers."""

import pytest
import torch

from flipscale.engines.device import best_attention
from flipscale.model import FlipConfig, FlipModel


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", torch.bfloat16, "eager"),
        ("cpu", torch.float32, "sdpa"),
        ("cuda", torch.bfloat16, "sdpa"),
        ("cuda", torch.float32, "sdpa"),
    ],
)
def test_plain_products_for_bf16_on_cpus_and_fused_kernels_elsewhere(
    device: str, dtype: torch.dtype, expected: str
) -> None:
    assert best_attention(torch.device(device), dtype) == expected


def test_both_give_the_same_numbers() -> None:
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = FlipConfig(
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        text_config={**tower, "vocab_size": 64, "max_position_embeddings": 8, "attend_to_padding": False},
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
