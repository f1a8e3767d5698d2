"""The original JAX FLIP's checkpoints, read without JAX and turned into a `FlipModel`.

A checkpoint is a folder `checkpoint_N`: an index (msgpack) named `checkpoint` and, for each parameter, a zarr v2 array
in a folder `target.<dotted name>`.
"""

import gzip
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.initialization import no_init_weights

from flipscale.hub.export import export_model
from flipscale.model import SIZES, FlipConfig, FlipModel
from flipscale.model.modeling_flip import sincos_positions

# The sizes that the original has configurations of, and so can have left checkpoints of.
ORIGINAL_SIZES = ("b16", "l16", "h14")

_VERSION = 3
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


def read_flip_checkpoint(path: Path | str) -> dict[str, np.ndarray]:
    """Every parameter of the checkpoint, fp32, by the original's name (`img_encoder/cls`); optimiser state is skipped.

    Args:
        path: the folder `checkpoint_N`, a folder that holds it at any depth, or the file `checkpoint` in it.

    Raises:
        ValueError: no checkpoint there or several, an unknown version, an array missing, cut short or in a form that
            the original does not write.
    """
    folder = _checkpoint_folder(Path(path))
    return {name: _read_zarr(name, folder / array) for name, array in _array_folders(folder).items()}


def build_flip_model(
    arrays: dict[str, np.ndarray],
    size: str | None = None,
    image_heads: int | None = None,
    text_heads: int | None = None,
) -> FlipModel:
    """The model of the original's parameters `arrays`, in evaluation mode.

    The parameters tell every shape but not the numbers of attention heads: `size` or both of the others must.

    Args:
        size: b16, l16 or h14.

    Raises:
        ValueError: heads untold, told twice or not dividing the width; arrays that are not those of `size`, or of a
            FLIP model at all; image positions that are not the fixed sine-cosine ones.
    """
    config = _config(arrays, *_heads(size, image_heads, text_heads))
    if size is not None:
        _refuse_other_size(config, size)
    _refuse_heads(config)
    state_dict = dict(translate(name, array) for name, array in arrays.items() if name != _POSITIONS)
    _refuse_other_arrays(config, state_dict)
    _check_positions(arrays[_POSITIONS], config)
    with no_init_weights():
        model = FlipModel(config)
    model.load_state_dict(state_dict)
    return model.eval()


def convert_flip_checkpoint(
    src: Path | str,
    dst: Path | str,
    size: str | None = None,
    image_heads: int | None = None,
    text_heads: int | None = None,
) -> FlipModel:
    """The model of the checkpoint `src`, saved as the model folder `dst`.

    Takes and raises what `read_flip_checkpoint` and `build_flip_model` do.
    """
    _heads(size, image_heads, text_heads)  # told before gigabytes are read
    model = build_flip_model(read_flip_checkpoint(src), size, image_heads, text_heads)
    export_model(model, None, dst)
    return model


def translate(name: str, array: np.ndarray) -> tuple[str, torch.Tensor]:
    """Our name and layout of a parameter of the original, or of its gradient: `name` is as `img_encoder/cls`.

    Matrices are stored `[in, out]` there, the patch convolution `[row, column, in, out]`.
    """
    tensor = torch.from_numpy(array)
    if name.endswith("/kernel"):
        tensor = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.t()
    elif name == "img_encoder/cls":
        tensor = tensor.flatten()
    elif name.endswith("/pos_embedding"):
        tensor = tensor[0]
    if name in _OUTSIDE_THE_BLOCKS:
        return _OUTSIDE_THE_BLOCKS[name], tensor.contiguous()
    name = re.sub(r"/encoderblock_(\d+)/", lambda found: f"/encoder/layers/{int(found[1])}/", name)
    return ".".join(_WORDS.get(word, word) for word in name.split("/") if word != "Transformer"), tensor.contiguous()


def _checkpoint_folder(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"{path} does not exist; name a checkpoint_N folder of the original FLIP")
    if path.is_file():
        if path.name != "checkpoint":
            raise ValueError(f"{path} is not a checkpoint of the original FLIP; unpack it and name the folder")
        path = path.parent
    folders = sorted({array.parent for array in path.rglob("target.*")})
    if not folders:
        raise ValueError(f"{path} is not a checkpoint of the original FLIP: no target.* array folder is in it")
    if len(folders) > 1:
        names = ", ".join(str(folder.relative_to(path)) for folder in folders)
        raise ValueError(f"{path} holds {len(folders)} checkpoints ({names}); name one of them")
    return folders[0]


def _array_folders(folder: Path) -> dict[str, str]:
    """Parameter names and the folders of their arrays: from the index, or by listing them where msgpack is absent."""
    try:
        import msgpack
    except ImportError:
        msgpack = None
    file = folder / "checkpoint"
    if msgpack is None or not file.is_file():
        return {p.name.removeprefix("target.").replace(".", "/"): p.name for p in sorted(folder.glob("target.*"))}
    try:
        index = msgpack.unpackb(file.read_bytes(), strict_map_key=False)
        version, target = index["version"], index["optimizer"]["target"]
    except (msgpack.UnpackException, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not the index of a checkpoint of the original FLIP ({error!r})") from error
    if version != _VERSION:
        raise ValueError(f"{file} is of version {version}; only version {_VERSION}, the original FLIP's, can be read")
    return dict(_leaves(target, ()))


def _leaves(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Name and array folder of every array below `node`. Where the trainer ran (a bucket) is of no interest."""
    name = "/".join(path)
    if not isinstance(node, dict):
        raise ValueError(f"parameter {name} is not a zarr array in the checkpoint's index")
    if "driver" not in node:
        for key, child in node.items():
            yield from _leaves(child, (*path, key))
        return
    # Before tensorstore 0.1.14 the path stood beside `kvstore`.
    stored = node.get("path") or node.get("kvstore", {}).get("path")
    if not stored:
        raise ValueError(f"parameter {name} has no path in the checkpoint's index")
    yield name, Path(stored).name


def _zarr_metadata(name: str, folder: Path) -> dict[str, Any]:
    if not (folder / ".zarray").is_file():
        raise ValueError(f"array {name} is missing: {folder} has no .zarray")
    try:
        meta = json.loads((folder / ".zarray").read_text())
        compressor = (meta["compressor"] or {"id": None})["id"]
        form = f"zarr {meta['zarr_format']}, compressor {compressor}, order {meta['order']}, filters {meta['filters']}"
        meta = {"compressor": compressor, "separator": meta.get("dimension_separator", "."), **meta}
        meta |= {"compressor": compressor, "shape": tuple(meta["shape"]), "chunks": tuple(meta["chunks"])}
        meta["dtype"] = np.dtype(meta["dtype"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"array {name} is damaged: {folder / '.zarray'} cannot be read ({error!r})") from error
    if form not in (f"zarr 2, compressor {known}, order C, filters None" for known in ("gzip", None)):
        raise ValueError(
            f"array {name} is stored as {form}; the original FLIP writes zarr 2, gzip, order C, no filters"
        )
    return meta


def _read_zarr(name: str, folder: Path) -> np.ndarray:
    """A zarr v2 array, fp32."""
    meta = _zarr_metadata(name, folder)
    shape, chunks, dtype = meta["shape"], meta["chunks"], meta["dtype"]
    array = np.empty(shape, dtype)
    counts = [math.ceil(length / chunk) for length, chunk in zip(shape, chunks, strict=True)]
    for position in itertools.product(*map(range, counts)):
        file = folder / (meta["separator"].join(map(str, position)) or "0")
        content = _read_chunk(name, file, meta["compressor"], math.prod(chunks) * dtype.itemsize)
        where = tuple(slice(p * chunk, (p + 1) * chunk) for p, chunk in zip(position, chunks, strict=True))
        part = array[where]
        # A chunk at the edge is stored whole, the rest of it filled up.
        part[...] = np.frombuffer(content, dtype).reshape(chunks)[tuple(map(slice, part.shape))]
    return array.astype(np.float32, copy=False)


def _read_chunk(name: str, file: Path, compressor: str | None, num_bytes: int) -> bytes:
    if not file.is_file():
        raise ValueError(f"array {name} is incomplete: {file} is missing")
    content = file.read_bytes()
    if compressor == "gzip":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"array {name} is damaged: {file} is cut short or not gzip ({error})") from error
    if len(content) != num_bytes:
        raise ValueError(f"array {name} is damaged: {file} holds {len(content)} bytes, not {num_bytes}")
    return content


def _heads(size: str | None, image_heads: int | None, text_heads: int | None) -> tuple[int, int]:
    """The heads of both towers, told in one of two ways."""
    if size is None:
        if image_heads is None or text_heads is None:
            raise ValueError(
                f"image_heads is {image_heads}, text_heads is {text_heads}, and a checkpoint does not tell them; give "
                f"size ({', '.join(ORIGINAL_SIZES)}) or both"
            )
        return image_heads, text_heads
    if size not in ORIGINAL_SIZES:
        raise ValueError(f"size {size!r} is none of the original FLIP's; use one of {', '.join(ORIGINAL_SIZES)}")
    if image_heads is not None or text_heads is not None:
        raise ValueError(f"size {size} and heads are both given; size says the heads already: leave one of them out")
    vision, text, _ = SIZES[size]
    return vision["num_attention_heads"], text["num_attention_heads"]


def _shape(arrays: dict[str, np.ndarray], name: str) -> tuple[int, ...]:
    if name not in arrays:
        raise ValueError(f"array {name} is missing from the checkpoint, which cannot be a FLIP model without it")
    return arrays[name].shape


def _tower(arrays: dict[str, np.ndarray], encoder: str, heads: int) -> dict[str, int]:
    """The fields that both towers have, from the shapes of one tower's arrays."""
    width, mlp = _shape(arrays, f"{encoder}/Transformer/encoderblock_00/MlpBlock_0/Dense_0/kernel")
    pattern = re.compile(rf"{encoder}/Transformer/encoderblock_(\d+)/")
    numbers = [int(found[1]) for name in arrays if (found := pattern.match(name))]
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": max(numbers) + 1,
        "num_attention_heads": heads,
    }


def _config(arrays: dict[str, np.ndarray], image_heads: int, text_heads: int) -> FlipConfig:
    patch = _shape(arrays, "img_encoder/embedding/kernel")[0]
    num_patches = _shape(arrays, _POSITIONS)[1] - 1
    side = math.isqrt(num_patches)
    if side**2 != num_patches:
        raise ValueError(f"array {_POSITIONS} has {num_patches} patches, which are not a square")
    vision = {"image_size": side * patch, "patch_size": patch}
    text = {
        "vocab_size": _shape(arrays, "txt_encoder/token_embedding/embedding")[0],
        "max_position_embeddings": _shape(arrays, "txt_encoder/posembed_encoder/pos_embedding")[1],
    }
    return FlipConfig(
        vision_config={**_tower(arrays, "img_encoder", image_heads), **vision},
        text_config={**_tower(arrays, "txt_encoder", text_heads), **text},
        projection_dim=_shape(arrays, "img_mlp1/kernel")[1],
    )


def _refuse_other_size(config: FlipConfig, size: str) -> None:
    """Raises where the shapes differ from `size`'s; image size, vocabulary and caption length are free."""
    expected = FlipConfig.from_size(size)
    differences = [
        f"{tower.removesuffix('_config')} {field} {getattr(getattr(config, tower), field)}, not {wanted}"
        for tower, fields in (("vision_config", ("patch_size", *SIZES[size][0])), ("text_config", SIZES[size][1]))
        for field in fields
        if (wanted := getattr(getattr(expected, tower), field)) != getattr(getattr(config, tower), field)
    ]
    if config.projection_dim != expected.projection_dim:
        differences.append(f"projection_dim {config.projection_dim}, not {expected.projection_dim}")
    if differences:
        raise ValueError(f"the checkpoint is not of size {size}: it has {'; '.join(differences)}")


def _refuse_heads(config: FlipConfig) -> None:
    for name, tower in (("image", config.vision_config), ("text", config.text_config)):
        heads, width = tower.num_attention_heads, tower.hidden_size
        if heads < 1 or width % heads:
            raise ValueError(
                f"{name}_heads {heads} does not divide the {name} tower's width of {width}; look it up in the "
                "configuration that the checkpoint was trained with"
            )


def _refuse_other_arrays(config: FlipConfig, state_dict: dict[str, torch.Tensor]) -> None:
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in FlipModel(config).state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state_dict.items()}
    wrong = [f"{n} is {found.get(n, 'missing')}, not {shape}" for n, shape in expected.items() if found.get(n) != shape]
    wrong += [f"{name} is unknown" for name in found if name not in expected]
    if wrong:
        raise ValueError(f"the checkpoint's arrays, in our names, are not a FLIP model's: {'; '.join(wrong[:4])}")


def _check_positions(stored: np.ndarray, config: FlipConfig) -> None:
    """Raises where the stored image positions are not ours. Row 0, the class token's, is never used."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    difference = np.abs(stored[0, 1:] - sincos_positions(vision.hidden_size, side, side).numpy()).max()
    if not difference < 1e-5:
        raise ValueError(
            f"array {_POSITIONS} is not the fixed 2-D sine-cosine table (largest difference {difference:.3g}); a model "
            "with learned image positions cannot be converted"
        )
