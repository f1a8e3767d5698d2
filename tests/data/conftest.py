"""Made-up pictures and shards, the training pairs of shards, and comparisons of their batches."""

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import add_member
from PIL import Image
from transformers import AutoTokenizer

from flipscale.data.batches import BatchDataset
from flipscale.data.decode import DRAWS_PER_CROP, decode_box
from flipscale.data.pairs import InputShape, PairDataset
from flipscale.data.randomness import keyed_uniform
from flipscale.data.samples import Source
from flipscale.data.sources.opening import open_source
from flipscale.data.sources.tar import TarSource
from flipscale.recipe.data import DataRecipe

SHAPE = InputShape(image_size=32, patch_size=8, max_tokens=8)
Batches = list[dict[str, torch.Tensor]]


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return a picture as a file of Pillow's format `kind`."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a shard of files by name, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            add_member(tar, name, content)


def pair_dataset(
    data: Path | Source | DataRecipe,
    tokenizer_dir: Path,
    mask_ratio: float = 0.75,
    kind: Callable[..., Any] = PairDataset,
    options: dict[str, Any] | None = None,
    **fields: Any,
) -> Any:
    """Return the pairs of a folder of shards, a source or a recipe, in batches of 24.

    Args:
        kind: a class of data sets, or an objective's `dataset`.
        options: further fields of `BatchInputs`.
        fields: fields of the recipe's section `data`.
    """
    if isinstance(data, DataRecipe):
        recipe, source = data, open_source(data)
    else:
        recipe = DataRecipe(**{"global_batch_size": 24, "shards_per_block": 2, "num_workers": 0, **fields})
        source = data if isinstance(data, Source) else TarSource(str(data))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return kind(source, tokenizer, recipe, SHAPE, 5, mask_ratio, **(options or {}))


def crops_of(data: BatchDataset, where: np.ndarray) -> list[np.ndarray]:
    """Return the crops of positions as their images show them, before any change of colour."""
    draws, size = keyed_uniform(data.given.seed, "crop", where, DRAWS_PER_CROP), data.given.shape.image_size
    places = zip(*(part.tolist() for part in data.order.locate(where)), strict=True)
    encoded = [data.source.read(*place).image for place in places]
    return [decode_box(*each, size, data.recipe.crop_scale) for each in zip(encoded, draws, strict=True)]


def assert_equal(ours: Batches, theirs: Batches) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
