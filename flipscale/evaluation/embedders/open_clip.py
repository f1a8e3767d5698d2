"""Evaluate open_clip's models as ours are: with their preprocessing and tokenizer, on the same test sets."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.images import Decoder, rgb_image
from flipscale.io.errors import UserError
from flipscale.io.model_folder import check_texts, read_object

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
        raise UserError("open_clip is not installed; pip install 'flipscale[peers]'") from error
    called = f"{PREFIX}{name}"
    name, _, pretrained = name.partition(",")
    try:
        if name.endswith(".json") and Path(name).is_file():
            read_object(Path(name))
            open_clip.add_model_config(name)
            name = Path(name).stem
        if not pretrained and ":" not in name:
            tags = open_clip.list_pretrained_tags_by_model(name)
            known = f"use one of {', '.join(tags)}" if tags else "it has none of its own; name a file"
            raise _NoWeights(f"open_clip:{name} names no weights; add them after a comma: {known}")
        folder = Path(name.removeprefix("local-dir:"))
        if name.startswith("local-dir:") and folder.is_dir():
            check_texts(folder)
        with no_code_of_models():
            # Pickles are read as weights only, which is its default.
            model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained or None, weights_only=True)
            tokenizer = open_clip.get_tokenizer(name)
    except _NoWeights:
        raise
    except Exception as error:  # open_clip, timm, transformers and torch raise any
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"open_clip model {name!r} cannot be loaded ({reason})") from error
    model = model.to(accelerator.device).eval()
    return OpenClipEmbedder(model, tokenizer, accelerator, batch_size, num_workers, name=called, preprocess=preprocess)


class _NoWeights(UserError):
    """The name of a model has no weights beside it."""


@contextmanager
def no_code_of_models() -> Iterator[None]:
    """Have transformers run no code that a model brings, whatever the model's own files allow, and ask nobody."""
    from transformers import dynamic_module_utils as transformers_code

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise UserError("it brings code of its own, which is never run")

    before = transformers_code.get_class_in_module, transformers_code.TIME_OUT_REMOTE_CODE
    transformers_code.get_class_in_module, transformers_code.TIME_OUT_REMOTE_CODE = refuse, 0
    try:
        yield
    finally:
        transformers_code.get_class_in_module, transformers_code.TIME_OUT_REMOTE_CODE = before


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

    def pooled_features(self, **columns: torch.Tensor) -> torch.Tensor:
        tower = _without_projection(self.model.visual)
        if tower is None:
            raise UserError(
                f"{self.name} has a {type(self.model.visual).__name__}, whose features before its projection are not "
                "known; use embeddings, or a model with a ViT"
            )
        return tower(columns["image"])

    def tokens(self, texts: list[str]) -> torch.Tensor:
        return self.tokenizer(texts)

    def text_features(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(batch)


def _preprocessed(preprocess: Callable[[Image.Image], torch.Tensor], encoded: bytes, row: int) -> dict[str, np.ndarray]:
    return {"image": preprocess(rgb_image(encoded)).numpy()}


def _without_projection(visual: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return what computes an image tower's features before their projection with the weights of `visual`, which stays
    as it is; None for a tower whose projection is not known."""
    if isinstance(getattr(visual, "proj", None), torch.nn.Parameter):
        # A copy of the module's dictionaries, not of its weights.
        tower = copy.copy(visual)
        tower._parameters = {**visual._parameters, "proj": None}
        return tower
    if not hasattr(visual, "trunk"):
        return None
    # timm's: the projection is a layer of the head, or the trunk's own classifier, or there is none.
    pools = [layer for name, layer in visual.head.named_children() if name not in ("drop", "proj", "mlp")]
    head = torch.nn.Sequential(*pools)
    return lambda images: head(visual.trunk.forward_head(visual.trunk.forward_features(images), pre_logits=True))
