"""FLIP models converted for open_clip, loaded by open_clip itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hub.loopback_hub import LoopbackHub
from hub.native import export_native
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, CLIPConfig, CLIPModel

from flipscale import cli
from flipscale.hub.convert_open_clip import convert_to_open_clip, open_clip_config
from flipscale.hub.export import build_processor, export_model
from flipscale.model import FlipConfig, FlipModel
from flipscale.model.families import config_class

SIZE = {"num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 100}
VISION = {
    **SIZE,
    "hidden_size": 40,
    "image_size": 32,
    "patch_size": 8,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": 0.25,
}
SHORT = {"num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
TEXT = {**SHORT, "hidden_size": 32, "vocab_size": 16, "max_position_embeddings": 8}
CAPTIONS = ["a red disc", "the blue ring", "grey"]


@pytest.fixture
def save(tokenizer_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Saves a model of random weights and biases, whose class token is far from the rest, and returns its folder."""

    def save(
        vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, dim: int = 24, **head: float
    ) -> Path:
        torch.manual_seed(0)
        towers = {"vision_config": {**VISION, **(vision or {})}, "text_config": {**TEXT, **(text or {})}}
        config = FlipConfig(**towers, projection_dim=dim, **head)
        model = FlipModel(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter += 0.3 * torch.randn_like(parameter)
            model.vision_model.embeddings.class_embedding.mul_(1000.0)
        processor = build_processor(config, AutoTokenizer.from_pretrained(tokenizer_dir))
        return export_model(model, processor, tmp_path / "flip")

    return save


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


OWN_TOKENS = {"pooling": "mean", "attend_to_padding": False}


@pytest.mark.parametrize(
    ("vision", "text", "dim"),
    [
        ({}, {"num_hidden_layers": 0}, 24),
        ({"hidden_act": "gelu", "layer_norm_eps": 1e-5}, {"pooling": "mean"}, 24),
        ({"hidden_act": "relu"}, {"num_hidden_layers": 0, **OWN_TOKENS}, 128),  # wider than the tower
        ({"hidden_act": "relu"}, {"hidden_act": "quick_gelu", **OWN_TOKENS}, 24),
        ({}, {"hidden_act": "relu", "attend_to_padding": False}, 40),
    ],
)
def test_equal_embeddings(
    save: Callable[..., Path], tmp_path: Path, picture: Image.Image, vision: dict, text: dict, dim: int
) -> None:
    folder, dst = save(vision, text, dim), tmp_path / "open_clip"
    cli.main(["convert", "open_clip", str(folder), str(dst)])
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{dst}")
    tokens = open_clip.get_tokenizer(f"local-dir:{dst}")(CAPTIONS)
    ours = FlipModel.from_pretrained(folder).eval()
    pixels = preprocess(picture)[None]
    noise = torch.cat([pixels, torch.randn(4, 3, 32, 32)])
    with torch.no_grad():
        expected = ours(pixel_values=noise, input_ids=tokens)
        image_embeds, text_embeds, scale = theirs.eval()(noise, tokens)
    assert (image_embeds - expected.image_embeds).abs().max() < 1e-5
    assert (text_embeds - expected.text_embeds).abs().max() < 1e-5
    assert scale.item() == pytest.approx(expected.logit_scale.item(), rel=1e-6)


def test_equal_bias_pixels_and_ids(
    save: Callable[..., Path], tmp_path: Path, tokenizer_dir: Path, picture: Image.Image
) -> None:
    folder, dst = save(logit_bias_init_value=-10.0), tmp_path / "open_clip"
    cli.main(["convert", "open_clip", str(folder), str(dst)])
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{dst}")
    model = FlipModel.from_pretrained(folder)
    assert theirs.logit_bias.item() == model.logit_bias.item() != -10.0
    ours = build_processor(model.config, AutoTokenizer.from_pretrained(tokenizer_dir))
    inputs = ours(images=picture, text=CAPTIONS, return_tensors="pt")
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{dst}")(CAPTIONS), inputs["input_ids"])
    assert (preprocess(picture) - inputs["pixel_values"][0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        ({"hidden_act": "silu"}, {}, "the image tower's hidden_act silu"),
        ({}, {"hidden_act": "quick_gelu"}, "quick_gelu in one tower and gelu_pytorch_tanh in the other"),
        ({"num_channels": 4, "image_mean": 0.5, "image_std": 0.5}, {}, "images of 4 channels"),
    ],
)
def test_inexpressible_models(vision: dict, text: dict, message: str) -> None:
    config = FlipConfig(vision_config={**VISION, **vision}, text_config={**TEXT, **text}, projection_dim=24)
    with pytest.raises(ValueError, match=f"open_clip cannot express {message}"):
        open_clip_config(config)


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("name", ["open_clip", "a \"b\" \\n 'c': {{ d }} #\n```"])
def test_card(save: Callable[..., Path], tmp_path: Path, hub: LoopbackHub, name: str) -> None:
    folder, dst = save(), tmp_path / name
    for licence in (None, "cc-by-nc-4.0"):
        if licence:
            (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# a model\n")
            shutil.rmtree(dst)
        convert_to_open_clip(str(folder), dst)
        card = ModelCard.load(dst / "README.md")
        assert card.data.license == licence
    assert card.data.to_dict()["library_name"] == "open_clip"
    names: dict[str, Any] = {}
    exec(card.text.split("```python\n")[1].split("```")[0], names)
    assert names["tokenizer"](CAPTIONS).shape == (3, 8)
    cli.main(["push", str(dst), "org/name"])
    pushed = hub.content("org/name")
    assert pushed.keys() == {path.name for path in dst.iterdir()}
    assert b'"hf-hub:org/name"' in pushed["README.md"]
    assert json.loads(pushed["open_clip_config.json"])["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "org/name"
    for place, message in ((dst, "is there already"), (tmp_path / "new", "cannot be loaded")):
        with pytest.raises(ValueError, match=message):
            convert_to_open_clip(str(tmp_path), place)
    assert not (tmp_path / "new").exists()


def test_a_clip_goes_back_to_open_clip(tmp_path: Path, picture: Image.Image) -> None:
    """A CLIPModel as a run exports it: equal pixels, ids and embeddings."""
    folder, dst = export_native("clip", tmp_path), tmp_path / "open_clip"
    cli.main(["convert", "open_clip", str(folder), str(dst)])
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{dst}")
    tokens = open_clip.get_tokenizer(f"local-dir:{dst}")(CAPTIONS)
    ours, processor = (auto.from_pretrained(folder) for auto in (CLIPModel, AutoProcessor))
    inputs = processor(text=CAPTIONS, images=picture, padding="max_length", max_length=24, return_tensors="pt")
    assert torch.equal(tokens, inputs["input_ids"])
    assert (preprocess(picture) - inputs["pixel_values"][0]).abs().max() < 0.03  # of two resizers
    noise = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = ours.eval()(pixel_values=noise, input_ids=tokens)
        image_embeds, text_embeds, scale = theirs.eval()(noise, tokens)
    assert (image_embeds - expected.image_embeds).abs().max() < 1e-5
    assert (text_embeds - expected.text_embeds).abs().max() < 1e-5
    assert scale.item() == pytest.approx(ours.logit_scale.exp().item(), rel=1e-6)
    assert ModelCard.load(dst / "README.md").content.count("fp16") == 0


@pytest.mark.parametrize("end", [2, 13])
def test_a_clip_of_transformers_pools_as_its_own(
    end: int, caption_tokenizer: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """Configurations of OpenAI's age name 2 for the largest id of a caption."""
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(caption_tokenizer)
    words.add_bos_token = words.add_eos_token = True
    text = {**TEXT, "vocab_size": 14, "eos_token_id": end, "hidden_act": "gelu", "projection_dim": 24}
    vision = {**VISION, "hidden_act": "gelu", "image_std": [0.25] * 3, "projection_dim": 24}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    model.save_pretrained(tmp_path / "clip")
    build_processor(config_class("clip").of_towers(vision, text), words).save_pretrained(tmp_path / "clip")
    cli.main(["convert", "open_clip", str(tmp_path / "clip"), str(tmp_path / "out")])
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(CAPTIONS)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.get_text_features(tokens).pooler_output, dim=1)
        assert (theirs.encode_text(tokens, normalize=True) - expected).abs().max() < 1e-5
    assert "family flip or clip" in refused("convert", "open_clip", export_native("siglip", tmp_path), tmp_path / "no")
