"""Convert a checkpoint of the original JAX FLIP to a model folder with its processor and card."""

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from flipscale.data.tokenizers import bert_tokenizer
from flipscale.hub.export import build_processor, export_model
from flipscale.hub.t5x import StoredArray, open_flip_checkpoint
from flipscale.io.atomic import write_text
from flipscale.io.digests import check_weight
from flipscale.io.errors import UserError
from flipscale.io.progress import each
from flipscale.model import SIZES, FlipConfig, FlipModel
from flipscale.model.modeling_flip import sincos_positions

Arrays = Mapping[str, np.ndarray | StoredArray]

# Sizes with a configuration in the original.
ORIGINAL_SIZES = ("b16", "l16", "h14")

_POSITIONS = "img_encoder/posembed_encoder/pos_embedding"
_WORDS = {
    "img_encoder": "vision_model",
    "txt_encoder": "text_model",
    "encoder_norm": "final_layer_norm",
    "LayerNorm_0": "layer_norm1",
    "LayerNorm_1": "layer_norm2",
    "MultiHeadDotProductAttention_0": "self_attn",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "out_proj",
    "MlpBlock_0": "mlp",
    "Dense_0": "fc1",
    "Dense_1": "fc2",
    "scale": "weight",
    "kernel": "weight",
}
_OUTSIDE_THE_BLOCKS = {
    "img_encoder/cls": "vision_model.embeddings.class_embedding",
    "img_encoder/embedding/kernel": "vision_model.embeddings.patch_embedding.weight",
    "img_encoder/embedding/bias": "vision_model.embeddings.patch_embedding.bias",
    "txt_encoder/token_embedding/embedding": "text_model.embeddings.token_embedding.weight",
    "txt_encoder/posembed_encoder/pos_embedding": "text_model.embeddings.position_embedding.weight",
    "img_mlp1/kernel": "image_projection.weight",
    "txt_mlp1/kernel": "text_projection.weight",
    "logit_scale": "logit_scale",
}


_CARD = """---
license: cc-by-nc-4.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags:
- flip
- clip
---

# {name}

Weights of the original FLIP ([arXiv 2212.00794](https://arxiv.org/abs/2212.00794),
[facebookresearch/flip](https://github.com/facebookresearch/flip)), converted from its JAX checkpoint without changes:
{parameters:.1f} M parameters, {image_size}-pixel images in patches of {patch_size}, captions of {length} ids.

```python
{use}
```

With flipscale installed, `from flipscale.model import FlipModel` needs no `trust_remote_code`.

**Licence.** The original's code and weights are [CC-BY-NC 4.0](https://creativecommons.org/licenses/by-nc/4.0/), which
excludes commercial use. This copy has the same licence.

**Limits.** The checkpoint names neither its training data nor its results; the original's README describes the released
checkpoints. They learned from pictures and texts of the web and carry the biases of these.
"""
_USE_PIPELINE = """from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="{path}", trust_remote_code=True)
classify("image.png", candidate_labels=["a red apple", "a bicycle"], hypothesis_template="{{}}")"""
_USE_MODEL = """from transformers import AutoModel  # this copy has no tokenizer

model = AutoModel.from_pretrained("{path}", trust_remote_code=True)"""


def build_flip_model(
    arrays: Arrays, size: str | None = None, image_heads: int | None = None, text_heads: int | None = None
) -> FlipModel:
    """Return the model of the original's parameters, in evaluation mode.

    All shapes are checked first. Then values are read one array at a time, so that memory holds the model once. The
    arrays lack the numbers of attention heads, so `size` or both `image_heads` and `text_heads` are needed.

    Args:
        arrays: parameters by the original's names.
        size: model size: b16, l16 or h14.

    Raises:
        UserError: the heads, the arrays or the image positions do not fit a FLIP model.
    """
    heads = _heads(size, image_heads, text_heads)
    config = _config(arrays, 1, 1)
    if size is not None:
        _check_size(config, size)
    towers = (("image", config.vision_config), ("text", config.text_config))
    for (name, tower), count in zip(towers, heads, strict=True):
        if count < 1 or tower.hidden_size % count:
            raise UserError(
                f"{name}_heads is {count}; expected a divisor of the {name} tower's width {tower.hidden_size}. Fix: "
                "look it up in the training configuration of the checkpoint"
            )
    config = _config(arrays, *heads)
    _check_arrays(config, arrays)
    _check_positions(np.asarray(arrays[_POSITIONS]), config)
    with no_init_weights():
        model = FlipModel(config)
    parameters = model.state_dict()
    for name in each([name for name in arrays if name != _POSITIONS], "reading", "arrays"):
        stored = torch.from_numpy(np.asarray(arrays[name]))
        check_weight(name, stored)
        parameters[our_name(name)].copy_(our_layout(name, stored))
    return model.eval()


def convert_flip_checkpoint(
    src: Path | str,
    dst: Path | str,
    size: str | None = None,
    image_heads: int | None = None,
    text_heads: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> FlipModel:
    """Convert the checkpoint `src` to the model folder `dst`, with a card for its licence, and return the model.

    The folder has a processor if a tokenizer is given or, for a named size, if the original's can be downloaded. The
    other arguments are those of `open_flip_checkpoint` and `build_flip_model`.

    Raises:
        UserError: see `open_flip_checkpoint`, `build_flip_model` and `build_processor`.
    """
    _heads(size, image_heads, text_heads)  # raises early, before the checkpoint is read
    model = build_flip_model(open_flip_checkpoint(src), size, image_heads, text_heads)
    if tokenizer is None and size is not None:
        try:
            tokenizer = bert_tokenizer("google-bert/bert-base-uncased")
        except ValueError as error:
            warnings.warn(f"the model is saved without a processor: {error}", stacklevel=2)
    processor = build_processor(model.config, tokenizer) if tokenizer is not None else None
    folder = export_model(model, processor, dst)
    vision, text = model.config.vision_config, model.config.text_config
    card = _CARD.format(
        name=folder.name,
        parameters=model.num_parameters() / 1e6,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        length=text.max_position_embeddings,
        use=(_USE_MODEL if processor is None else _USE_PIPELINE).format(path=folder),
    )
    write_text(folder / "README.md", card)
    return model


def our_name(name: str) -> str:
    """Return our name of the original's parameter: `vision_model.embeddings.class_embedding` for `img_encoder/cls`."""
    if name in _OUTSIDE_THE_BLOCKS:
        return _OUTSIDE_THE_BLOCKS[name]
    name = re.sub(r"/encoderblock_(\d+)/", lambda match: f"/encoder/layers/{int(match[1])}/", name)
    return ".".join(_WORDS.get(word, word) for word in name.split("/") if word != "Transformer")


def our_layout(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of the original's parameter `name`, or its gradient, with dimensions in our order.

    The original stores matrices as `[in, out]` and the patch convolution as `[row, column, in, out]`.
    """
    if name.endswith("/kernel"):
        return tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.transpose(0, -1)
    if name == "img_encoder/cls":
        return tensor.flatten()
    return tensor[0] if name.endswith("/pos_embedding") else tensor


def _heads(size: str | None, image_heads: int | None, text_heads: int | None) -> tuple[int, int]:
    """Return the attention heads of both towers."""
    if size is None:
        if image_heads is None or text_heads is None:
            raise UserError(
                f"image_heads is {image_heads}, text_heads is {text_heads}, and the checkpoint lacks them; give size "
                f"({', '.join(ORIGINAL_SIZES)}) or both"
            )
        return image_heads, text_heads
    if size not in ORIGINAL_SIZES:
        raise UserError(f"size is {size!r}; expected a size of the original FLIP: {', '.join(ORIGINAL_SIZES)}")
    if image_heads is not None or text_heads is not None:
        raise UserError(f"size is {size} and heads are given too; use one of them, because the size decides the heads")
    vision, text, _ = SIZES[size]
    return vision["num_attention_heads"], text["num_attention_heads"]


def _shape(arrays: Arrays, name: str, num_dimensions: int) -> tuple[int, ...]:
    if name not in arrays:
        raise UserError(f"array {name} is missing from the checkpoint; a FLIP model needs it")
    if len(arrays[name].shape) != num_dimensions:
        raise UserError(f"array {name} has shape {arrays[name].shape}; expected {num_dimensions} dimensions")
    return arrays[name].shape


def _tower(arrays: Arrays, encoder: str, heads: int) -> dict[str, int]:
    """Return the configuration fields that both towers share, from the shapes of one tower's arrays."""
    width, mlp = _shape(arrays, f"{encoder}/Transformer/encoderblock_00/MlpBlock_0/Dense_0/kernel", 2)
    pattern = re.compile(rf"{encoder}/Transformer/encoderblock_(\d+)/")
    numbers = [int(match[1]) for name in arrays if (match := pattern.match(name))]
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": max(numbers) + 1,
        "num_attention_heads": heads,
    }


def _config(arrays: Arrays, image_heads: int, text_heads: int) -> FlipConfig:
    patch = _shape(arrays, "img_encoder/embedding/kernel", 4)[0]
    num_patches = _shape(arrays, _POSITIONS, 3)[1] - 1
    side = math.isqrt(num_patches)
    if side**2 != num_patches:
        raise UserError(f"array {_POSITIONS} has {num_patches} patches, which are not a square")
    vision = {"image_size": side * patch, "patch_size": patch}
    text = {
        "vocab_size": _shape(arrays, "txt_encoder/token_embedding/embedding", 2)[0],
        "max_position_embeddings": _shape(arrays, "txt_encoder/posembed_encoder/pos_embedding", 3)[1],
    }
    return FlipConfig(
        vision_config={**_tower(arrays, "img_encoder", image_heads), **vision},
        text_config={**_tower(arrays, "txt_encoder", text_heads), **text},
        projection_dim=_shape(arrays, "img_mlp1/kernel", 2)[1],
    )


def _check_size(config: FlipConfig, size: str) -> None:
    """Raise unless the shapes fit `size`; image size, vocabulary and caption length may differ."""
    expected = FlipConfig.from_size(size)
    differences = [
        f"{tower.removesuffix('_config')} {field} {getattr(getattr(config, tower), field)}, not {wanted}"
        for tower, fields in (("vision_config", ("patch_size", *SIZES[size][0])), ("text_config", SIZES[size][1]))
        for field in fields
        if field != "num_attention_heads"  # the size decides them
        and (wanted := getattr(getattr(expected, tower), field)) != getattr(getattr(config, tower), field)
    ]
    if config.projection_dim != expected.projection_dim:
        differences.append(f"projection_dim {config.projection_dim}, not {expected.projection_dim}")
    if differences:
        raise UserError(f"size is {size}, but the checkpoint has {'; '.join(differences)}")


def _check_arrays(config: FlipConfig, arrays: Arrays) -> None:
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in FlipModel(config).state_dict().items()}
        stored = {name: torch.empty(array.shape) for name, array in arrays.items() if name != _POSITIONS}
    shapes = {our_name(name): tuple(our_layout(name, tensor).shape) for name, tensor in stored.items()}
    wrong = [
        f"{n} is {shapes.get(n, 'missing')}, not {shape}" for n, shape in expected.items() if shapes.get(n) != shape
    ]
    wrong += [f"{name} is unknown" for name in shapes if name not in expected]
    if wrong:
        raise UserError(f"the checkpoint's arrays, in our names, do not fit a FLIP model: {'; '.join(wrong[:4])}")


def _check_positions(stored: np.ndarray, config: FlipConfig) -> None:
    """Raise unless the stored image positions equal ours. Row 0 belongs to the class token and is never used."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    difference = np.abs(stored[0, 1:] - sincos_positions(vision.hidden_size, side, side).numpy()).max()
    if not difference < 1e-5:
        raise UserError(
            f"array {_POSITIONS} differs from the fixed 2-D sine-cosine table by up to {difference:.3g}; a model with "
            "learned image positions cannot be converted"
        )
