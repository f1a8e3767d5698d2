"""Training pictures with the patches that each stage shows to the image encoder."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flipscale.data.pairs import InputShape
from flipscale.data.sources.opening import open_source
from flipscale.data.tokenizers import load_tokenizer
from flipscale.evaluation.test_set import kept_class_names
from flipscale.pages.page import Picture, thumbnail
from flipscale.training.recipe import Recipe

_SIDE = 96


class MaskRow(NamedTuple):
    """Training pictures in one or more stages, with transparent patches where the mask removes them."""

    title: str
    pictures: list[Picture]


def mask_rows(recipe: Recipe, count: int = 6) -> list[MaskRow]:
    """Return the first `count` training pictures whole, and as each stage shows them. Equal stages share a row."""
    source, shape = open_source(recipe.data), InputShape.of(recipe.model_config())
    objective = recipe.objective()
    tokenizer = load_tokenizer(recipe.data.tokenizer, shape.max_tokens) if objective.takes_text else None
    # Mixup pairs pictures, so a classifier's batch stays even.
    positions = list(range(min(count, len(source)) if tokenizer else count))

    def batch(mask_ratio: float, image_size: int | None) -> dict[str, Any]:
        size = shape.at(image_size)
        dataset = objective.dataset(source, tokenizer, recipe.data, size, recipe.seed, mask_ratio, recipe.mask)
        return dataset.__getitems__(positions)

    whole = batch(0.0, None)
    if tokenizer is not None:
        decoded = tokenizer.batch_decode(whole["input_ids"], skip_special_tokens=True)
        captions = [str(text).strip() for text in decoded]
    else:
        classes = kept_class_names(Path(recipe.output_dir), recipe.loss.options["num_classes"])
        captions = [" and ".join(classes[n] for n in dict.fromkeys(labels)) for labels in whole["labels"].tolist()]
    # Stages by their mask ratio and image size in pixels (None for the model's).
    views: dict[tuple[float, int | None], list[str]] = {(0.0, None): []}
    for stage in recipe.stages:
        views.setdefault((stage.mask_ratio, stage.image_size), []).append(stage.name)
    rows = []
    for (ratio, side), stages in views.items():
        columns, size = whole if (ratio, side) == (0.0, None) else batch(ratio, side), shape.at(side)
        words = f"{100 * ratio:g} % of the patches left out" if ratio else "whole"
        words += "" if side is None else f", at {side} x {side} pixels"
        everything = np.arange(size.num_patches)
        index = columns["patch_index"].numpy() if "patch_index" in columns else [everything] * len(positions)
        pictures = []
        for place, caption in enumerate(captions):
            patches, where = columns["patches"][place].numpy(), np.asarray(index[place])
            if where.ndim > 1:  # the first of several views
                patches, where = patches[0], where[0]
            alt = f"{caption or 'a training picture'}, {words}"
            pictures.append(thumbnail(_pasted(patches, where, size), alt, _SIDE))
        rows.append(MaskRow(f"{', '.join(stages)}: {words}" if stages else "the crops", pictures))
    return rows


def _pasted(patches: np.ndarray, index: np.ndarray, shape: InputShape) -> np.ndarray:
    """Return patches at their places: uint8 RGBA `(size, size, 4)`, transparent elsewhere."""
    side, size = shape.side, shape.patch_size
    image = np.zeros((side, side, 4, size, size), np.uint8)
    rows, columns = np.divmod(index.astype(int), side)
    image[rows, columns, :3] = patches.reshape(-1, 3, size, size)
    image[rows, columns, 3] = 255
    return image.transpose(0, 3, 1, 4, 2).reshape(side * size, side * size, 4)
