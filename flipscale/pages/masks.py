"""What each stage of a run leaves of a picture: training samples with the patches that the encoder sees."""

from dataclasses import dataclass

import numpy as np

from flipscale.data.pairs import InputShape, PairDataset
from flipscale.data.sources.opening import open_source
from flipscale.data.tokenizers import load_tokenizer
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
    tokenizer = load_tokenizer(recipe.data.tokenizer, shape.max_tokens)
    positions = list(range(min(count, len(source))))

    def seen(ratio: float) -> dict:
        dataset = PairDataset(source, tokenizer, recipe.data, shape, recipe.seed, ratio, recipe.mask)
        return dataset.__getitems__(positions)

    whole = seen(0.0)
    captions = [str(text).strip() for text in tokenizer.batch_decode(whole["input_ids"], skip_special_tokens=True)]
    everything = np.arange(shape.num_patches)
    rows = []
    for ratio, stages in {0.0: [], **_by_ratio(recipe)}.items():
        columns = whole if ratio == 0.0 else seen(ratio)
        index = columns["patch_index"].numpy() if "patch_index" in columns else [everything] * len(positions)
        pictures = []
        for place, caption in enumerate(captions):
            patches, where = columns["patches"][place].numpy(), np.asarray(index[place])
            if where.ndim > 1:  # several views: the first
                patches, where = patches[0], where[0]
            said = f"{caption or 'a training picture'}, {_words(ratio)}"
            pictures.append(thumbnail(_pasted(patches, where, shape), said, _SIDE))
        names = ", ".join(stage.name for stage in stages)
        title = f"{names}: {_words(ratio)}" if names else "the crops"
        rows.append(MaskRow(title, pictures))
    return rows


def _by_ratio(recipe: Recipe) -> dict[float, list[StageRecipe]]:
    """Return the stages by the share of the patches that they leave out."""
    found: dict[float, list[StageRecipe]] = {}
    for stage in recipe.stages:
        found.setdefault(stage.mask_ratio, []).append(stage)
    return found


def _words(ratio: float) -> str:
    return f"{100 * ratio:g} % of the patches left out" if ratio else "whole"


def _pasted(patches: np.ndarray, index: np.ndarray, shape: InputShape) -> np.ndarray:
    """Return patches at their places: uint8 RGBA `(size, size, 4)`, transparent where there is none."""
    side, size = shape.side, shape.patch_size
    image = np.zeros((side, side, 4, size, size), np.uint8)
    rows, columns = np.divmod(index.astype(int), side)
    image[rows, columns, :3] = patches.reshape(-1, 3, size, size)
    image[rows, columns, 3] = 255
    return image.transpose(0, 3, 1, 4, 2).reshape(side * size, side * size, 4)
