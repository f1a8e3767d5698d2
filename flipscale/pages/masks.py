"""Training pictures with the patches that each stage shows to the image encoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from flipscale.data.pairs import InputShape
from flipscale.data.sources.opening import open_source
from flipscale.data.tokenizers import load_tokenizer
from flipscale.evaluation.test_set import kept_class_names
from flipscale.pages.page import Picture, thumbnail
from flipscale.training.recipe import Recipe
from flipscale.training.schedule import StageRecipe

_SIDE = 96


@dataclass(frozen=True)
class MaskRow:
    """Training pictures in one or more stages.

    Args:
        title: names of the stages and the share of removed patches.
        pictures: pictures with transparent patches where the mask removes them.
    """

    title: str
    pictures: list[Picture]


class _View(NamedTuple):
    """Share of patches that a stage removes, and its image size in pixels (None for the model's)."""

    mask_ratio: float
    image_size: int | None

    @property
    def words(self) -> str:
        words = f"{100 * self.mask_ratio:g} % of the patches left out" if self.mask_ratio else "whole"
        return words if self.image_size is None else f"{words}, at {self.image_size} x {self.image_size} pixels"


def mask_rows(recipe: Recipe, count: int = 6) -> list[MaskRow]:
    """Return the first `count` training pictures whole, and as each stage shows them. Equal stages share a row.

    Raises:
        UserError: the data cannot be read any more.
        OSError: a shard cannot be read.
    """
    source, shape = open_source(recipe.data), InputShape.of(recipe.model_config())
    objective = recipe.objective()
    tokenizer = load_tokenizer(recipe.data.tokenizer, shape.max_tokens) if objective.takes_text else None
    # Mixup pairs pictures, so a classifier's batch stays even.
    positions = list(range(min(count, len(source)) if tokenizer else count))

    def batch(view: _View) -> dict[str, Any]:
        size = shape.at(view.image_size)
        dataset = objective.dataset(source, tokenizer, recipe.data, size, recipe.seed, view.mask_ratio, recipe.mask)
        return dataset.__getitems__(positions)

    crops = _View(0.0, None)
    whole = batch(crops)
    captions = _captions(recipe, tokenizer, whole)
    views: dict[_View, list[StageRecipe]] = {crops: []}
    for stage in recipe.stages:
        views.setdefault(_View(stage.mask_ratio, stage.image_size), []).append(stage)
    rows = []
    for view, stages in views.items():
        columns, size = whole if view == crops else batch(view), shape.at(view.image_size)
        everything = np.arange(size.num_patches)
        index = columns["patch_index"].numpy() if "patch_index" in columns else [everything] * len(positions)
        pictures = []
        for place, caption in enumerate(captions):
            patches, where = columns["patches"][place].numpy(), np.asarray(index[place])
            if where.ndim > 1:  # the first of several views
                patches, where = patches[0], where[0]
            alt = f"{caption or 'a training picture'}, {view.words}"
            pictures.append(thumbnail(_pasted(patches, where, size), alt, _SIDE))
        names = ", ".join(stage.name for stage in stages)
        rows.append(MaskRow(f"{names}: {view.words}" if names else "the crops", pictures))
    return rows


def _captions(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, columns: dict[str, Any]) -> list[str]:
    """Return the captions of a batch after tokenization, or the class names of its images."""
    if tokenizer is not None:
        return [str(text).strip() for text in tokenizer.batch_decode(columns["input_ids"], skip_special_tokens=True)]
    names = kept_class_names(Path(recipe.output_dir), recipe.loss.options["num_classes"])
    return [" and ".join(names[label] for label in dict.fromkeys(labels)) for labels in columns["labels"].tolist()]


def _pasted(patches: np.ndarray, index: np.ndarray, shape: InputShape) -> np.ndarray:
    """Return patches at their places: uint8 RGBA `(size, size, 4)`, transparent elsewhere."""
    side, size = shape.side, shape.patch_size
    image = np.zeros((side, side, 4, size, size), np.uint8)
    rows, columns = np.divmod(index.astype(int), side)
    image[rows, columns, :3] = patches.reshape(-1, 3, size, size)
    image[rows, columns, 3] = 255
    return image.transpose(0, 3, 1, 4, 2).reshape(side * size, side * size, 4)
