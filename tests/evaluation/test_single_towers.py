"""Towers of transformers and timm on their own: their features are those of their own library, and are stored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from conftest import TOWER, write_shards
from foreign_towers import _BOTH, PIXELS, SINGLE_IMAGES, VISION, save_text, save_vision, shaken
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    RobertaForMaskedLM,
    Siglip2ImageProcessor,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from flipscale.cli import main
from flipscale.evaluation.whole_images import packed
from flipscale.hub.loading import open_embedder
from flipscale.io.errors import UserError

CAPTIONS = ["a red disc", "the", "the blue ring a red disc"]


def save_naflex(folder: Path) -> None:
    shaken(Siglip2VisionModel(Siglip2VisionConfig(**TOWER, num_patches=16, patch_size=8))).save_pretrained(folder)
    Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(folder)


IMAGE_TOWERS: dict[str, Callable[[Path], None]] = {
    **SINGLE_IMAGES,
    "siglip": VISION["`SiglipVisionModel`"],
    "siglip2_naflex": save_naflex,
    "resnet": VISION["`ResNetModel`"],
    "timm_eva": VISION["timm, EVA02"],
    "timm_resnet": VISION["timm, ResNet"],
}
# Text towers with the place of a caption's feature.
TEXT_TOWERS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, "last"),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 20}, "last"),
    "tipsv2_text_model": ({}, "pooled"),
    "qwen3": ({"head_dim": 16, "num_key_value_heads": 2}, "last"),
    "gemma3_text": ({"head_dim": 16, "num_key_value_heads": 2, "use_bidirectional_attention": True}, "mean"),
    "modernbert": ({"cls_token_id": 12, "sep_token_id": 13}, "mean"),
    "bert": ({}, "pooled"),
    "roberta": ({}, "pooled"),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_shards(folder, [7, 5])
    return folder


def own_features(folder: Path, pictures: list[Image.Image]) -> torch.Tensor:
    columns = AutoImageProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt")
    return AutoModel.from_pretrained(folder).eval()(**columns).pooler_output.flatten(1)


def own_timm(folder: Path, pictures: list[Image.Image]) -> torch.Tensor:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    transform = create_transform(**resolve_model_data_config(model))
    return model(torch.stack([transform(picture) for picture in pictures]))


@pytest.mark.parametrize("kind", IMAGE_TOWERS)
def test_an_image_tower_embeds_as_its_library(kind: str, tmp_path: Path, accelerator: Accelerator) -> None:
    IMAGE_TOWERS[kind](tmp_path)
    embedder = open_embedder(f"hf:{tmp_path}", accelerator)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3)).astype(np.uint8)
    pictures = [Image.fromarray(picture) for picture in pixels]
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    decoded = [embedder.decoder()(file.read_bytes(), 0) for file in files]
    columns = {name: torch.from_numpy(np.stack([one[name] for one in decoded])) for name in decoded[0]}
    with torch.no_grad():
        expected = (own_timm if kind.startswith("timm") else own_features)(tmp_path, pictures)
        assert (embedder.pooled_features(**columns) - expected).abs().max() < 1e-5
    assert expected.std(dim=0).max() > 1e-3
    assert embedder.gives == ("features",)
    assert embedder.image_size == {"timm_eva": 28, "timm_resnet": 176, "timm_convnext": 224}.get(kind, 32)


@pytest.mark.parametrize("kind", TEXT_TOWERS)
def test_a_text_tower_embeds_each_caption_as_alone(kind: str, tmp_path: Path, accelerator: Accelerator) -> None:
    """A caption in a batch is padded; its feature is that of the library for the caption without padding."""
    options, place = TEXT_TOWERS[kind]
    save_text(kind, tmp_path, **options)
    embedder = open_embedder(f"hf:{tmp_path}", accelerator)
    model, tokenizer = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        output = [model(**tokenizer(caption, return_tensors="pt")) for caption in CAPTIONS]
        found = embedder.pooled_text_features(embedder.tokens(CAPTIONS))
    states = [one.last_hidden_state[0] for one in output]
    places = {"last": lambda row: states[row][-1], "mean": lambda row: states[row].mean(dim=0)}
    expected = torch.stack([places.get(place, lambda row: output[row].pooler_output[0])(row) for row in range(3)])
    assert (found - expected).abs().max() < 1e-5
    assert found.std(dim=0).max() > 1e-3
    assert embedder.gives == ("texts",)
    # Long captions are cut where the tower's positions end.
    assert embedder.tokens(["a red disc " * 200])["input_ids"].shape[1] <= 20


@pytest.mark.parametrize(("kind", "head"), [("vit", "ViTForImageClassification"), ("vit_mae", "ViTMAEModel")])
def test_without_a_pooler_an_image_is_its_class_token(
    kind: str, head: str, tmp_path: Path, accelerator: Accelerator
) -> None:
    save_vision(kind, tmp_path, head=head, **TOWER, **PIXELS)
    options = {"mask_ratio": 0.0} if kind == "vit_mae" else {"add_pooling_layer": False}
    model = AutoModel.from_pretrained(tmp_path, **options).eval()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state[:, 0]
        found = open_embedder(f"hf:{tmp_path}", accelerator).pooled_features(pixel_values=pixels)
    assert (found - expected).abs().max() < 1e-5


def test_without_a_pooler_a_text_is_the_mean_of_its_tokens(tmp_path: Path, accelerator: Accelerator) -> None:
    save_text("roberta", tmp_path)
    shaken(RobertaForMaskedLM(AutoConfig.from_pretrained(tmp_path))).save_pretrained(tmp_path)
    model, tokenizer = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    embedder = open_embedder(f"hf:{tmp_path}", accelerator)
    with torch.no_grad():
        states = [model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0] for caption in CAPTIONS]
        found = embedder.pooled_text_features(embedder.tokens(CAPTIONS))
    assert (found - torch.stack([one.mean(dim=0) for one in states])).abs().max() < 1e-5


def test_an_image_processor_that_keeps_shapes_is_refused(tmp_path: Path, accelerator: Accelerator) -> None:
    save_vision("vit", tmp_path, **TOWER, **PIXELS)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_center_crop": False}))
    decode = open_embedder(f"hf:{tmp_path}", accelerator).decoder()
    pictures = [np.zeros((40, width, 3), np.uint8) for width in (40, 48)]
    with pytest.raises(UserError, match=r"pixel_values of shape \(3, 32, 38\) and \(3, 32, 32\); set do_center_crop"):
        packed((decode(cv2.imencode(".png", picture)[1].tobytes(), 0) for picture in pictures), 2)


@pytest.mark.parametrize(
    "change", [{"padding_side": "left", "model_input_names": ["input_ids"]}, {"pad_token": None, "eos_token": "</s>"}]
)
def test_a_decoder_s_feature_depends_on_no_padding(
    change: dict[str, Any], tmp_path: Path, accelerator: Accelerator
) -> None:
    """Its tokenizer may pad on the left and give no mask, or have an end token only, which then pads."""
    save_text("llama", tmp_path)
    file = tmp_path / "tokenizer_config.json"
    content = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    embedder = open_embedder(f"hf:{tmp_path}", accelerator)
    model, tokenizer = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    assert change.get("padding_side", "right") == "left" or tokenizer.pad_token is None
    captions = [*CAPTIONS, "a red </s>"]  # the end token may be a word of the caption
    with torch.no_grad():
        found = embedder.pooled_text_features(embedder.tokens(captions))
        alone = [model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0, -1] for caption in captions]
    assert (found - torch.stack(alone)).abs().max() < 1e-5


def test_a_clip_s_text_tower_needs_no_image_tower(tmp_path: Path, accelerator: Accelerator) -> None:
    fields = {**_BOTH["text_config"], "eos_token_id": 3}
    save_text("bert", tmp_path)  # its tokenizer
    shaken(CLIPTextModel(CLIPTextConfig(**fields))).save_pretrained(tmp_path)
    embedder = open_embedder(f"hf:{tmp_path}", accelerator)
    ids = embedder.tokens(["a red disc"])["input_ids"]
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tmp_path)(ids).pooler_output
    assert (embedder.text_features(embedder.tokens(["a red disc"])) - expected).abs().max() < 1e-5


def test_towers_of_two_libraries_are_stored(pairs: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    IMAGE_TOWERS["dinov3"](tmp_path / "dino")
    save_text("llama", tmp_path / "llama")
    for tower, model in (("images", "dino"), ("texts", "llama")):
        words = ["prepare", "embed", str(pairs), str(tmp_path / tower), "--model", f"hf:{tmp_path / model}"]
        main([*words, "--towers", tower, "--features", "pooled", "--num_workers", "1", "--batch_size", "4"])
        about = json.loads((tmp_path / tower / "features.json").read_text())
        assert (about["samples"], about[tower]["width"], about["features"]) == (12, 32, "pooled")
    assert np.load(tmp_path / "images/images/00001.npy").shape == (5, 32)
    embed = ("prepare", "embed", pairs, tmp_path / "other", "--num_workers", "0", "--model")
    said = refused(*embed, f"hf:{tmp_path / 'dino'}", "--towers", "images", "texts")
    assert "embeds no texts; use --towers images" in said
    assert "embeds no images; use it for `flipscale prepare embed --towers texts`" in refused(
        *embed, f"hf:{tmp_path / 'llama'}"
    )
    assert "use kind probe" in refused("evaluate", f"hf:{tmp_path / 'dino'}", "--zero_shot", pairs)
    assert "embeds no images" in refused("evaluate", f"hf:{tmp_path / 'llama'}", "--zero_shot", pairs)


def test_what_is_no_tower_is_refused(tmp_path: Path, accelerator: Accelerator) -> None:
    save_text("t5", tmp_path / "t5", d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match=r"t5 is a T5Model, which is neither a dual encoder .* nor an image tower"):
        open_embedder(f"hf:{tmp_path / 't5'}", accelerator)
    save_vision("vit", tmp_path / "vit", **TOWER, **PIXELS)
    (tmp_path / "vit/preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="vit has no processor that can be read"):
        open_embedder(f"hf:{tmp_path / 'vit'}", accelerator)
    save_text("bert", tmp_path / "bert")
    (tmp_path / "bert/tokenizer.json").unlink()
    with pytest.raises(UserError, match="bert has no processor that can be read"):
        open_embedder(f"hf:{tmp_path / 'bert'}", accelerator)
