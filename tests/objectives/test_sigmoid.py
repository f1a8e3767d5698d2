"""The sigmoid loss on one process, against a plain formula in fp64, and models with it."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TOWER
from objectives.test_contrastive import captions_of, check_against_fp64, embeds_of, ids_of
from torch.nn.functional import logsigmoid, normalize

from benchmarks.loss import peak_memory, reset_peak_memory
from flipscale.model import FlipConfig, FlipModel
from flipscale.objectives.build_objective import build_objective
from flipscale.objectives.sigmoid import sigmoid_loss
from flipscale.recipe.loss import LossRecipe
from flipscale.recipe.recipe import Recipe


def plain_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    logits = scale * image @ text.T + bias
    signs = 2 * torch.eye(len(logits)) - 1
    return -logsigmoid(signs * logits).sum() / len(logits)


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (1.0, 3.0), (100.0, -60.0)])
@pytest.mark.parametrize(
    ("batch", "dim", "dtype"),
    [(1, 32, torch.float32), (7, 1024, torch.bfloat16), (257, 96, torch.float32), (1531, 33, torch.bfloat16)],
)
def test_value_and_gradients(batch: int, dim: int, dtype: torch.dtype, scale: float, bias: float) -> None:
    inputs = [*embeds_of(batch, dim, 1.0, dtype), torch.tensor([scale]), torch.tensor([bias])]
    check_against_fp64(inputs, sigmoid_loss, plain_loss)


def plain_loss_of_ids(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    logits = scale * image @ text.T + bias
    return -logsigmoid(torch.where(ids[:, None] == ids, 1, -1) * logits).sum() / len(logits)


def plain_loss_of_captions(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """The mean over sets of captions, one of each image, of SigLIP's loss with a positive for each caption's image."""
    owner = torch.arange(len(text)) // (len(text) // len(image))
    signs = torch.where(torch.arange(len(image))[:, None] == owner, 1, -1)
    return -logsigmoid(signs * (scale * image @ text.T + bias)).sum() / len(text)


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -60.0)])
@pytest.mark.parametrize(("batch", "dim", "captions"), [(1, 32, 2), (257, 96, 5)])
def test_several_captions_of_an_image(batch: int, dim: int, scale: float, bias: float, captions: int) -> None:
    inputs = [*captions_of(batch, captions, dim, 1.0), torch.tensor([scale]), torch.tensor([bias])]
    check_against_fp64(inputs, sigmoid_loss, plain_loss_of_captions)


@pytest.mark.parametrize(("scale", "bias"), [(1.0, 3.0), (100.0, -60.0)])
@pytest.mark.parametrize(("batch", "dim", "count"), [(1, 32, 5), (257, 96, 200), (1531, 33, 10**6)])
def test_equal_ids_are_positives(batch: int, dim: int, scale: float, bias: float, count: int) -> None:
    inputs, ids = [*embeds_of(batch, dim, 1.0), torch.tensor([scale]), torch.tensor([bias])], ids_of(batch, count)
    check_against_fp64(inputs, partial(sigmoid_loss, ids=ids), partial(plain_loss_of_ids, ids=ids))


@pytest.mark.parametrize("ids", [None, torch.arange(5000) % 3])
def test_memory_does_not_grow_with_the_square(ids: torch.Tensor | None) -> None:
    embeds = [normalize(torch.randn(5000, 16), dim=1).requires_grad_() for _ in range(2)]
    head = (torch.tensor([10.0]), torch.tensor([-5.0]))
    before = reset_peak_memory(torch.device("cpu"))
    sigmoid_loss(*embeds, *head, ids=ids).backward()
    assert peak_memory(torch.device("cpu")) - before < 4 * 5000**2 / 2


def model(**fields: object) -> FlipModel:
    vision = {**TOWER, "image_size": 16, "patch_size": 8}
    return FlipModel(FlipConfig(vision_config=vision, text_config={**TOWER, "vocab_size": 16}, **fields)).eval()


def test_models_with_and_without_bias(tmp_path: Path) -> None:
    assert "logit_bias" not in model().state_dict()
    assert model()(torch.randint(0, 16, (6, 8)), torch.randn(6, 3, 16, 16)).logit_bias is None
    model(logit_bias_init_value=-10.0, logit_scale_init_value=math.log(10.0)).save_pretrained(tmp_path)
    loaded = FlipModel.from_pretrained(tmp_path)
    assert loaded.logit_bias.item() == -10.0
    output = loaded(torch.randint(0, 16, (6, 8)), torch.randn(6, 3, 16, 16), return_loss=True)
    cosines = output.image_embeds @ output.text_embeds.T
    assert torch.allclose(output.logits_per_image, 10 * cosines - 10)
    objective = build_objective(Recipe(loss=LossRecipe("sigmoid")))
    ours = objective.coupled_loss(*objective.loss_inputs(output), **objective.parameters(output))
    assert ours.item() == pytest.approx(output.loss.item(), rel=1e-6)
