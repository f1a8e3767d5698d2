"""open_clip's own models, evaluated as ours are; test_clip_benchmark compares their figures with its own."""

from collections.abc import Callable

import open_clip
import pytest
import torch
from accelerate import Accelerator

from flipscale.evaluation.foreign_models import OpenClipEmbedder, open_clip_embedder

pytestmark = pytest.mark.long

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 2, "pool_type": "first"},
}


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
