"""The `centre` mask."""

import torch

from flipscale.io.errors import UserError

# Standard deviation of the Gaussian, in sides of the image.
_SIGMA = 0.2


def centre(noise: torch.Tensor, kept: int, views: int) -> torch.Tensor:
    """Score the patches for a draw without replacement, with weights of a Gaussian around the middle.

    Raises:
        ValueError: several views.
    """
    if views > 1:
        raise UserError(f"views is {views}, but centre masks of one image overlap; use kind random or grid")
    # The first arrivals of a race between exponential clocks are such a draw.
    return -torch.log1p(-noise) / _weights(*noise.shape[1:]).to(noise)


def _weights(rows: int, columns: int) -> torch.Tensor:
    down = (torch.arange(rows) + 0.5) / rows - 0.5
    across = (torch.arange(columns) + 0.5) / columns - 0.5
    return torch.exp(-(down[:, None] ** 2 + across[None, :] ** 2) / (2 * _SIGMA**2))
