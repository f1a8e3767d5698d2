"""Convert a checkpoint of the original JAX FLIP to a model folder with its processor and card.

A checkpoint is a folder `checkpoint_N` with a zarr v2 array `target.<dotted name>` per parameter. JAX is not needed.
"""

import gzip
import io
import json
import math
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from fsspec import FSMap
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.zip import ZipFileSystem
from transformers import PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from flipscale.data.tokenizers import bert_tokenizer
from flipscale.hub.card import card_text
from flipscale.hub.export import build_processor, export_model
from flipscale.hub.loading import check_shapes
from flipscale.io.atomic import write_text
from flipscale.io.digests import check_weight
from flipscale.io.errors import UserError
from flipscale.io.progress import each
from flipscale.model import FlipConfig, FlipModel
from flipscale.model.modeling_flip import sincos_positions

# Longest .zarray, and most numbers of an array; the largest of FLIP's H/14 has 39 million.
_META_BYTES, _MOST_NUMBERS = 1 << 16, 1 << 30
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


class StoredArray:
    """A parameter in the checkpoint: `shape` is known at once, `np.asarray` reads the values (fp32). Raise UserError if
    the array is damaged, or in a format that the original does not write."""

    def __init__(self, name: str, files: FSMap, folder: str):
        self._name, self._files, self._folder = name, files, folder
        try:
            self._meta = meta = json.loads(self._read(".zarray", _META_BYTES))
            kind = (meta["compressor"] or {"id": None})["id"]
            form = f"zarr {meta['zarr_format']}, compressor {kind}, order {meta['order']}, filters {meta['filters']}"
            sizes = [*zip(meta["shape"], meta["chunks"], strict=True)]
            fits = all(type(length) is type(chunk) is int and 1 <= chunk <= length for length, chunk in sizes)
            if not fits or math.prod(meta["shape"]) > _MOST_NUMBERS or np.dtype(str(meta["dtype"])).kind != "f":
                raise ValueError(f"shape {meta['shape']}, chunks {meta['chunks']}, dtype {meta['dtype']}")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise UserError(f"array {name} has a damaged .zarray ({error!r:.300}); download it again") from error
        if form not in (f"zarr 2, compressor {known}, order C, filters None" for known in ("gzip", None)):
            raise UserError(f"array {name} is stored as {form}; the original writes zarr 2, gzip, order C, no filters")
        self.shape: tuple[int, ...] = tuple(meta["shape"])

    def _read(self, name: str, most: int) -> bytes:
        """Return the content of a file of at most `most` bytes. Nothing larger is unpacked."""
        key = f"{self._folder}/{name}"
        about = self._files.fs.info(self._files._key_to_str(key))
        if about["type"] != "file" or about["size"] > most:
            raise ValueError(f"{name} is a {about['type']} of {about['size']:,} bytes; expected at most {most:,}")
        return self._files[key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        chunks, array = self._meta["chunks"], np.empty(self.shape, np.float32)
        counts = [math.ceil(length / chunk) for length, chunk in zip(self.shape, chunks, strict=True)]
        try:
            for position in np.ndindex(*counts):
                name = self._meta.get("dimension_separator", ".").join(map(str, position))
                size = math.prod(chunks) * np.dtype(self._meta["dtype"]).itemsize
                content = self._read(name, 2 * size + _META_BYTES)
                if self._meta["compressor"]:
                    content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(size + 1)
                begins = [number * chunk for number, chunk in zip(position, chunks, strict=True)]
                part = array[tuple(slice(begin, begin + chunk) for begin, chunk in zip(begins, chunks, strict=True))]
                # A chunk at the edge is stored at full size, padded.
                stored = np.frombuffer(content, self._meta["dtype"]).reshape(chunks)
                part[...] = stored[tuple(map(slice, part.shape))]
        except (KeyError, ValueError, EOFError, OSError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"array {self._name} is damaged ({error!r}); download the checkpoint again") from error
        return array if dtype is None else array.astype(dtype, copy=False)


Arrays = Mapping[str, StoredArray]


def open_flip_checkpoint(path: Path) -> Arrays:
    """Return all parameters of a checkpoint by the original's names (`img_encoder/cls`), without reading their values.

    `path` is the folder `checkpoint_N`, or a folder or zip that contains it at any depth. Raise UserError if there is
    no checkpoint or more than one, or as `StoredArray`.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; name a checkpoint_N folder of the original FLIP, or its zip")
    try:
        files = ZipFileSystem(str(path)).get_mapper("") if path.is_file() else LocalFileSystem().get_mapper(str(path))
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is not a checkpoint of the original: not a zip, or cut short ({error})") from error
    places = [PurePosixPath(name).parent for name in files if name.endswith("/.zarray")]
    arrays = [place for place in places if place.name.startswith("target.")]  # the others are of the optimiser
    folders = sorted({str(array.parent) for array in arrays})
    if len(folders) != 1:
        found = ", ".join(folders) or "no target.* folder in it"
        raise UserError(f"{path} has {len(folders)} checkpoints of FLIP ({found}); name one checkpoint_N, or its zip")
    names = {array: array.name.removeprefix("target.").replace(".", "/") for array in arrays}
    return {name: StoredArray(name, files, str(array)) for array, name in names.items()}


def convert_flip_checkpoint(
    src: Path | str,
    dst: Path | str,
    size: str | None = None,
    image_heads: int | None = None,
    text_heads: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> FlipModel:
    """Convert the checkpoint `src` to the model folder `dst`, with a card for its licence, and return the model.

    All shapes are checked first. Then values are read one array at a time, so that memory holds the model once. The
    folder has a processor if a tokenizer is given or, for a named size, if the original's can be downloaded. Raise
    UserError if the heads, arrays or positions fit no FLIP model; see `open_flip_checkpoint` and `build_processor`.

    Args:
        src: see `open_flip_checkpoint`.
        size: model size: b16, l16 or h14. The arrays lack the numbers of heads, so this or both numbers are needed.
    """
    arrays = open_flip_checkpoint(Path(src))
    config = _config(arrays, size, image_heads, text_heads)
    _check_arrays(arrays, config, size)
    with no_init_weights():
        model = FlipModel(config)
    parameters = model.state_dict()
    _check_positions(np.asarray(arrays[_POSITIONS]), config)
    for name in each([name for name in arrays if name != _POSITIONS], "reading", "arrays"):
        stored = torch.from_numpy(np.asarray(arrays[name]))
        check_weight(name, stored)
        parameters[our_name(name)].copy_(our_layout(name, stored))
    model.eval()
    if tokenizer is None and size is not None:
        try:
            tokenizer = bert_tokenizer("google-bert/bert-base-uncased")
        except ValueError as error:
            warnings.warn(f"the model is saved without a processor: {error}", stacklevel=2)
    processor = build_processor(config, tokenizer) if tokenizer is not None else None
    folder = export_model(model, processor, dst)
    card = card_text(
        "flip",
        name=folder.name,
        path=folder,
        parameters=model.num_parameters() / 1e6,
        vision=config.vision_config,
        length=config.text_config.max_position_embeddings,
        has_processor=processor is not None,
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


def _config(arrays: Arrays, size: str | None, image_heads: int | None, text_heads: int | None) -> FlipConfig:
    """Return the configuration by the arrays' shapes and the heads, or by the size, which decides all but the lengths.
    `_check_arrays` compares it with the arrays."""
    patch = _shape(arrays, "img_encoder/embedding/kernel", 4)[0]
    num_patches = _shape(arrays, _POSITIONS, 3)[1] - 1
    side = math.isqrt(num_patches)
    if side**2 != num_patches:
        raise UserError(f"array {_POSITIONS} has {num_patches} patches, which are not a square")
    text = {
        "vocab_size": _shape(arrays, "txt_encoder/token_embedding/embedding", 2)[0],
        "max_position_embeddings": _shape(arrays, "txt_encoder/posembed_encoder/pos_embedding", 3)[1],
    }
    if size is not None:
        if image_heads is not None or text_heads is not None:
            raise UserError(f"size is {size} and heads are given too; use one of them: the size decides the heads")
        patch = FlipConfig.from_size(size).vision_config.patch_size
        return FlipConfig.from_size(size, {"image_size": side * patch}, text)
    if image_heads is None or text_heads is None:
        raise UserError(f"image_heads is {image_heads}, text_heads is {text_heads}; give size or both numbers of heads")
    return FlipConfig(
        vision_config={
            **_tower(arrays, "img_encoder", image_heads),
            "image_size": side * patch,
            "patch_size": patch,
        },
        text_config={**text, **_tower(arrays, "txt_encoder", text_heads)},
        projection_dim=_shape(arrays, "img_mlp1/kernel", 2)[1],
    )


def _tower(arrays: Arrays, encoder: str, heads: int) -> dict[str, int]:
    """Return the configuration fields that both towers share, from the shapes of one tower's arrays."""
    width, mlp = _shape(arrays, f"{encoder}/Transformer/encoderblock_00/MlpBlock_0/Dense_0/kernel", 2)
    blocks = {name.split("/")[2] for name in arrays if name.startswith(f"{encoder}/Transformer/encoderblock_")}
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": heads,
    }


def _shape(arrays: Arrays, name: str, num_dimensions: int) -> tuple[int, ...]:
    if name not in arrays:
        raise UserError(f"array {name} is missing from the checkpoint; a FLIP model needs it")
    if len(arrays[name].shape) != num_dimensions:
        raise UserError(f"array {name} has shape {arrays[name].shape}; expected {num_dimensions} dimensions")
    return arrays[name].shape


def _check_arrays(arrays: Arrays, config: FlipConfig, size: str | None) -> None:
    """Raise UserError unless the arrays are the parameters of a model of `config`, of a named size or of none."""
    stored = {name: torch.empty(array.shape, device="meta") for name, array in arrays.items() if name != _POSITIONS}
    shapes = {our_name(name): list(our_layout(name, tensor).shape) for name, tensor in stored.items()}
    try:
        check_shapes(config, shapes, FlipModel)
    except UserError as error:
        named = f"size is {size}, and " if size else ""
        raise UserError(f"{named}the arrays of the checkpoint, in our names, are of another model: {error}") from None


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
