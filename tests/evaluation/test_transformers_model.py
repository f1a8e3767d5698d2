"""Dual encoders of transformers, evaluated as ours are: with the features that transformers itself computes."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import TOWER
from PIL import Image
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    Siglip2Processor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from flipscale.data.samples import SampleNumbers
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.foreign_models import transformers_embedder

CAPTIONS = ["a red disc", "the blue ring", "a"]
TEXT = {**TOWER, "vocab_size": 16, "max_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": 1}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}


def clip(tokenizer: Any) -> tuple[Any, Any]:
    config = CLIPConfig(text_config={**TEXT, "eos_token_id": 2}, vision_config=VISION, projection_dim=16)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return CLIPModel(config), CLIPProcessor(CLIPImageProcessor(**size), tokenizer)


def siglip(tokenizer: Any) -> tuple[Any, Any]:
    config = SiglipConfig(text_config={**TEXT, "eos_token_id": 2}, vision_config=VISION)
    return SiglipModel(config), SiglipProcessor(SiglipImageProcessor(size={"height": 32, "width": 32}), tokenizer)


def siglip2(tokenizer: Any) -> tuple[Any, Any]:
    """The one that takes images of any shape, as a padded row of patches."""
    vision = {**TOWER, "num_patches": 16, "patch_size": 8}
    config = Siglip2Config(text_config={**TEXT, "eos_token_id": 2}, vision_config=vision)
    return Siglip2Model(config), Siglip2Processor(Siglip2ImageProcessor(patch_size=8, max_num_patches=16), tokenizer)


@pytest.fixture(scope="module", params=[clip, siglip, siglip2], ids=lambda make: make.__name__)
def folder(
    request: pytest.FixtureRequest, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    torch.manual_seed(0)
    make: Callable[[Any], tuple[Any, Any]] = request.param
    path = tmp_path_factory.mktemp(make.__name__)
    for part in make(AutoTokenizer.from_pretrained(tokenizer_dir)):
        part.save_pretrained(path)
    return make.__name__, path


def unit(output: Any) -> torch.Tensor:
    return output.pooler_output / output.pooler_output.norm(dim=1, keepdim=True)


@torch.no_grad()
def test_its_features_are_transformers_own(folder: tuple[str, Path], shards: Path, accelerator: Accelerator) -> None:
    kind, path = folder
    model, processor = AutoModel.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
    source = TarSource(str(shards))
    pictures = [Image.open(io.BytesIO(source.read(*where).image)).convert("RGB") for where in SampleNumbers(source)]
    pixels = processor.image_processor(images=pictures, return_tensors="pt")
    padding = True if kind == "clip" else "max_length"
    tokens = processor.tokenizer(CAPTIONS, padding=padding, truncation=True, max_length=8, return_tensors="pt")
    if kind == "siglip":  # it attends to padding
        del tokens["attention_mask"]
    for workers in (0, 2):
        embedder = transformers_embedder(str(path), accelerator, batch_size=40, num_workers=workers)
        assert (embedder.images(source) - unit(model.get_image_features(**pixels))).abs().max() < 1e-6
    assert (embedder.texts(CAPTIONS) - unit(model.get_text_features(**tokens))).abs().max() < 1e-6
    pooled = model.vision_model(**pixels).pooler_output
    assert (embedder.images(source, "pooled") - pooled).abs().max() < 1e-5
    assert pooled.shape == (96, 32)
    assert (embedder.name, embedder.image_size) == (f"hf:{path}", 32)


def test_what_cannot_be_loaded_is_named(folder: tuple[str, Path], tmp_path: Path, accelerator: Accelerator) -> None:
    def refused(what: str) -> None:
        with pytest.raises(ValueError, match=what) as error:
            transformers_embedder(str(tmp_path / "model"), accelerator)
        assert "\n" not in str(error.value)

    refused(r"hf:.*model cannot be loaded \(")
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(tmp_path / "model")
    refused(r"hf:.*model has no processor that can be read \(.*preprocessor_config.json")
    model = AutoModel.from_pretrained(folder[1])
    model.save_pretrained(tmp_path / "model")
    refused(r"hf:.*model has no processor that can be read \(|hf:.*model has no image_processor; it needs")
    state = {name: value for name, value in model.state_dict().items() if name != "logit_scale"}
    model.save_pretrained(tmp_path / "model", state_dict=state)
    refused(r"hf:.*model lacks 1 of .* logit_scale")
