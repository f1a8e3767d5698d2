"""Stochastic depth: the rates, and a block whose branch is dropped."""

import numpy as np
import pytest
import torch
from conftest import TOWER

from flipscale.data.masks import branch_scales
from flipscale.model import FlipVisionConfig, FlipVisionModel

BLOCKS, RATE = 5, 0.4


def test_the_rate_grows_linearly_and_the_mean_is_one() -> None:
    scales = branch_scales(3, np.arange(20_000), 2, BLOCKS, RATE)
    assert (scales.shape, scales.dtype) == ((20_000, 2, BLOCKS, 2), np.float32)
    for block, rate in enumerate(np.linspace(0.0, RATE, BLOCKS)):
        of_block = scales[:, :, block]
        assert set(np.unique(of_block)) == ({1.0} if block == 0 else {0.0, np.float32(1 / (1 - rate))})
        assert (of_block == 0).mean() == pytest.approx(rate, abs=0.01)
        assert of_block.mean() == pytest.approx(1.0, abs=0.01)
    last = scales[:, 0, -1] == 0
    assert np.corrcoef(last[:, 0], last[:, 1])[0, 1] == pytest.approx(0.0, abs=0.03), (
        "attention and MLP, each by itself"
    )


def test_it_is_a_function_of_seed_and_position() -> None:
    whole = branch_scales(3, np.arange(64), 1, BLOCKS, RATE)
    assert np.array_equal(branch_scales(3, np.arange(32, 64), 1, BLOCKS, RATE), whole[32:])
    assert not np.array_equal(branch_scales(4, np.arange(64), 1, BLOCKS, RATE), whole)


def test_a_dropped_branch_leaves_the_tokens_as_they_are() -> None:
    torch.manual_seed(0)
    model = FlipVisionModel(FlipVisionConfig(**TOWER, image_size=32, patch_size=8))
    images = torch.randn(3, 3, 32, 32)
    whole = model(images, output_hidden_states=True)
    ones = torch.ones(3, 2, 2)
    assert torch.equal(model(images, branch_scales=ones).pooler_output, whole.pooler_output)

    dropped = ones.clone()
    dropped[1, 1] = 0.0  # of the second image, both branches of the last block
    found = model(images, branch_scales=dropped, output_hidden_states=True).hidden_states
    assert torch.equal(found[2][1], found[1][1])
    assert torch.equal(found[2][[0, 2]], whole.hidden_states[2][[0, 2]])

    doubled = ones.clone()
    doubled[0, 0, 1] = 2.0
    block, tokens = model.encoder.layers[0], whole.hidden_states[0]
    after_attention = tokens + block.self_attn(block.layer_norm1(tokens))[0]
    expected = after_attention + 2.0 * block.mlp(block.layer_norm2(after_attention))
    found = model(images, branch_scales=doubled, output_hidden_states=True).hidden_states
    assert torch.allclose(found[1][0], expected[0], atol=1e-6)


def test_the_views_of_an_image_have_each_their_own() -> None:
    torch.manual_seed(0)
    model = FlipVisionModel(FlipVisionConfig(**TOWER, image_size=32, patch_size=8))
    patches = torch.randint(0, 256, (2, 2, 8, 192), dtype=torch.uint8)
    index = torch.arange(16).view(1, 2, 8).expand(2, -1, -1)
    scales = torch.rand(2, 2, 2, 2)
    together = model(patches=patches, patch_index=index, branch_scales=scales).pooler_output
    for row in range(2):
        alone = model(patches=patches[row], patch_index=index[row], branch_scales=scales[row]).pooler_output
        assert torch.allclose(together[2 * row : 2 * row + 2], alone, atol=1e-6)
