"""Checkpoints by parameter name, for both optimisers."""

from pathlib import Path

import pytest
import torch
from conftest import TOWER
from safetensors.torch import load_file

from flipscale.model import FlipConfig, FlipModel
from flipscale.training.checkpoint import (
    latest_checkpoint,
    load_optimizers,
    load_state,
    load_weights,
    save_checkpoint,
)
from flipscale.training.contrastive import contrastive_loss
from flipscale.training.optimizer import OptimRecipe, build_optimizers, gradient_norm, set_learning_rate


def build(name: str, seed: int) -> tuple[FlipModel, list[torch.optim.Optimizer]]:
    torch.manual_seed(seed)
    config = FlipConfig(
        vision_config={**TOWER, "image_size": 16, "patch_size": 8},
        text_config={**TOWER, "vocab_size": 16, "max_position_embeddings": 8},
    )
    model = FlipModel(config)
    return model, build_optimizers(model.named_parameters(), OptimRecipe(name=name))


def steps(model: FlipModel, optimizers: list[torch.optim.Optimizer], numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randn(6, 3, 16, 16, generator=generator)
        ids = torch.randint(0, 16, (6, 8), generator=generator)
        output = model(ids, pixels, return_logits=False)
        contrastive_loss(output.image_embeds, output.text_embeds, output.logit_scale).backward()
        assert gradient_norm(model.parameters(), None) > 0
        set_learning_rate(optimizers, 1e-3)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, optimizers = build(name, 0)
    steps(model, optimizers, range(3))
    save_checkpoint(tmp_path, model, optimizers, {"step": 3}, "seed: 0\n", total_limit=1)
    steps(model, optimizers, range(3, 6))

    other, others = build(name, 1)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert load_state(checkpoint) == {"step": 3, "recipe": {"seed": 0}}
    load_weights(checkpoint, other)
    load_optimizers(checkpoint, other, others)
    steps(other, others, range(3, 6))
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest(tmp_path: Path) -> None:
    model, optimizers = build("muon", 0)
    steps(model, optimizers, range(1))
    save_checkpoint(tmp_path, model, optimizers, {"step": 1}, "", total_limit=1)
    fields: dict[str, set[str]] = {}
    for key in load_file(tmp_path / "checkpoints/step-00000001/optimizer.safetensors"):
        field, _, parameter = key.partition(".")
        fields.setdefault(parameter, set()).add(field)
    assert fields.keys() == dict(model.named_parameters()).keys()
    assert fields["vision_model.encoder.layers.1.mlp.fc1.weight"] == {"momentum_buffer"}
    for parameter in ("vision_model.encoder.layers.1.mlp.fc1.bias", "image_projection.weight", "logit_scale"):
        assert fields[parameter] == {"exp_avg", "exp_avg_sq", "step"}


def test_the_other_optimiser_s_checkpoint_is_refused(tmp_path: Path) -> None:
    model, optimizers = build("muon", 0)
    steps(model, optimizers, range(1))
    path = save_checkpoint(tmp_path, model, optimizers, {"step": 1}, "", total_limit=1)
    other, others = build("adamw", 0)
    with pytest.raises(ValueError, match=r"has no exp_avg for .*; was optim.name another\?"):
        load_optimizers(path, other, others)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints/.step-00000009.partial").mkdir(parents=True)
    assert latest_checkpoint(tmp_path) is None


def test_gradients_are_clipped_only_when_asked() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 3.0)
    assert gradient_norm([weight], None) == pytest.approx(6.0)
    assert weight.grad[0] == 3.0
    assert gradient_norm([weight], 1.5) == pytest.approx(6.0)
    assert weight.grad[0] == pytest.approx(0.75)
