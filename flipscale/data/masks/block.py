"""The `block` mask."""

import math

import torch

from flipscale.io.errors import UserError


def block(noise: torch.Tensor, kept: int, views: int) -> torch.Tensor:
    """Score the patches for one window, nearly square, whose last row is cut short where the count asks for it: each
    patch's row-major place in the window, patches outside last.

    Raises:
        ValueError: several views.
    """
    if views > 1:
        raise UserError(f"views is {views}, but block masks of one image overlap; use kind random or grid")
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
