"""The loss on one process, against fp64 written out."""

import pytest
import torch
from torch.nn.functional import normalize

from flipscale.model import FlipConfig, FlipModel
from flipscale.training.contrastive import contrastive_loss


def written_out(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale * image @ text.T
    pairs = logits.diagonal()
    return ((logits.logsumexp(1) - pairs).mean() + (logits.logsumexp(0) - pairs).mean()) / 2


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients(batch: int, scale: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [normalize(torch.randn(batch, 32), dim=1).to(dtype) for _ in range(2)] + [torch.tensor([scale])]
    ours = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    loss, expected = contrastive_loss(*ours), written_out(*exact)
    assert loss.dtype == torch.float32
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(ours, exact, strict=True):
        assert (a.grad - b.grad).abs().max() <= tolerance * b.grad.abs().max().clamp(min=1e-3)


def test_loss_is_fp32_under_autocast() -> None:
    embeds = normalize(torch.randn(16, 32), dim=1)
    scale = torch.tensor([50.0])
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrastive_loss(embeds, embeds, scale)
    assert torch.equal(inside, contrastive_loss(embeds, embeds, scale))


def test_equals_the_model_s_own_loss_on_one_process() -> None:
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    model = FlipModel(FlipConfig(vision_config=vision, text_config={**tower, "vocab_size": 16})).eval()
    output = model(torch.randint(0, 16, (6, 8)), torch.randn(6, 3, 16, 16), return_loss=True)
    ours = contrastive_loss(output.image_embeds, output.text_embeds, output.logit_scale)
    assert ours.item() == pytest.approx(output.loss.item(), abs=1e-6)
