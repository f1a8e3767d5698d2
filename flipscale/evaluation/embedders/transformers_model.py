"""Evaluate the dual encoders of transformers, any CLIP or SigLIP, as ours are: with their own processors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from flipscale.evaluation.embedders.open_clip import no_code_of_models
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.images import Decoder, rgb_image
from flipscale.io.errors import UserError
from flipscale.io.model_folder import check_texts, fetch_folder, read_header, read_object

PREFIX = "hf:"
# Fields of a configuration that name kernels and files to load.
_LEADING = ("_attn_implementation", "attn_implementation", "experts_implementation", "transformers_weights")


def transformers_embedder(name: str, accelerator: Accelerator, batch_size: int = 256, num_workers: int = 0) -> Embedder:
    """Return the embedder of a model that transformers' `AutoModel` loads, in fp32. None of the folder's code is run.

    Args:
        name: a Hub name, such as `openai/clip-vit-base-patch32`, or a folder.

    Raises:
        ValueError: there is no such model, it lacks weights, it is no dual encoder, or it has no processor.
    """
    from transformers import AutoModel, AutoProcessor

    try:
        folder = fetch_folder(name)
        if not any(folder.glob("*.safetensors")):
            folder = fetch_folder(name, ("pytorch_model*.bin", "pytorch_model.bin.index.json"))
        _check_foreign(folder)
        with no_code_of_models():
            model, report = AutoModel.from_pretrained(
                folder, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # transformers raises any
        kind = OSError if isinstance(error, OSError) and not Path(name).is_dir() else UserError
        raise kind(f"{PREFIX}{name} cannot be loaded ({_first_line(error)})") from error
    for method in ("get_image_features", "get_text_features"):
        if not hasattr(model, method):
            raise UserError(
                f"{PREFIX}{name} is a {type(model).__name__}, which has no {method}; name a dual encoder of images and "
                "texts, such as a CLIP or a SigLIP"
            )
    if report["missing_keys"]:
        raise UserError(
            f"{PREFIX}{name} lacks {len(report['missing_keys'])} of the weights of its config, such as "
            f"{min(report['missing_keys'])}; download it again"
        )
    try:
        with no_code_of_models():
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of its files: any
        raise UserError(f"{PREFIX}{name} has no processor that can be read ({_first_line(error)})") from error
    for part in ("image_processor", "tokenizer"):
        if getattr(processor, part, None) is None:
            raise UserError(
                f"{PREFIX}{name} has no {part}; it needs preprocessor_config.json and the files of its tokenizer"
            )
    model = model.to(accelerator.device).eval()
    return TransformersEmbedder(model, processor, accelerator, batch_size, num_workers, name=f"{PREFIX}{name}")


def _check_foreign(folder: Path) -> None:
    """Raise if a folder's files lead transformers to other files, kernels or models.

    Raises:
        ValueError: they do, or as `check_texts` and `read_header`.
    """
    check_texts(folder)
    if (folder / "adapter_config.json").exists():
        raise UserError("it is an adapter of another model; name a folder with the whole model")
    config = read_object(folder / "config.json")
    for field in _LEADING:
        if config.get(field) is not None:
            raise UserError(f"config.json sets {field}, which is not read from others; remove it")
    for file in folder.glob("*.index.json"):
        for name in set(dict(read_object(file).get("weight_map") or {}).values()):
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{file.name} names {name!r:.80}, which is no file of the folder; download it again")
    for file in folder.glob("*.safetensors"):
        read_header(file)


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
            raise UserError(
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
