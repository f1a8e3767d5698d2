"""The operations counted: against a formula by hand, the paper's numbers, and a backward pass."""

import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flipscale.cli import main
from flipscale.engines.launch import Launch
from flipscale.model import FlipConfig, FlipModel, FlipTextConfig, FlipVisionConfig
from flipscale.model.families import config_class
from flipscale.model.patches import num_kept
from flipscale.planning.flops import StepShape, forward_flops, pair_flops
from flipscale.planning.memory import heaviest_step
from flipscale.recipe.optim import LoraRecipe, StageRecipe
from flipscale.start.complete_recipe import parse_recipe

PATCHES = "vision_model.embeddings.patch_embedding"
SMALL = FlipConfig(
    vision_config={
        **{"image_size": 64, "patch_size": 8, "hidden_size": 64, "intermediate_size": 192},
        **{"num_hidden_layers": 3, "num_attention_heads": 4},
    },
    text_config={
        **{"vocab_size": 50, "max_position_embeddings": 12, "hidden_size": 48, "intermediate_size": 96},
        **{"num_hidden_layers": 2, "num_attention_heads": 3},
    },
    projection_dim=32,
)


def by_hand(
    config: FlipConfig, mask_ratio: float, views: int = 1, text_mask_ratio: float = 0.0, image_size: int | None = None
) -> dict[str, int]:
    """The matrix products of FLIP's two towers, a class token or other tokens before the patches."""
    vision, text = config.vision_config, config.text_config
    kept = num_kept(((image_size or vision.image_size) // vision.patch_size) ** 2, mask_ratio)
    tokens = num_kept(text.max_position_embeddings, text_mask_ratio, "tokens")
    patches = views * 2 * kept * vision.num_channels * vision.patch_size**2 * vision.hidden_size
    image = patches + views * layers(vision, vision.num_prefix_tokens + kept)
    joint = 2 * (views * vision.hidden_size + text.hidden_size) * vision.projection_dim
    return {
        PATCHES: patches,
        "vision_model": image,
        "text_model": layers(text, tokens),
        "forward": image + layers(text, tokens) + joint,
    }


def layers(tower: FlipVisionConfig | FlipTextConfig, tokens: int) -> int:
    weights = 4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size
    return tower.num_hidden_layers * (2 * tokens * weights + 4 * tokens**2 * tower.hidden_size)


CONFIGS = {
    "small": SMALL,
    "h14": FlipConfig.from_size("h14"),
    "mean": FlipConfig.from_size("b16", text_config={"attend_to_padding": False, "pooling": "mean"}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("masks", [(0.0, 1, 0.0, None), (0.75, 3, 0.5, None), (0.75, 2, 0.5, 112)])
def test_the_count_is_the_formula_s(config: FlipConfig, masks: tuple[float, int, float, int | None]) -> None:
    counted = forward_flops(config, StepShape(1, *masks[:3], image_size=masks[3]))
    for name, expected in by_hand(config, *masks).items():
        assert (counted.forward if name == "forward" else counted.modules[name]) == expected, name


def test_registers_of_a_dinov3_are_counted() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = {**sizes, "model_type": "dinov3_vit", "image_size": 64, "patch_size": 8, "num_register_tokens": 4}
    text = {**sizes, "model_type": "bert", "vocab_size": 50, "max_position_embeddings": 12}
    config = config_class("towers").from_size("", vision, text)
    expected = 2 * 16 * 3 * 64 * 64 + layers(config.vision_config, 1 + 4 + 16)
    assert forward_flops(config, StepShape(1, 0.75)).modules["vision_model"] == expected


def test_a_step_by_torch_s_counter() -> None:
    # 32 px whole and 64 px at 75 % are both 16 patches.
    assert (
        forward_flops(SMALL, StepShape(1, 0.0, image_size=32)).forward
        == forward_flops(SMALL, StepShape(1, 0.75)).forward
    )
    model = FlipModel(SMALL)
    model.set_attn_implementation("eager")
    patches, captions = torch.zeros(5, 16, 192, dtype=torch.uint8), torch.randint(1, 50, (5, 12))
    with FlopCounterMode(display=False) as counter:
        output = model(patches=patches, image_size=32, input_ids=captions, return_logits=False)
        (output.image_embeds.sum() + output.text_embeds.sum()).backward()
    expected = forward_flops(SMALL, StepShape(1, 0.0, image_size=32))
    assert counter.get_total_flops() == 5 * (expected.training - expected.modules[PATCHES])


def test_each_stage_is_counted_at_its_own_size() -> None:
    recipe = parse_recipe(["--config", "b16_cc3m"])
    small = StageRecipe("small", 4096, image_size=112, base_lr=1e-6)
    recipe = replace(recipe, stages=[small, StageRecipe("masked", 4096, 0.75), StageRecipe("whole", 4096)])
    by_name, config = pair_flops(recipe), recipe.model.config()
    assert by_name == {
        "small": 3 * by_hand(config, 0.0, image_size=112)["forward"],
        "masked": 3 * by_hand(config, 0.75)["forward"],
        "whole": 3 * by_hand(config, 0.0)["forward"],
    }
    assert by_name["small"] == by_name["masked"], "both have 49 patches"
    launch = Launch("ddp", 1)
    assert heaviest_step(recipe, launch).image_size is None
    large = StageRecipe("large", 4096, image_size=256, base_lr=1e-6)
    step = heaviest_step(replace(recipe, stages=[*recipe.stages, large]), launch)
    assert (step.mask_ratio, step.image_size) == (0.0, 256)


@pytest.mark.long
def test_large_costs_what_the_paper_says() -> None:
    config = FlipConfig.from_size("l16")
    whole = forward_flops(config, StepShape(1, 0.0))
    assert whole.modules["vision_model"] / 2e9 == pytest.approx(61.6, abs=0.05)
    assert whole.modules["text_model"] / 2e9 == pytest.approx(2.74, abs=0.005)
    # Paper, Table 1a: 0.52 and 0.28. The original embeds all patches before it drops some, which makes them 0.517 and
    # 0.2816.
    for mask_ratio, share, original in ((0.5, 0.5163, 0.5175), (0.75, 0.2800, 0.2816)):
        masked = forward_flops(config, StepShape(1, mask_ratio))
        embeds_all = masked.forward - masked.modules[PATCHES] + whole.modules[PATCHES]
        assert masked.training / whole.training == pytest.approx(share, abs=5e-5)
        assert embeds_all / whole.forward == pytest.approx(original, abs=2e-4)
    # Half the tokens, a quarter of the attention: the paper counts 0.92x of the time for the step.
    short = forward_flops(config, StepShape(1, 0.75, text_mask_ratio=0.5))
    assert short.forward / masked.forward == pytest.approx(0.92, abs=0.01)


@pytest.mark.long
def test_another_family_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """open_clip's ViT-B-16 has 149.6 M parameters."""
    changes = ["--model.family", "clip", "--model.size", "b16", "--data.tokenizer", "org/name"]
    main(["pretrain", "--config", "b16_cc12m", *changes, "--model.text_config", "{}", "--dry_run"])
    printed = capsys.readouterr().out
    count = int(re.search(r"([\d,]+) parameters", printed)[1].replace(",", ""))
    assert count == pytest.approx(149_620_737, rel=0.005)
    assert "use " in printed.splitlines()[-1]


def test_frozen_parts_have_no_backward_pass() -> None:
    """The image tower's two passes are left out, and under LoRA the pass for the weights' gradients is."""
    config = config_class("clip").from_size("b32")
    whole, forward = forward_flops(config, StepShape(1, 0.5)), forward_flops(config, StepShape(1, 0.5)).modules
    assert whole.backward == 2 * whole.forward
    frozen = forward_flops(config, StepShape(1, 0.5, frozen=("vision_model",)))
    expected = 2 * forward["text_model"] + 2 * forward["text_projection"] + forward["visual_projection"]
    assert frozen.forward == whole.forward
    assert frozen.backward == pytest.approx(expected, rel=1e-3)
    lora = forward_flops(config, StepShape(1, 0.5, lora=LoraRecipe(rank=8)))
    assert lora.backward == pytest.approx(whole.forward, rel=0.03)
