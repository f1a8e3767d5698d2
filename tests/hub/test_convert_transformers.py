"""open_clip's ViT models as transformers' own: equal embeddings, from weights that are drawn at random."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import write_tokenizer
from safetensors.torch import load_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from transformers import AutoModel, AutoProcessor, CLIPModel, SiglipModel

from flipscale.cli import main
from flipscale.evaluation.foreign_models import load_open_clip

VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CLIP = {"embed_dim": 48, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
SIGLIP_TEXT = {**TEXT, "width": 64, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
TIMM = {"timm_model_name": "vit_of_two_blocks", "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
SIGLIP = {"embed_dim": 64, "init_logit_bias": -10, "custom_text": True, "vision_cfg": {"image_size": 32, **TIMM}}


@register_model
def vit_of_two_blocks(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """The image tower of a small SigLIP."""
    sizes: dict[str, Any] = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "act_layer": "gelu_tanh"}
    return VisionTransformer(img_size=32, class_token=False, global_pool="map", num_classes=0, **sizes)


@pytest.fixture
def foreign(tmp_path: Path) -> Callable[..., str]:
    """Writes an open_clip model of a configuration, and returns its name."""

    def write(config: dict, name: str) -> str:
        file, weights = tmp_path / f"{name}.json", tmp_path / f"{name}.pt"
        file.write_text(json.dumps(config))
        open_clip.add_model_config(file)
        torch.manual_seed(0)
        model = open_clip.create_model(name, load_weights=False)
        with torch.no_grad():
            for key, parameter in model.named_parameters():  # biases begin as zeros and norms as ones
                if key != "logit_bias":
                    parameter.add_(0.02 * torch.randn_like(parameter))
        torch.save(model.state_dict(), weights)
        return f"open_clip:{file},{weights}"

    return write


@pytest.mark.parametrize(
    ("name", "config", "kind"),
    [
        ("quick", CLIP, CLIPModel),
        ("custom", {**CLIP, "quick_gelu": False, "custom_text": True}, CLIPModel),
        ("siglip", {**SIGLIP, "text_cfg": {**SIGLIP_TEXT, "tokenizer_kwargs": {"clean": "canonicalize"}}}, SiglipModel),
    ],
)
def test_embeddings_equal_open_clips(
    foreign: Callable[..., str],
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    name: str,
    config: dict,
    kind: type,
) -> None:
    if kind is SiglipModel:
        config["text_cfg"]["hf_tokenizer_name"] = str(write_tokenizer(tmp_path / "words"))
    named = foreign(config, name)
    main(["convert", "transformers", named, str(tmp_path / "ours")])
    # open_clip crops by default, and a SigLIP's processor squashes.
    differs = [text for warning in recwarn if "shortest and bicubic; " in (text := str(warning.message))]
    assert len(differs) == (kind is SiglipModel)
    theirs, _, tokenizer = load_open_clip(named.removeprefix("open_clip:"))
    ours, processor = (auto.from_pretrained(tmp_path / "ours") for auto in (AutoModel, AutoProcessor))
    assert type(ours) is kind
    pixels, texts = torch.randn(3, 3, 32, 32), ["a red_circle!", "The  Blue square", "a triangle, " * 30]
    ids = processor(text=texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        image, text, _ = theirs.eval()(pixels, tokenizer(texts))[:3]
        found = ours.eval()(pixel_values=pixels, input_ids=ids["input_ids"])
    assert torch.allclose(found.image_embeds, image, atol=1e-5)
    assert torch.allclose(found.text_embeds, text, atol=1e-5)
    scale = load_file(tmp_path / "ours/model.safetensors")["logit_scale"]
    assert scale.reshape(()) == theirs.logit_scale


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("average", {"vision_cfg": {**VISION, "pool_type": "avg"}}, "images"),
        ("scaled", {"vision_cfg": {**VISION, "ls_init_value": 0.1}}, "ls_1.gamma"),
        ("seeing_all", {"text_cfg": {**TEXT, "no_causal_mask": True}}, "texts"),
        ("convolutions", {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 32}}, "not a ViT"),
    ],
)
def test_other_towers_are_refused(
    foreign: Callable[..., str], refused: Callable[..., str], tmp_path: Path, name: str, change: dict, expected: str
) -> None:
    named = foreign({**CLIP, **change}, name)
    assert expected in refused("convert", "transformers", named, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
