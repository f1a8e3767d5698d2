"""Masks of patches and caption tokens: kinds as pure functions of noise, and noise keyed by sample.

A sample's mask depends on the seed and the sample's position only.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from flipscale.data.randomness import keyed_uniform
from flipscale.io.errors import UserError
from flipscale.model.patches import complement, keep_lowest, num_kept

# Standard deviation of `centre`, as a fraction of the image's side.
_SIGMA = 0.2
# Patches of a grid cell: larger cells no longer spread the kept patches evenly.
_LARGEST_CELL = 16


def grid(noise: torch.Tensor, kept: int, views: int) -> torch.Tensor:
    """Score each patch by its rank in its cell of a regular grid, so that every cell keeps the same number.

    At 50 %, one of two neighbours is kept; at 75 %, one of a 2 x 2 square. Raise UserError if no grid keeps `kept`
    patches (`grid_cell`).
    """
    batch, rows, columns = noise.shape
    height, width = grid_cell(rows, columns, kept)
    cells = noise.reshape(batch, rows // height, height, columns // width, width).transpose(2, 3)
    ranks = cells.flatten(3).argsort(dim=3, stable=True).argsort(dim=3)
    return ranks.view(cells.shape).transpose(2, 3).reshape(noise.shape)


def grid_cell(rows: int, columns: int, kept: int) -> tuple[int, int]:
    """Return the height and width, in patches, of the smallest cell that tiles the image and keeps a whole number of
    patches; among equal sizes, the squarest. Raise UserError if no cell of at most 16 patches and half the image does.
    """
    heights = [height for height in range(1, rows + 1) if rows % height == 0]
    widths = [width for width in range(1, columns + 1) if columns % width == 0]
    largest = min(_LARGEST_CELL, rows * columns // 2)
    cells = [(height, width) for height in heights for width in widths if height * width <= largest]
    fitting = [cell for cell in cells if kept * cell[0] * cell[1] % (rows * columns) == 0]
    if not fitting:
        # Ratios that keep one patch of each cell. Rounded down, as the number of kept patches is.
        sizes = sorted({height * width for height, width in cells})
        ratios = ", ".join(f"{math.floor(10_000 * (1 - 1 / size)) / 10_000:g}" for size in sizes)
        raise UserError(
            f"a grid mask cannot keep {kept} of {rows} x {columns} patches, the same number in every cell of at most "
            f"{largest}; use kind random, or a mask_ratio such as {ratios}"
        )
    return min(fitting, key=lambda cell: (cell[0] * cell[1], abs(cell[0] - cell[1])))


def block(noise: torch.Tensor, kept: int, views: int) -> torch.Tensor:
    """Score the patches for one window, nearly square, whose last row may be cut short: the row-major place in the
    window, and a higher score outside.
    """
    _refuse_views("block", views)
    rows, columns = noise.shape[1:]
    height = min(math.ceil(math.sqrt(kept)), rows)
    width = math.ceil(kept / height)
    if width > columns:
        width, height = columns, math.ceil(kept / columns)
    # Clamped, because rounding may give the upper bound itself.
    top = (noise[:, 0, 0] * (rows - height + 1)).long().clamp(max=rows - height)
    left = (noise[:, -1, -1] * (columns - width + 1)).long().clamp(max=columns - width)
    down = (torch.arange(rows, device=noise.device) - top[:, None])[:, :, None]
    across = (torch.arange(columns, device=noise.device) - left[:, None])[:, None, :]
    inside = (down >= 0) & (down < height) & (across >= 0) & (across < width)
    return torch.where(inside, down * width + across, rows * columns)


def centre(noise: torch.Tensor, kept: int, views: int) -> torch.Tensor:
    """Score the patches for a draw without replacement, weighted by a Gaussian around the image's centre."""
    _refuse_views("centre", views)
    rows, columns = noise.shape[1:]
    down = (torch.arange(rows) + 0.5) / rows - 0.5
    across = (torch.arange(columns) + 0.5) / columns - 0.5
    weights = torch.exp(-(down[:, None] ** 2 + across[None, :] ** 2) / (2 * _SIGMA**2))
    # The first arrivals of exponential clocks are a weighted draw without replacement.
    return -torch.log1p(-noise) / weights.to(noise)


def _refuse_views(kind: str, views: int) -> None:
    if views > 1:
        raise UserError(f"views is {views}, but {kind} masks of one image overlap; use kind random or grid")


# Every `mask.kind`. A new kind is a function and a line here. Its arguments are uniform noise in [0, 1), `(batch, rows,
# columns)`, the number of patches that a view keeps, and the number of views. It returns scores of the noise's shape:
# the first view keeps the lowest, the second the next lowest. It raises UserError for masks that it cannot draw.
IMAGE_MASKS: dict[str, Callable[[torch.Tensor, int, int], torch.Tensor]] = {
    "random": lambda noise, kept, views: noise,
    "grid": grid,
    "block": block,
    "centre": centre,
}

# Every `mask.text_kind`. Its arguments are uniform noise and the attention mask, both `(batch, tokens)`; it returns
# scores of the tokens, of which the lowest are kept.
TEXT_MASKS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "random": lambda noise, attention_mask: noise,
    "padding_first": lambda noise, attention_mask: noise + (attention_mask == 0),
}


def check_kind(kind: str, kinds: dict[str, Callable[..., torch.Tensor]], field: str) -> None:
    if kind not in kinds:
        raise UserError(f"{field} is {kind!r}; use one of {', '.join(kinds)}")


def keep_patches(noise: torch.Tensor, mask_ratio: float, kind: str = "random", views: int = 1) -> torch.Tensor:
    """Return the kept patches of each image as row-major positions: int64 `(batch, views, num_kept)`, ascending. Raise
    ValueError if `mask_ratio` is outside of [0, 1) or leaves no patch, UserError for other impossible masks.

    Args:
        noise: uniform numbers in [0, 1), `(batch, rows, columns)`.
        mask_ratio: fraction of patches removed, in [0, 1).
        views: number of masks of the same image; they share no patch.
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


def keep_tokens(noise: torch.Tensor, attention_mask: torch.Tensor, mask_ratio: float, kind: str) -> torch.Tensor:
    """Return the kept tokens of each caption: int64 `(batch, num_kept)`, ascending (paper, Table 1c). Raise ValueError
    if `mask_ratio` is outside of [0, 1) or leaves no token.

    Args:
        noise: uniform numbers in [0, 1), `(batch, tokens)`.
        attention_mask: `(batch, tokens)`, 0 for padding.
        mask_ratio: fraction of all tokens removed, padding included, in [0, 1).
    """
    kept = num_kept(noise.shape[1], mask_ratio, "tokens")
    scores = TEXT_MASKS[kind](noise, attention_mask)
    return scores.topk(kept, dim=1, largest=False, sorted=False).indices.sort(dim=1).values


def keyed_patches(
    seed: int, positions: np.ndarray, side: int, mask_ratio: float, kind: str = "random", views: int = 1
) -> np.ndarray:
    """Return `keep_patches` of each sample: int16 `(len(positions), views, kept)`."""
    noise = keyed_uniform(seed, "mask", positions, side * side).reshape(-1, side, side)
    return keep_patches(torch.from_numpy(noise), mask_ratio, kind, views).numpy().astype(np.int16)


def removed_patches(index: np.ndarray, num_patches: int) -> np.ndarray:
    """Return the patches that `index` `(samples, kept)` lacks: int64 `(samples, masked)`, ascending."""
    return complement(torch.from_numpy(index), num_patches).numpy()


def mask_tokens(
    tokens: dict[str, torch.Tensor], seed: int, positions: np.ndarray, mask_ratio: float, kind: str
) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask` `(captions, kept)` of the kept tokens, and their `position_ids` in the
    whole caption. `kind` is a key of `TEXT_MASKS`. Each position has the same number of captions."""
    captions, width = tokens["input_ids"].shape
    draws = keyed_uniform(seed, "text mask", positions, captions // len(positions) * width)
    noise = torch.from_numpy(draws.reshape(captions, width))
    index = keep_tokens(noise, tokens["attention_mask"], mask_ratio, kind)
    return {**{name: values.gather(1, index) for name, values in tokens.items()}, "position_ids": index}


def branch_scales(seed: int, positions: np.ndarray, views: int, num_blocks: int, drop_path_rate: float) -> np.ndarray:
    """Return the factors of each block's attention and MLP under stochastic depth: fp32 `(len(positions), views,
    num_blocks, 2)`, 0 where dropped. Source: Huang et al. 2016, arXiv 1603.09382.

    The rate grows linearly from 0 at the first block to `drop_path_rate` at the last, as in timm. Kept branches are
    divided by the share of kept branches, so that the mean is 1.
    """
    draws = keyed_uniform(seed, "drop path", positions, views * num_blocks * 2).reshape(-1, views, num_blocks, 2)
    kept = 1.0 - np.linspace(0.0, drop_path_rate, num_blocks)[:, None]
    return ((draws < kept) / kept).astype(np.float32)
