"""Evaluate the dual encoders of transformers, any CLIP or SigLIP, as ours are: with their own processors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.images import Decoder, rgb_image

PREFIX = "hf:"


def transformers_embedder(name: str, accelerator: Accelerator, batch_size: int = 256, num_workers: int = 0) -> Embedder:
    """Return the embedder of a model that transformers' `AutoModel` loads, in fp32. None of the folder's code is run.

    Args:
        name: a Hub name, such as `openai/clip-vit-base-patch32`, or a folder.

    Raises:
        ValueError: there is no such model, it lacks weights, it is no dual encoder, or it has no processor.
    """
    from transformers import AutoModel, AutoProcessor

    try:
        model, report = AutoModel.from_pretrained(
            name, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{PREFIX}{name} cannot be loaded ({_first_line(error)})") from error
    for method in ("get_image_features", "get_text_features"):
        if not hasattr(model, method):
            raise ValueError(
                f"{PREFIX}{name} is a {type(model).__name__}, which has no {method}; name a dual encoder of images and "
                "texts, such as a CLIP or a SigLIP"
            )
    if report["missing_keys"]:
        raise ValueError(
            f"{PREFIX}{name} lacks {len(report['missing_keys'])} of the weights of its config, such as "
            f"{min(report['missing_keys'])}; download it again"
        )
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{PREFIX}{name} has no processor that can be read ({_first_line(error)})") from error
    for part in ("image_processor", "tokenizer"):
        if getattr(processor, part, None) is None:
            raise ValueError(
                f"{PREFIX}{name} has no {part}; it needs preprocessor_config.json and the files of its tokenizer"
            )
    model = model.to(accelerator.device).eval()
    return TransformersEmbedder(model, processor, accelerator, batch_size, num_workers, name=f"{PREFIX}{name}")


@dataclass(frozen=True)
class TransformersEmbedder(Embedder):
    """An embedder of a model of transformers; its `tokenizer` is the whole processor."""

    @property
    def image_size(self) -> int:
        """Pixels along each side; of a SigLIP2 that takes any shape, of a square of as many patches."""
        vision = self.model.config.vision_config
        size = getattr(vision, "image_size", None) or round(vision.num_patches**0.5) * vision.patch_size
        return size if isinstance(size, int) else size[0]

    def decoder(self) -> Decoder:
        return partial(_processed, self.tokenizer.image_processor)

    def image_features(self, **columns: torch.Tensor) -> torch.Tensor:
        return _pooled(self.model.get_image_features(**columns))

    def pooled_features(self, **columns: torch.Tensor) -> torch.Tensor:
        """Return what the image tower pools. SigLIP projects nothing after that, so there it is the embedding."""
        tower = getattr(self.model, "vision_model", None)
        if tower is None:
            raise ValueError(
                f"{self.name} is a {type(self.model).__name__} without a vision_model, so what it computes before its "
                "projection is not known; use embeddings, or a CLIP or SigLIP"
            )
        return _pooled(tower(**columns))

    def tokens(self, texts: list[str]) -> Any:
        """Return what the tokenizer makes of the texts, `(texts, length)` each. SigLIP was trained on padded texts that
        it pays attention to, so its length is the same for all."""
        config = self.model.config
        padding = "max_length" if "siglip" in config.model_type else True
        length = config.text_config.max_position_embeddings
        return self.tokenizer.tokenizer(texts, padding=padding, truncation=True, max_length=length, return_tensors="pt")

    def text_features(self, batch: Any) -> torch.Tensor:
        return _pooled(self.model.get_text_features(**batch))


def _pooled(output: Any) -> torch.Tensor:
    """Return the features in what a model returns, a tensor in some versions and an output in others."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _processed(image_processor: Callable[..., Any], encoded: bytes, row: int) -> dict[str, np.ndarray]:
    columns = image_processor(images=[rgb_image(encoded)], return_tensors="np")
    return {name: np.ascontiguousarray(column[0]) for name, column in columns.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
