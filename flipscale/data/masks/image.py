"""Masks of patches, as pure functions of uniform noise."""

import math
from collections.abc import Callable

import torch

from flipscale.data.masks.block import block
from flipscale.data.masks.centre import centre
from flipscale.data.masks.grid import grid
from flipscale.data.masks.uniform import uniform
from flipscale.io.errors import UserError
from flipscale.model.patches import keep_lowest, num_kept

# Every `mask.kind`. To add one, import its function and name it here. It takes uniform noise in [0, 1), `(batch, rows,
# columns)`, the number of patches kept in each view, and the number of views; it returns scores of the same shape, of
# which each view keeps the next lowest. It raises ValueError for what it cannot draw.
IMAGE_MASKS: dict[str, Callable[[torch.Tensor, int, int], torch.Tensor]] = {
    "random": uniform,
    "grid": grid,
    "block": block,
    "centre": centre,
}


def keep_patches(noise: torch.Tensor, mask_ratio: float, kind: str = "random", views: int = 1) -> torch.Tensor:
    """Return the patches left of each image as row-major positions: int64 `(batch, views, num_kept)`, ascending.

    Args:
        noise: uniform in [0, 1), `(batch, rows, columns)`: a number for every patch.
        mask_ratio: the fraction of patches removed, in [0, 1).
        kind: one of `IMAGE_MASKS`.
        views: masks of the same image that share no patch; each alone is such a mask.

    Raises:
        ValueError: `mask_ratio` is outside of [0, 1) or leaves no patch; an unknown kind; more views than the image has
            patches for; a mask that its kind cannot draw.
    """
    num_patches = noise[0].numel()
    kept = num_kept(num_patches, mask_ratio)
    check_kind(kind, IMAGE_MASKS, "mask.kind")
    if views < 1:
        raise UserError(f"views is {views}; it must be 1 or more")
    if views * kept > num_patches:
        raise UserError(
            f"{views} views of {kept} patches each (mask_ratio {mask_ratio:g}) are more than the {num_patches} of an "
            f"image, and views share none; use {num_patches // kept} or fewer views, or mask_ratio "
            f"{math.ceil(1000 * (1 - 1 / views)) / 1000:g} or more"
        )
    return keep_lowest(IMAGE_MASKS[kind](noise, kept, views), kept, views)


def check_kind(kind: str, kinds: dict[str, Callable[..., torch.Tensor]], field: str) -> None:
    """Raise if `kind` is none of `kinds`.

    Raises:
        ValueError: it is none.
    """
    if kind not in kinds:
        raise UserError(f"{field} is {kind!r}; use one of {', '.join(kinds)}")
