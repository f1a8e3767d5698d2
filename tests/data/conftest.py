"""Training pairs of made-up shards, and comparisons of their batches."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from flipscale.data.pairs import InputShape, PairDataset
from flipscale.data.samples import Source
from flipscale.data.sources.opening import open_source
from flipscale.data.sources.tar import TarSource
from flipscale.recipe.data import DataRecipe

SHAPE = InputShape(image_size=32, patch_size=8, max_tokens=8)
Batches = list[dict[str, torch.Tensor]]


def pair_dataset(
    data: Path | Source | DataRecipe,
    tokenizer_dir: Path,
    mask_ratio: float = 0.75,
    kind: type[PairDataset] = PairDataset,
    options: dict[str, Any] | None = None,
    **fields: Any,
) -> PairDataset:
    """Return the pairs of a folder of shards, a source or a recipe, in batches of 24.

    Args:
        options: further fields of the dataset.
        fields: fields of the recipe's section `data`.
    """
    if isinstance(data, DataRecipe):
        recipe, source = data, open_source(data)
    else:
        recipe = DataRecipe(**{"global_batch_size": 24, "shards_per_block": 2, "num_workers": 0, **fields})
        source = data if isinstance(data, Source) else TarSource(str(data))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return kind(source, tokenizer, recipe, SHAPE, 5, mask_ratio, **(options or {}))


def assert_equal(ours: Batches, theirs: Batches) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
