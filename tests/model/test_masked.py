"""transformers' CLIP and SigLIP with masks compute what transformers does."""

import math
from typing import Any

import pytest
import torch
from conftest import TOWER
from foreign_towers import OTHER_TEXTS
from transformers import CONFIG_MAPPING, CLIPModel, SiglipModel, VisionTextDualEncoderModel

from flipscale.engines.first_weights import build_weights, fresh_weights
from flipscale.engines.optimizers import decays, encoder_blocks, layer_scales, muon_matrices
from flipscale.model.families import FAMILIES, config_class
from flipscale.model.masked_families import POOLED, UNPOOLED, MaskedTowersConfig, MaskedTowersModel
from flipscale.model.patches import keep_lowest, num_kept, patchify, take_patches

VISION, TEXT = {**TOWER, "image_size": 32, "patch_size": 8}, {**TOWER, "vocab_size": 50, "max_position_embeddings": 12}
# The third is family `towers` with a ViT, the last with a DINOv3.
MASKED = [*(name for name in FAMILIES if name != "flip"), "dinov3"]


def models(family: str) -> tuple[Any, Any]:
    """Return a small model with masks, and transformers' own with the same weights."""
    vision, text = VISION, {**TEXT, "eos_token_id": 3, "bos_token_id": None}
    if family in ("towers", "dinov3"):
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        kinds: dict[str, dict[str, Any]] = {
            "towers": {"model_type": "vit"},
            "dinov3": {"model_type": "dinov3_vit", "num_register_tokens": 3},
        }
        vision, text = (
            {**VISION, **kinds[family]},
            {**text, "model_type": "bert", "caption_tokens": 12, **no_dropout},
        )
        family = "towers"
    config = config_class(family).from_size("s16", vision, text)
    config.logit_bias_init_value = -10.0 if family == "siglip" else None
    torch.manual_seed(0)
    ours = config.trained_class(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    theirs = config.exported_class(config.exported()).eval()
    shapes = {name: weight.shape for name, weight in theirs.state_dict().items()}
    theirs.load_state_dict({name: weight.reshape(shapes[name]) for name, weight in ours.state_dict().items()})
    return ours, theirs


def captions() -> torch.Tensor:
    ids = torch.randint(4, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 6], ids[:, 7:] = 3, 0
    return ids


@pytest.mark.parametrize("family", MASKED)
def test_whole_images_and_captions(family: str) -> None:
    ours, theirs = models(family)
    assert type(theirs) in (CLIPModel, SiglipModel, VisionTextDualEncoderModel)
    pixels = torch.randn(3, 3, 32, 32)
    padding = {"attention_mask": captions() != 0} if family in ("towers", "dinov3") else {}
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, input_ids=captions(), **padding)
        for images in ({"pixel_values": pixels}, {"patches": patchify(pixels, 8)}):
            found = ours(input_ids=captions(), **images)
            for name in ("image_embeds", "text_embeds", "logits_per_image"):
                assert torch.allclose(found[name], expected[name], atol=1e-5), name


@pytest.mark.parametrize("family", MASKED[:-1])
def test_a_mask_drops_tokens_after_the_embedding(family: str) -> None:
    ours, theirs = (model.double() for model in models(family))  # in fp64 rounding is 1e-15, and an error is not
    prefix = ours.config.vision_config.num_prefix_tokens
    pixels, index = torch.randn(3, 3, 32, 32).double(), keep_lowest(torch.rand(3, 4, 4), 4, views=2)
    views = torch.stack([take_patches(patchify(pixels, 8), index[:, view]) for view in range(2)], dim=1)
    with torch.no_grad():
        found = ours.get_image_features(patches=views, patch_index=index).pooler_output
        tokens = theirs.vision_model.embeddings(pixels)
        for view in range(2):
            kept = torch.cat([torch.arange(prefix).expand(3, -1), index[:, view] + prefix], dim=1)
            dropped = tokens.gather(1, kept[:, :, None].expand(-1, -1, TOWER["hidden_size"]))
            theirs.vision_model.embeddings.forward = lambda *_, dropped=dropped, **__: dropped
            expected = theirs.get_image_features(pixels).pooler_output
            assert torch.allclose(found[view::2], expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mask_ratio", [0.5, 0.75])
def test_rotary_positions_equal_attention_without_hidden_keys(mask_ratio: float, attention: str) -> None:
    """In transformers' DINOv3 no token attends to the hidden keys. Visible tokens and gradients agree."""
    ours, theirs = (model.vision_model.double().train() for model in models("dinov3"))
    theirs.set_attn_implementation(attention)
    ours.set_attn_implementation(attention)
    pixels, kept = torch.randn(3, 3, 32, 32).double(), num_kept(16, mask_ratio)
    index = keep_lowest(torch.rand(3, 4, 4), kept, views=1)[:, 0]
    visible = take_patches(patchify(pixels, 8), index)
    found = ours(patches=visible, patch_index=index).last_hidden_state
    # The class token and the three registers are never hidden.
    seen = torch.cat([torch.arange(4).expand(3, -1), index + 4], dim=1)
    mask = torch.full((3, 20), -torch.inf).double().scatter(1, seen, 0.0)[:, None, None].expand(-1, 1, 20, -1)
    theirs.rope_embeddings.eval()  # it would change positions at random in training
    tokens = theirs(pixels, attention_mask=mask).last_hidden_state
    expected = tokens.gather(1, seen[:, :, None].expand(-1, -1, 32))
    assert torch.allclose(found, expected, rtol=0.0, atol=1e-12)  # in fp64 rounding is 1e-15, and an error is not
    assert not torch.allclose(found, ours(patches=visible, patch_index=15 - index).last_hidden_state, atol=1e-3)
    weights = torch.randn_like(found)
    for states in (found, expected):
        (states * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if "mask_token" not in name}
    for name, parameter in ours.named_parameters():
        if "mask_token" not in name:
            assert torch.allclose(parameter.grad, gradients[name], rtol=0.0, atol=1e-11), name


@pytest.mark.parametrize("family", MASKED)
def test_another_size_has_transformers_interpolated_positions(family: str) -> None:
    ours, theirs = models(family)
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        found = ours.get_image_features(patches=patchify(pixels, 8), image_size=48).pooler_output
        expected = theirs.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("family", MASKED)
def test_bytes_are_normalised_in_the_model(family: str) -> None:
    ours, _ = models(family)
    vision = ours.config.vision_config
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(value)[:, None, None] for value in (vision.image_mean, vision.image_std))
    with torch.no_grad():
        found = ours.get_image_features(patches=patchify(pixels, 8)).pooler_output
        expected = ours.get_image_features(pixel_values=(pixels / 255 - mean) / std).pooler_output
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("family", MASKED)
def test_a_model_is_built_block_by_block(family: str) -> None:
    config = models(family)[0].config
    placed: list[str] = []
    model = build_weights(
        config,
        lambda model: None,
        fresh_weights(0),
        lambda block: placed.append(type(block).__name__),
        config.trained_class,
    )
    assert len(placed) == 2 + 2 * TOWER["num_hidden_layers"] + (family == "siglip")
    assert model(patches=torch.zeros(2, 16, 192), input_ids=captions()[:2]).logits_per_image.isfinite().all()


def test_decay_is_open_clips() -> None:
    """Parameters of fewer than two dimensions do not decay; all others do."""
    for family in MASKED:
        ours, theirs = models(family)
        # The class token and the registers of a ViT have dimensions of one number.
        expected = {
            name: parameter.ndim > 1 and not name.endswith(("cls_token", "register_tokens"))
            for name, parameter in theirs.named_parameters()
        }
        assert {name: decays(ours)[name] for name in expected} == expected


def test_layer_decay_counts_blocks() -> None:
    scales = layer_scales(models("towers")[0], 0.5)
    assert scales["vision_model.embeddings.cls_token"] == scales["text_model.embeddings.LayerNorm.bias"] == 0.125
    assert (
        scales["vision_model.layers.1.mlp.fc1.weight"] == scales["text_model.encoder.layer.1.output.dense.bias"] == 0.5
    )
    assert scales["vision_model.pooler.dense.weight"] == 1.0
    scales = layer_scales(models("dinov3")[0], 0.5)
    assert scales["vision_model.embeddings.register_tokens"] == 0.125
    assert scales["vision_model.model.layer.1.mlp.up_proj.weight"] == 0.5
    assert scales["vision_model.norm.weight"] == 1.0
    scales = layer_scales(models("clip")[0], 0.5)
    assert scales["vision_model.embeddings.class_embedding"] == scales["vision_model.pre_layrnorm.weight"] == 0.125
    assert scales["text_model.encoder.layers.1.mlp.fc1.weight"] == 0.5
    assert scales["vision_model.post_layernorm.weight"] == scales["logit_scale"] == 1.0


@pytest.mark.parametrize("kind", [*POOLED, *UNPOOLED])
def test_the_blocks_of_every_text_tower_are_found(kind: str) -> None:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = CONFIG_MAPPING[kind](**{**TEXT, **special, **OTHER_TEXTS.get(kind, {})})
    text.num_hidden_layers = 2
    config = MaskedTowersConfig.of_towers({**VISION, "model_type": "vit"}, text.to_dict())
    with torch.device("meta"):
        model = MaskedTowersModel(config)
    blocks = encoder_blocks(model.text_model)
    assert len(blocks) == 2
    assert {type(block).__name__ for block in blocks} <= model._no_split_modules
    scales = layer_scales(model, 0.5)
    found = {id(parameter): scales[name] for name, parameter in model.named_parameters()}
    assert [{found[id(parameter)] for parameter in block.parameters()} for block in blocks] == [{0.25}, {0.5}]
    assert found[id(model.text_model.get_input_embeddings().weight)] == 0.125
    assert any(name.startswith("text_model.") for name in muon_matrices(model))


@pytest.mark.parametrize(("start", "gradient", "moves"), [(99.0, -1.0, True), (101.0, -1.0, False), (101.0, 1.0, True)])
def test_the_scale_of_clip_stops_at_100(start: float, gradient: float, moves: bool) -> None:
    """Beyond the bound, a gradient counts only if a step against it leads back."""
    model, _ = models("clip")
    model.logit_scale.data.fill_(math.log(start))
    scale = model.loss_values()["logit_scale"]
    assert scale.item() == pytest.approx(min(start, 100.0))
    scale.backward(torch.tensor([gradient]))
    assert bool(model.logit_scale.grad) == moves


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("clip", {"projection_dim": 7}, "projection_dim.*7"),
        ("siglip", {"vision_use_head": False}, "vision_use_head"),
        ("clip", {"image_size": 33}, "image_size 33"),
        ("clip", {"hidden_act": "swash"}, "hidden_act 'swash'"),
        ("siglip", {"num_attention_heads": 3}, "num_attention_heads 3"),
        ("siglip", {"image_size": [32, 48]}, "image_size.*48"),
    ],
)
def test_towers_that_cannot_be_trained(family: str, changes: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        config_class(family).from_size("s16", {**VISION, **changes}, TEXT)
