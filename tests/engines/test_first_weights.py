"""Fresh weights: the model's own distributions, the same numbers however they are built, one block at a time."""

import pytest
import torch
from conftest import TOWER
from torch import nn

from flipscale.engines.first_weights import build_weights, fresh_weights, weights_of
from flipscale.model import FlipConfig, FlipModel

CONFIG = FlipConfig(
    vision_config={**TOWER, "num_hidden_layers": 12, "image_size": 32, "patch_size": 8},
    text_config={**TOWER, "vocab_size": 64, "max_position_embeddings": 8},
)


def build(seed: int, config: FlipConfig = CONFIG) -> FlipModel:
    return build_weights(config, lambda model: None, fresh_weights(seed), lambda block: None)


def test_distributions_are_the_model_s_own() -> None:
    torch.manual_seed(0)
    ours, own = dict(build(0).named_parameters()), dict(FlipModel(CONFIG).named_parameters())
    assert ours.keys() == own.keys()
    for name, value in ours.items():
        expected = own[name].detach()
        if expected.unique().numel() == 1:
            assert torch.equal(value, expected), name
            continue
        # The bound of a uniform draw, or the deviation of a normal one, of at least 32 numbers.
        assert value.std().item() == pytest.approx(expected.std().item(), rel=0.5), name
        if value.numel() > 1000:
            assert value.std().item() == pytest.approx(expected.std().item(), rel=0.05), name
            assert value.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.3), name
            assert abs(value.mean().item()) < 0.1 * value.std().item(), name


def test_fixed_tables_are_filled() -> None:
    for (name, value), expected in zip(build(0).named_buffers(), FlipModel(CONFIG).buffers(), strict=True):
        assert torch.equal(value, expected), name


def test_numbers_depend_on_the_seed_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    one = build(0).state_dict()
    torch.manual_seed(2)
    torch.rand(3)
    other, reseeded = build(0).state_dict(), build(1).state_dict()
    name = "vision_model.encoder.layers.3.mlp.fc1.weight"
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert not torch.equal(one[name], reseeded[name])
    assert not torch.equal(one[name], one[name.replace("3", "4")])
    shallow = FlipConfig(
        vision_config={**TOWER, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8},
        text_config={**TOWER, "vocab_size": 64, "max_position_embeddings": 8},
    )
    assert torch.equal(one[name], build(0, shallow).state_dict()[name]), "keyed by name, not by what came before"


def test_building_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(5)
    build(0)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))


def test_one_block_is_whole_at_a_time() -> None:
    seen: list[FlipModel] = []
    most = 0

    def shard(block: nn.Module) -> None:
        nonlocal most
        most = max(most, sum(p.numel() for p in seen[0].parameters() if not p.is_meta))
        block.to("meta")

    total = sum(p.numel() for p in build(0).parameters())
    with pytest.raises(AssertionError, match="never made real"):
        build_weights(CONFIG, seen.append, fresh_weights(0), shard)
    assert most < total / 8


def test_weights_of_a_model_are_copied() -> None:
    loaded = build(3)
    copied = build_weights(CONFIG, lambda model: None, weights_of(loaded), lambda block: None)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, copied.state_dict()[key]), key
