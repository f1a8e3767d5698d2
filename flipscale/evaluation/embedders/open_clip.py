"""Evaluate open_clip's models as ours are: with their preprocessing and tokenizer, on the same test sets."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from flipscale.data.decode import UndecodableImage
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.images import Decoder

PREFIX = "open_clip:"


def open_clip_embedder(name: str, accelerator: Accelerator, batch_size: int = 256, num_workers: int = 0) -> Embedder:
    """Return the embedder of a model that open_clip knows.

    Args:
        name: `NAME,PRETRAINED`: one of its models, or a JSON file with a model configuration of its kind, and a tag of
            its weights or a file of them, such as `ViT-B-16,laion2b_s34b_b88k`; or its `hf-hub:ORG/NAME` or
            `local-dir:FOLDER`, which hold their weights.

    Raises:
        ValueError: open_clip is not installed, does not know the model or cannot load it; no weights are named.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ValueError("open_clip is not installed; pip install 'flipscale[peers]'") from error
    called = f"{PREFIX}{name}"
    name, _, pretrained = name.partition(",")
    if name.endswith(".json") and Path(name).is_file():
        open_clip.add_model_config(name)
        name = Path(name).stem
    if not pretrained and ":" not in name:
        tags = open_clip.list_pretrained_tags_by_model(name)
        known = f"use one of {', '.join(tags)}" if tags else "it has none of its own; name a file"
        raise ValueError(f"open_clip:{name} names no weights; add them after a comma: {known}")
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained or None)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"open_clip model {name!r} cannot be loaded ({reason})") from error
    model = model.to(accelerator.device).eval()
    return OpenClipEmbedder(model, tokenizer, accelerator, batch_size, num_workers, name=called, preprocess=preprocess)


@dataclass(frozen=True)
class OpenClipEmbedder(Embedder):
    """An embedder of open_clip's model, tokenizer and `preprocess`, which turns an image into its tensor."""

    preprocess: Callable[[Image.Image], torch.Tensor] = field(kw_only=True)

    @property
    def image_size(self) -> int:
        size = self.model.visual.image_size
        return size if isinstance(size, int) else size[0]

    def decoder(self) -> Decoder:
        return partial(_preprocessed, self.preprocess)

    def image_features(self, **columns: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(columns["image"])

    def tokens(self, texts: list[str]) -> torch.Tensor:
        return self.tokenizer(texts)

    def text_features(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(batch)


def _preprocessed(preprocess: Callable[[Image.Image], torch.Tensor], encoded: bytes, row: int) -> dict[str, np.ndarray]:
    try:
        return {"image": preprocess(Image.open(io.BytesIO(encoded))).numpy()}
    except OSError as error:
        raise UndecodableImage(str(error)) from error
