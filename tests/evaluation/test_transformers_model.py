"""Dual encoders of transformers, evaluated as ours are: with the features that transformers itself computes."""

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import TOWER
from foreign_towers import TEXT
from hub.native import export_native
from PIL import Image
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    Siglip2Processor,
)

from flipscale.data.samples import SampleNumbers
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.foreign_models import transformers_embedder

CAPTIONS = ["a red disc", "the blue ring", "a"]


def save_siglip2(tokenizer_dir: Path, folder: Path) -> Path:
    """Write the one that takes images of any shape, as a padded row of patches."""
    text, vision = {**TEXT, "max_position_embeddings": 8}, {**TOWER, "num_patches": 16, "patch_size": 8}
    Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)).save_pretrained(folder)
    images = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    Siglip2Processor(images, AutoTokenizer.from_pretrained(tokenizer_dir)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["clip", "siglip", "siglip2"])
def folder(
    request: pytest.FixtureRequest, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "siglip2":
        return request.param, save_siglip2(tokenizer_dir, path)
    return request.param, export_native(request.param, path)


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
    length = model.config.text_config.max_position_embeddings
    tokens = processor.tokenizer(CAPTIONS, padding=padding, truncation=True, max_length=length, return_tensors="pt")
    if kind == "siglip":  # it attends to padding
        tokens.pop("attention_mask", None)
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
    CLIPVisionModel(CLIPVisionConfig(**TOWER)).save_pretrained(tmp_path / "model")
    refused(r"hf:.*model has no processor that can be read \(.*preprocessor_config.json")
    model = AutoModel.from_pretrained(folder[1])
    model.save_pretrained(tmp_path / "model")
    refused(r"hf:.*model has no processor that can be read \(|hf:.*model has no image_processor; it needs")
    state = {name: value for name, value in model.state_dict().items() if name != "logit_scale"}
    model.save_pretrained(tmp_path / "model", state_dict=state)
    refused(r"hf:.*model lacks 1 of .* logit_scale")
    shutil.copytree(folder[1], tmp_path / "model", dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder[1])
    tokenizer.add_tokens([f"word{number}" for number in range(2000)])
    tokenizer.save_pretrained(tmp_path / "model")
    refused(rf"has a tokenizer of {len(tokenizer)} words, and its text tower a vocabulary of \d+; copy")
