"""Names, initial values, folders and configurations of the weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification

from flipscale.model import (
    SIZES,
    FlipConfig,
    FlipModel,
    FlipTextConfig,
    FlipTextModel,
    FlipTextModelWithProjection,
    FlipVisionConfig,
    FlipVisionModel,
    FlipVisionModelWithProjection,
)

Small = Callable[..., FlipModel]
NAMES = Path(__file__).parents[1] / "fixtures" / "state_dict_names.txt"


def test_init_is_the_originals(small: Small) -> None:
    model = small({"hidden_size": 256}, {"hidden_size": 128})
    layer = model.vision_model.encoder.layers[0]
    for weight, bound in (
        (layer.self_attn.q_proj.weight, (6 / (4 * 256)) ** 0.5),
        (layer.self_attn.out_proj.weight, (6 / (2 * 256)) ** 0.5),
        (layer.mlp.fc1.weight, (6 / (256 + 64)) ** 0.5),
        (model.image_projection.weight, (6 / (256 + 20)) ** 0.5),
        (model.vision_model.embeddings.patch_embedding.weight, (6 / (192 + 256)) ** 0.5),
    ):
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    text = model.text_model.embeddings
    for weight in (
        text.token_embedding.weight,
        text.position_embedding.weight,
        model.vision_model.embeddings.class_embedding,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.2)
    for tower in (
        FlipVisionModelWithProjection(model.config.vision_config).image_projection,
        FlipTextModelWithProjection(model.config.text_config).text_projection,
    ):
        bound = (6 / (tower.in_features + 20)) ** 0.5
        assert tower.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_names_and_shapes_are_pinned(small: Small) -> None:
    """Published folders hold these names. Never edit the list."""
    state_dict = small({"num_hidden_layers": 1}, {"num_hidden_layers": 1}).state_dict()
    names = "".join(f"{name} {' '.join(map(str, value.shape))}\n" for name, value in state_dict.items())
    assert names == NAMES.read_text()


@pytest.mark.parametrize("size", SIZES)
def test_number_of_parameters(size: str) -> None:
    """The original counts the fixed image positions `[1 + L, D]` too, which are a buffer here."""
    with torch.device("meta"):
        model = FlipModel(FlipConfig.from_size(size))
    vision = model.config.vision_config
    assert model.image_projection.weight.shape == (SIZES[size][2], vision.hidden_size)
    count = model.num_parameters() + (1 + vision.num_patches) * vision.hidden_size
    assert count == {"b16": 139_927_809, "l16": 413_200_129, "h14": 966_723_841}.get(size, count)


def test_a_loaded_model_is_the_saved_one(
    model: FlipModel, images: torch.Tensor, captions: torch.Tensor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    expected = model(pixel_values=images, input_ids=captions)
    for auto in (FlipModel, AutoModel, AutoModelForZeroShotImageClassification):
        loaded = auto.from_pretrained(tmp_path).eval()
        assert type(loaded) is FlipModel
        output = loaded(pixel_values=images, input_ids=captions)
        assert torch.equal(output.logits_per_image, expected.logits_per_image)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    for tower, inputs, embeds in (
        (FlipVisionModelWithProjection, {"pixel_values": images}, "image_embeds"),
        (FlipTextModelWithProjection, {"input_ids": captions}, "text_embeds"),
    ):
        found = getattr(tower.from_pretrained(tmp_path).eval()(**inputs), embeds)
        assert torch.allclose(torch.nn.functional.normalize(found), getattr(expected, embeds), atol=1e-6)


@pytest.mark.parametrize("tower", [FlipVisionModel, FlipTextModel])
def test_a_tower_is_saved_and_found_by_auto_classes(model: FlipModel, tower: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "whole")
    tower.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "tower")
    loaded, whole = AutoModel.from_pretrained(tmp_path / "tower"), model.state_dict()
    assert type(loaded) is tower
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, whole[f"{tower.base_model_prefix}.{name}"])


def test_bf16_weights_leave_the_fixed_tables_in_fp32(model: FlipModel, images: torch.Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = FlipModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    expected = dict(model.named_buffers())
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    pixels = (images * 255).to(torch.uint8)
    close = loaded.vision_model(pixel_values=pixels).pooler_output.float()
    assert torch.allclose(close, model.vision_model(pixel_values=pixels).pooler_output, atol=0.05)
    output = loaded(pixel_values=pixels, input_ids=torch.ones(3, 8).long())
    assert output.image_embeds.dtype == output.logit_scale.dtype == output.logits_per_image.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: FlipVisionConfig(image_size=225), "image_size 225 .*use 224 or 240"),
        (lambda _: FlipTextConfig(pooling="max"), "text_config: pooling is 'max'"),
        (
            lambda _: FlipTextConfig(embedded_by={"model": "hf:a"}),
            "text_config: embedded_by is .*hf:a.* weights_digest",
        ),
        (lambda _: FlipConfig.from_size("xl"), "model size 'xl' .*b16, l16, l14, h14, g14"),
        (lambda small: small({"hidden_size": 30, "num_attention_heads": 5}), "vision_config: hidden_size 30 "),
        (lambda small: small({"num_attention_heads": 5}), "vision_config: hidden_size 32 .*num_attention_heads"),
        (lambda small: small(None, {"num_attention_heads": 5}), "text_config: hidden_size 24 .*num_attention_heads"),
    ],
)
def test_invalid_configurations(small: Small, make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(small)


def test_projection_dim_is_one_for_both_towers() -> None:
    config = FlipConfig(projection_dim=7)
    assert config.vision_config.projection_dim == config.text_config.projection_dim == 7
    assert FlipConfig.from_size("b16", {"projection_dim": 7}, {"projection_dim": 7}).projection_dim == 7
    with pytest.raises(ValueError, match="projection_dim differs: vision_config has 7, text_config has 512"):
        FlipConfig.from_size("b16", {"projection_dim": 7})
    assert FlipConfig.from_size("l16", text_config={"vocab_size": 50}).text_config.vocab_size == 50


def test_a_loaded_model_takes_another_projection_dim(model: FlipModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    narrow = FlipModel.from_pretrained(tmp_path, projection_dim=3, ignore_mismatched_sizes=True)
    assert {len(part.weight) for part in (narrow.image_projection, narrow.text_projection)} == {3}


def test_fields_of_other_tools_are_kept(model: FlipModel, tmp_path: Path) -> None:
    """Quantisers, PEFT and hubs write fields of their own into config.json."""
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["hub_note"] = {"by": "somebody"}
    content["vision_config"]["rope_theta"] = 100.0
    content["text_config"]["quantised"] = True
    (tmp_path / "config.json").write_text(json.dumps(content))
    FlipModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["hub_note"] == {"by": "somebody"}
    assert (again["vision_config"]["rope_theta"], again["text_config"]["quantised"]) == (100.0, True)


def test_model_format(model: FlipModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert [c["model_format"] for c in (content, content["vision_config"], content["text_config"])] == [1, 1, 1]
    content["vision_config"]["model_format"] = 5
    (tmp_path / "config.json").write_text(json.dumps(content))
    for model_class in (FlipModel, FlipVisionModel):
        with pytest.raises(ValueError, match="model_format 5, this FlipVisionConfig reads up to 4; upgrade flipscale"):
            model_class.from_pretrained(tmp_path)
