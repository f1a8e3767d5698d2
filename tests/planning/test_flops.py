"""The operations counted: against the paper's, a count by hand, and torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flipscale.model import FlipConfig, FlipModel
from flipscale.planning.flops import forward_flops


def test_large_costs_what_the_paper_says() -> None:
    config = FlipConfig.from_size("l16")
    whole = forward_flops(config, 0.0)
    assert whole.image / 2e9 == pytest.approx(61.6, abs=0.05)
    assert whole.text / 2e9 == pytest.approx(2.74, abs=0.005)
    # Paper, Table 1a: 0.52 and 0.28. The original embeds all patches before it drops some, which makes them 0.517 and
    # 0.2816.
    for mask_ratio, share, original in ((0.5, 0.5163, 0.5175), (0.75, 0.2800, 0.2816)):
        masked = forward_flops(config, mask_ratio)
        embeds_all = masked.forward - masked.patch_embedding + whole.patch_embedding
        assert masked.training / whole.training == pytest.approx(share, abs=5e-5)
        assert embeds_all / whole.forward == pytest.approx(original, abs=2e-4)


def test_patch_embedding_is_a_small_share_that_the_mask_shrinks() -> None:
    config = FlipConfig.from_size("b16")
    whole, masked = forward_flops(config, 0.0), forward_flops(config, 0.75)
    assert whole.patch_embedding == 2 * 196 * 768 * 768
    assert masked.patch_embedding == whole.patch_embedding // 4
    assert whole.patch_embedding / whole.image == pytest.approx(0.0066, abs=5e-5)
    assert masked.patch_embedding / masked.image == pytest.approx(0.0067, abs=5e-5)


def test_torch_counts_the_same() -> None:
    config = FlipConfig(
        vision_config={
            "image_size": 64,
            "patch_size": 8,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        },
        text_config={
            "vocab_size": 50,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": 12,
        },
        projection_dim=32,
    )
    model = FlipModel(config)
    # torch's counter has no formula for the fused attention of CPUs.
    model.set_attn_implementation("eager")
    images, captions = torch.randn(5, 3, 64, 64), torch.randint(1, 50, (5, 12))
    flops = forward_flops(config, 0.75)
    with FlopCounterMode(display=False) as counter:
        output = model(pixel_values=images, input_ids=captions, image_mask_ratio=0.75, return_logits=False)
    assert counter.get_total_flops() == 5 * flops.forward
    with FlopCounterMode(display=False) as backward:
        (output.image_embeds.sum() + output.text_embeds.sum()).backward()
    counted = counter.get_total_flops() + backward.get_total_flops()
    assert counted == 5 * (flops.training - flops.patch_embedding)


def test_a_mask_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask_ratio is 1\.0"):
        forward_flops(FlipConfig.from_size("b16"), 1.0)


def test_views_repeat_the_image_tower_and_masked_words_shorten_the_text() -> None:
    config = FlipConfig.from_size("l16")
    one, two = forward_flops(config, 0.75), forward_flops(config, 0.75, views=2)
    assert (two.image, two.text) == (2 * one.image, one.text)
    assert two.joint_projections - one.joint_projections == 2 * 1024 * 768
    short = forward_flops(config, 0.75, text_mask_ratio=0.5)
    assert short.image == one.image
    # Half the tokens, a quarter of the attention: the paper counts 0.92x of the time for the step.
    assert (short.text_projections, short.text_attention) == (one.text_projections // 2, one.text_attention // 4)
    assert short.forward / one.forward == pytest.approx(0.92, abs=0.01)
