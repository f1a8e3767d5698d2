"""Exported CLIPModel and SiglipModel folders, as other programs take them, without remote code."""

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import write_tar
from hub.native import LENGTH, NATIVE, export_native
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, pipeline

from flipscale.data.captions import tokenise
from flipscale.evaluation.test_set import TestSet
from flipscale.hub.loading import load_model, load_with_tokenizer, open_embedder

TEXTS = ["a red disc", "The blue ring!", "cat", "some green bars and a grey cross " * 9]


class Native(NamedTuple):
    family: str
    folder: Path
    model: Any  # as flipscale loads it, with masks
    pictures: list[Image.Image]
    pixels: torch.Tensor
    ids: torch.Tensor

    def embeds(self) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            output = self.model(input_ids=self.ids, pixel_values=self.pixels)
        return output.image_embeds.numpy(), output.text_embeds.numpy()


@pytest.fixture(scope="module", params=NATIVE)
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Native:
    folder = export_native(request.param, tmp_path_factory.mktemp(request.param))
    model, tokenizer = load_with_tokenizer(str(folder))
    assert tokenizer is not None
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)) for shape in ((40, 60), (32, 32), (50, 33))
    ]
    pixels = AutoProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt")["pixel_values"]
    return Native(
        request.param, folder, model, pictures, pixels, tokenise(tokenizer, TEXTS, LENGTH[request.param])["input_ids"]
    )


def test_pipeline(native: Native) -> None:
    classify = pipeline("zero-shot-image-classification", model=str(native.folder), device="cpu")
    assert type(classify.model).__name__ == {"clip": "CLIPModel", "siglip": "SiglipModel"}[native.family]
    with torch.no_grad():
        logits = native.model(input_ids=native.ids[:3], pixel_values=native.pixels).logits_per_image
    for picture, row in zip(native.pictures, logits, strict=True):
        found = classify(picture, candidate_labels=TEXTS[:3], hypothesis_template="{}")
        scores = row.sigmoid() if native.family == "siglip" else row.softmax(0)
        by_label = {line["label"]: line["score"] for line in found}
        assert [by_label[text] for text in TEXTS[:3]] == pytest.approx(scores.tolist(), abs=1e-5)


def test_attention_and_bf16(native: Native) -> None:
    images, texts = native.embeds()
    for options, limit in (
        ({"attn_implementation": "eager"}, 1e-5),
        ({"dtype": torch.bfloat16}, 0.03),
        ({"variant": "bf16", "dtype": torch.float32}, 0.03),
    ):
        model = AutoModel.from_pretrained(native.folder, **options).eval()
        with torch.no_grad():
            output = model(input_ids=native.ids, pixel_values=native.pixels.to(model.dtype))
        for found, expected in ((output.image_embeds, images), (output.text_embeds, texts)):
            assert np.abs(torch.nn.functional.normalize(found.float(), dim=1).numpy() - expected).max() < limit, options


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_folder_of_half_weights_is_computed_in_fp32(name: str, tmp_path: Path) -> None:
    folder = Path(export_native("clip", tmp_path))
    weights = {key: weight.to(getattr(torch, name)) for key, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": name}))
    embedder = open_embedder(str(folder), Accelerator(cpu=True))
    assert {weight.dtype for weight in embedder.model.parameters()} == {torch.float32}
    assert embedder.texts(["a red disc"]).norm() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("family", NATIVE)
def test_pictures_of_any_shape_are_cropped_as_the_processor_does(family: str, tmp_path: Path) -> None:
    """A folder embeds as its `hf:`, which runs the exported processor, and their tables name the crop."""
    exported, rng = export_native(family, tmp_path), np.random.default_rng(0)
    samples = []
    for number, (width, height) in enumerate([(320, 240), (240, 320), (333, 241), (640, 100), (64, 64), (20, 17)]):
        coarse = rng.integers(0, 255, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        picture = io.BytesIO()
        Image.fromarray(coarse).resize((width, height)).save(picture, ("JPEG", "PNG")[number % 2])
        samples.append({("jpg", "png")[number % 2]: picture.getvalue(), "txt": b"a red disc"})
    write_tar(tmp_path / "0.tar", samples)
    source, accelerator = TestSet.open(str(tmp_path)).source, Accelerator(cpu=True)
    ours, theirs = (open_embedder(name, accelerator) for name in (str(exported), f"hf:{exported}"))
    assert (ours.images(source) - theirs.images(source)).abs().max() < 1e-3
    assert ours.crop == theirs.crop == {"clip": "resize, crop", "siglip": "squash"}[family]


@pytest.mark.parametrize("fields", [{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}, {"do_normalize": False}])
def test_pixels_are_normalised_as_the_image_processor_says(fields: dict, tmp_path: Path) -> None:
    folder = export_native("clip", tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    vision = load_model(str(folder))[1].config.vision_config
    assert (vision.image_mean, vision.image_std) == ([0, 0, 0], [1, 1, 1])


def test_a_processor_of_texts_only_is_no_image_processor(tmp_path: Path) -> None:
    folder = export_native("clip", tmp_path)
    (folder / "preprocessor_config.json").unlink()
    for content in ({"processor_class": "CLIPProcessor"}, {"image_processor": "CLIPImageProcessor"}):
        (folder / "processor_config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
            load_model(str(folder))
