"""What each stage of a run leaves of a picture: training samples with the patches that the encoder sees."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from flipscale.data.pairs import InputShape
from flipscale.data.sources.opening import open_source
from flipscale.data.tokenizers import load_tokenizer
from flipscale.evaluation.class_names import kept_class_names
from flipscale.pages.page import Picture, thumbnail
from flipscale.training.recipe import Recipe
from flipscale.training.schedule import StageRecipe

_SIDE = 96


@dataclass(frozen=True)
class MaskRow:
    """Some training samples as a stage sees them.

    Args:
        title: of the stage, with what it leaves out.
        pictures: what is left out is transparent in them.
    """

    title: str
    pictures: list[Picture]


def mask_rows(recipe: Recipe, count: int = 6) -> list[MaskRow]:
    """Return the first `count` training samples as each stage sees them, and above them the crops; stages that leave
    out the same share one row.

    Raises:
        ValueError: the data cannot be read any more.
        OSError: a shard cannot be read.
    """
    source, shape = open_source(recipe.data), InputShape.of(recipe.model_config())
    objective = recipe.objective()
    tokenizer = load_tokenizer(recipe.data.tokenizer, shape.max_tokens) if objective.takes_text else None
    # Of couples that are mixed, both.
    positions = list(range(min(count, len(source)) if tokenizer else count))

    def seen(as_in: _Seen) -> dict:
        shown = shape.at(as_in.image_size)
        dataset = objective.dataset(source, tokenizer, recipe.data, shown, recipe.seed, as_in.mask_ratio, recipe.mask)
        return dataset.__getitems__(positions)

    crops = _Seen(0.0, None)
    whole = seen(crops)
    captions = _captions(recipe, tokenizer, whole)
    rows = []
    for as_in, stages in {crops: [], **_as_seen(recipe)}.items():
        columns, shown = whole if as_in == crops else seen(as_in), shape.at(as_in.image_size)
        everything = np.arange(shown.num_patches)
        index = columns["patch_index"].numpy() if "patch_index" in columns else [everything] * len(positions)
        pictures = []
        for place, caption in enumerate(captions):
            patches, where = columns["patches"][place].numpy(), np.asarray(index[place])
            if where.ndim > 1:  # several views: the first
                patches, where = patches[0], where[0]
            said = f"{caption or 'a training picture'}, {as_in.words}"
            pictures.append(thumbnail(_pasted(patches, where, shown), said, _SIDE))
        names = ", ".join(stage.name for stage in stages)
        title = f"{names}: {as_in.words}" if names else "the crops"
        rows.append(MaskRow(title, pictures))
    return rows


def _captions(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, columns: dict) -> list[str]:
    """Return the captions of a batch as the model reads them, or the names of its images' classes."""
    if tokenizer is not None:
        return [str(text).strip() for text in tokenizer.batch_decode(columns["input_ids"], skip_special_tokens=True)]
    names = kept_class_names(Path(recipe.output_dir), recipe.loss.options["num_classes"])
    return [" and ".join(names[label] for label in dict.fromkeys(labels)) for labels in columns["labels"].tolist()]


class _Seen(NamedTuple):
    """What a stage sees of a picture: all but a share of its patches, at a size in pixels, None for the model's."""

    mask_ratio: float
    image_size: int | None

    @property
    def words(self) -> str:
        seen = f"{100 * self.mask_ratio:g} % of the patches left out" if self.mask_ratio else "whole"
        return seen if self.image_size is None else f"{seen}, at {self.image_size} x {self.image_size} pixels"


def _as_seen(recipe: Recipe) -> dict[_Seen, list[StageRecipe]]:
    """Return the stages by what they see."""
    found: dict[_Seen, list[StageRecipe]] = {}
    for stage in recipe.stages:
        found.setdefault(_Seen(stage.mask_ratio, stage.image_size), []).append(stage)
    return found


def _pasted(patches: np.ndarray, index: np.ndarray, shape: InputShape) -> np.ndarray:
    """Return patches at their places: uint8 RGBA `(size, size, 4)`, transparent where there is none."""
    side, size = shape.side, shape.patch_size
    image = np.zeros((side, side, 4, size, size), np.uint8)
    rows, columns = np.divmod(index.astype(int), side)
    image[rows, columns, :3] = patches.reshape(-1, 3, size, size)
    image[rows, columns, 3] = 255
    return image.transpose(0, 3, 1, 4, 2).reshape(side * size, side * size, 4)
