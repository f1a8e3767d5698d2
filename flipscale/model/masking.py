"""Which patches the image encoder sees, and which tokens the text encoder: pure functions of uniform noise.

Whoever calls them says where the randomness comes from: the training loader keys its noise by sample
(`flipscale.data.masks`), an experiment gives `torch.rand`.
"""

import math
from typing import Literal, get_args

import torch

ImageMask = Literal["random", "grid", "block", "centre"]
TextMask = Literal["random", "padding_first"]

# Patches of a cell of the `grid` mask: in larger ones, what is left is no longer spread evenly.
_LARGEST_CELL = 16
# Standard deviation of the `centre` mask's Gaussian, in sides of the image.
_CENTRE_SIGMA = 0.2


def num_kept(num_tokens: int, mask_ratio: float, what: str = "patches") -> int:
    """The number of tokens left at `mask_ratio`: int(num_tokens * (1 - mask_ratio)), as the original counts.

    Raises:
        ValueError: `mask_ratio` outside [0, 1), or so high that nothing is left.
    """
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio is {mask_ratio}; it must be in [0, 1): the fraction of {what} removed")
    kept = int(num_tokens * (1.0 - mask_ratio))
    if kept < 1:
        raise ValueError(f"mask_ratio {mask_ratio} leaves none of {num_tokens} {what}; use a lower ratio")
    return kept


def keep_patches(noise: torch.Tensor, mask_ratio: float, kind: ImageMask = "random", views: int = 1) -> torch.Tensor:
    """The patches left of each image, row-major positions: int64 `(batch, views, num_kept)`, ascending.

    Args:
        noise: uniform in [0, 1), `(batch, rows, columns)`: a number for every patch.
        mask_ratio: the fraction of patches removed, in [0, 1).
        kind: `random`, a uniform subset; `grid`, the same number from every cell of a regular grid (one of two at
            50 %, one of a 2 x 2 square at 75 %), so that what is left spreads evenly; `block`, one window, nearly
            square, its last row cut short where the count asks for it; `centre`, drawn without replacement with
            weights of a Gaussian around the middle.
        views: masks of the same image that share no patch; each alone is such a mask.

    Raises:
        ValueError: a ratio outside [0, 1) or one that leaves no patch; a mask that does not exist
            (`check_image_mask`).
    """
    rows, columns = noise.shape[1:]
    check_image_mask(rows, columns, mask_ratio, kind, views)
    kept = num_kept(rows * columns, mask_ratio)
    if kind == "grid":
        scores = _ranks_in_cells(noise, *grid_cell(rows, columns, kept))
    elif kind == "block":
        scores = _places_in_window(noise, kept)
    elif kind == "centre":
        # The first `kept` arrivals of a race between exponential clocks are such a draw.
        scores = -torch.log1p(-noise) / _centre_weights(rows, columns).to(noise)
    else:
        scores = noise
    first = scores.flatten(1).topk(views * kept, dim=1, largest=False, sorted=views > 1).indices
    return first.unflatten(1, (views, kept)).sort(dim=2).values


def complement(patch_index: torch.Tensor, num_patches: int) -> torch.Tensor:
    """The patches that `patch_index` `(batch, kept)` leaves out: int64 `(batch, num_patches - kept)`, ascending."""
    absent = torch.ones(len(patch_index), num_patches, dtype=torch.uint8, device=patch_index.device)
    absent.scatter_(1, patch_index.long(), 0)
    return absent.argsort(dim=1, descending=True, stable=True)[:, : num_patches - patch_index.shape[1]]


def keep_tokens(noise: torch.Tensor, attention_mask: torch.Tensor, mask_ratio: float, kind: TextMask) -> torch.Tensor:
    """The tokens left of each caption: int64 `(batch, num_kept)`, ascending (paper, Table 1c).

    Args:
        noise: uniform in [0, 1), `(batch, tokens)`.
        attention_mask: `(batch, tokens)`, 0 for padding.
        mask_ratio: the fraction of all tokens removed, padding counted, in [0, 1).
        kind: `random`, a uniform subset; `padding_first`, padding goes before any word, then words at random.

    Raises:
        ValueError: a ratio outside [0, 1), or one that leaves no token.
    """
    kept = num_kept(noise.shape[1], mask_ratio, "tokens")
    scores = noise if kind == "random" else noise + (attention_mask == 0)
    return scores.topk(kept, dim=1, largest=False, sorted=False).indices.sort(dim=1).values


def check_image_mask(rows: int, columns: int, mask_ratio: float, kind: str, views: int) -> None:
    """Nothing, for a mask that `keep_patches` can draw.

    Raises:
        ValueError: an unknown kind, more views than the image has patches for, views of a kind whose masks overlap, a
            ratio that no grid has.
    """
    kept, num_patches = num_kept(rows * columns, mask_ratio), rows * columns
    if kind not in get_args(ImageMask):
        raise ValueError(f"mask kind {kind!r} is unknown; use one of {', '.join(get_args(ImageMask))}")
    if views < 1:
        raise ValueError(f"views is {views}; it must be 1 or more")
    if views > 1 and kind in ("block", "centre"):
        raise ValueError(f"views is {views}, but {kind} masks of one image overlap; use kind random or grid")
    if views * kept > num_patches:
        raise ValueError(
            f"{views} views of {kept} patches each (mask_ratio {mask_ratio:g}) are more than the {num_patches} of an "
            f"image, and views share none; use {num_patches // kept} or fewer views, or mask_ratio "
            f"{math.ceil(1000 * (1 - 1 / views)) / 1000:g} or more"
        )
    if kind == "grid":
        grid_cell(rows, columns, kept)


def grid_cell(rows: int, columns: int, kept: int) -> tuple[int, int]:
    """Height and width, in patches, of the smallest cell that tiles the image and holds a whole number of the `kept`;
    of several, the one nearest to a square.

    Raises:
        ValueError: there is no such cell of at most 16 patches and half the image.
    """
    heights = [height for height in range(1, rows + 1) if rows % height == 0]
    widths = [width for width in range(1, columns + 1) if columns % width == 0]
    largest = min(_LARGEST_CELL, rows * columns // 2)
    cells = [(height, width) for height in heights for width in widths if height * width <= largest]
    fitting = [cell for cell in cells if kept * cell[0] * cell[1] % (rows * columns) == 0]
    if not fitting:
        # One of each cell. Rounded down, for the count of what is kept is rounded down too.
        sizes = sorted({height * width for height, width in cells})
        ratios = ", ".join(f"{math.floor(10_000 * (1 - 1 / size)) / 10_000:g}" for size in sizes)
        raise ValueError(
            f"a grid mask cannot keep {kept} of {rows} x {columns} patches, as many in every cell of at most "
            f"{largest}; use kind random, or a mask_ratio such as {ratios}"
        )
    return min(fitting, key=lambda cell: (cell[0] * cell[1], abs(cell[0] - cell[1])))


def _ranks_in_cells(noise: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The place of every patch in the order of its cell's noise: `(batch, rows, columns)`, from 0."""
    batch, rows, columns = noise.shape
    cells = noise.reshape(batch, rows // height, height, columns // width, width).transpose(2, 3)
    ranks = cells.flatten(3).argsort(dim=3, stable=True).argsort(dim=3)
    return ranks.view(cells.shape).transpose(2, 3).reshape(noise.shape)


def _places_in_window(noise: torch.Tensor, kept: int) -> torch.Tensor:
    """The row-major place of every patch in a window of `kept` or a few more; patches outside come last."""
    rows, columns = noise.shape[1:]
    height = min(math.ceil(math.sqrt(kept)), rows)
    width = math.ceil(kept / height)
    if width > columns:
        width, height = columns, math.ceil(kept / columns)
    # Rounding may take a product to the upper bound itself.
    top = (noise[:, 0, 0] * (rows - height + 1)).long().clamp(max=rows - height)
    left = (noise[:, -1, -1] * (columns - width + 1)).long().clamp(max=columns - width)
    down = (torch.arange(rows, device=noise.device) - top[:, None])[:, :, None]
    across = (torch.arange(columns, device=noise.device) - left[:, None])[:, None, :]
    inside = (down >= 0) & (down < height) & (across >= 0) & (across < width)
    return torch.where(inside, down * width + across, rows * columns)


def _centre_weights(rows: int, columns: int) -> torch.Tensor:
    down = (torch.arange(rows) + 0.5) / rows - 0.5
    across = (torch.arange(columns) + 0.5) / columns - 0.5
    return torch.exp(-(down[:, None] ** 2 + across[None, :] ** 2) / (2 * _CENTRE_SIGMA**2))


def patchify(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Images `(batch, channels, height, width)` as patches, row by row: `(batch, patches, channels * p * p)`."""
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    grid = pixel_values.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)


def take_patches(patches: torch.Tensor, patch_index: torch.Tensor) -> torch.Tensor:
    """Rows `patch_index` `(batch, kept)` of `patches` `(batch, num_patches, width)`."""
    return patches.gather(1, patch_index.long()[:, :, None].expand(-1, -1, patches.shape[2]))
