"""open_clip's own models, evaluated as ours are; test_clip_benchmark compares their figures with its own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from accelerate import Accelerator
from evaluation.tiny_model import tiny_embedder
from torch.nn.functional import normalize

from flipscale.data.decode import decode_whole, resize
from flipscale.data.samples import SampleNumbers
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.foreign_models import OpenClipEmbedder, open_clip_embedder
from flipscale.hub.convert_open_clip import convert_to_open_clip
from flipscale.hub.export import build_processor, export_model

pytestmark = pytest.mark.long

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 2, "pool_type": "first"},
}


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_our_model_as_open_clip_s_is_ours_but_for_the_resizing(
    shards: Path, tokenizer_dir: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    ours = tiny_embedder(tokenizer_dir, batch_size=16)
    processor = build_processor(ours.model.config, ours.tokenizer)
    convert_to_open_clip(str(export_model(ours.model, processor, tmp_path / "flip")), tmp_path / "oc")
    theirs = open_clip_embedder(f"local-dir:{tmp_path / 'oc'}", accelerator)
    source, captions = TarSource(str(shards)), ["a red disc", "the blue ring", "a grey bar"]
    assert (theirs.texts(captions) - ours.texts(captions)).abs().max() < 1e-5
    cropped = [cropped_by_torchvision(source.read(*where).image) for where in SampleNumbers(source)]
    pixels, vision = torch.from_numpy(np.stack(cropped).astype(np.float32)) / 255, ours.model.config.vision_config
    pixels = (pixels - torch.tensor(vision.image_mean)) / torch.tensor(vision.image_std)
    with torch.no_grad():
        embeds = normalize(ours.model.get_image_features(pixels.permute(0, 3, 1, 2)).pooler_output, dim=1)
    assert (theirs.images(source) * embeds).sum(dim=1).min() > 0.99


def cropped_by_torchvision(encoded: bytes) -> np.ndarray:
    """Return the crop of torchvision, which rounds an odd half margin to the even number; the processor's is below."""
    image = decode_whole(encoded)
    height, width = (32 * side // min(image.shape[:2]) for side in image.shape[:2])
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    return resize(image, (height, width))[top : top + 32, left : left + 32]


def vit(**vision: object) -> open_clip.CLIP:
    torch.manual_seed(0)
    return open_clip.CLIP(**{**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], **vision}}).eval()


TIMM = {"timm_model_name": "test_vit", "timm_pool": "token"}


@pytest.mark.parametrize(
    ("vision", "projection"),
    [
        ({}, lambda visual: lambda pooled: pooled @ visual.proj),
        ({**TIMM, "timm_proj": "linear"}, lambda visual: visual.head),
        ({**TIMM, "timm_proj": ""}, lambda visual: visual.trunk.head),
        ({**TIMM, "timm_proj": "none"}, lambda visual: lambda pooled: pooled),
    ],
    ids=["open_clip", "timm, a head", "timm, its classifier", "timm, no projection"],
)
@torch.no_grad()
def test_features_before_the_projection(vision: dict, projection: Callable, accelerator: Accelerator) -> None:
    """Projected, they are the embedding; the model is as it was."""
    model = vit(**vision)
    embedder = OpenClipEmbedder(model, None, accelerator, preprocess=torch.nn.Identity())
    images = torch.randn(3, 3, 32, 32)
    before = embedder.image_features(image=images)
    pooled = embedder.pooled_features(image=images)
    assert (projection(model.visual)(pooled) - before).abs().max() < 1e-6
    assert pooled.shape[1] == (64 if vision else 32)
    assert torch.equal(embedder.image_features(image=images), before)
    assert embedder.image_size == 32


def test_features_before_an_unknown_projection(accelerator: Accelerator) -> None:
    model = vit(layers=[1, 1, 1, 1], width=8)
    embedder = OpenClipEmbedder(model, None, accelerator, name="open_clip:r", preprocess=torch.nn.Identity())
    with pytest.raises(ValueError, match=r"open_clip:r has a ModifiedResNet, whose features before the projection"):
        embedder.pooled_features(image=torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-32", r"open_clip:ViT-B-32 names no weights; .* openai, laion"),
        (__file__, r"names no weights; .* open_clip:CONFIG.json,.*test_open_clip.py"),
        ("ViT-B-33,openai", r"'ViT-B-33' cannot be loaded \(.*'ViT-B-33' not found"),
        ("local-dir:/nowhere", r"'local-dir:/nowhere' cannot be loaded \("),
    ],
)
def test_what_cannot_be_loaded_is_named(accelerator: Accelerator, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_clip_embedder(name, accelerator)
