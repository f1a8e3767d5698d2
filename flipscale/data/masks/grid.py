"""The `grid` mask."""

import math

import torch

from flipscale.io.errors import UserError

# Patches of a cell: in larger ones, what is left is no longer spread evenly.
_LARGEST_CELL = 16


def grid(noise: torch.Tensor, kept: int, views: int) -> torch.Tensor:
    """Score the patches for the same number from every cell of a regular grid, so that what is left spreads evenly: one
    of two at 50 %, one of a 2 x 2 square at 75 %. The score is the patch's rank in its cell.

    Raises:
        ValueError: no grid keeps `kept` patches (`grid_cell`).
    """
    batch, rows, columns = noise.shape
    height, width = grid_cell(rows, columns, kept)
    cells = noise.reshape(batch, rows // height, height, columns // width, width).transpose(2, 3)
    ranks = cells.flatten(3).argsort(dim=3, stable=True).argsort(dim=3)
    return ranks.view(cells.shape).transpose(2, 3).reshape(noise.shape)


def grid_cell(rows: int, columns: int, kept: int) -> tuple[int, int]:
    """Return height and width, in patches, of the smallest cell that tiles the image and holds a whole number of the
    `kept`; of several, the one nearest to a square.

    Raises:
        ValueError: there is no such cell of at most 16 patches and half the image.
    """
    heights = [height for height in range(1, rows + 1) if rows % height == 0]
    widths = [width for width in range(1, columns + 1) if columns % width == 0]
    largest = min(_LARGEST_CELL, rows * columns // 2)
    cells = [(height, width) for height in heights for width in widths if height * width <= largest]
    fitting = [cell for cell in cells if kept * cell[0] * cell[1] % (rows * columns) == 0]
    if not fitting:
        # One of each cell. Rounded down, because the number of kept patches is rounded down too.
        sizes = sorted({height * width for height, width in cells})
        ratios = ", ".join(f"{math.floor(10_000 * (1 - 1 / size)) / 10_000:g}" for size in sizes)
        raise UserError(
            f"a grid mask cannot keep {kept} of {rows} x {columns} patches, as many in every cell of at most "
            f"{largest}; use kind random, or a mask_ratio such as {ratios}"
        )
    return min(fitting, key=lambda cell: (cell[0] * cell[1], abs(cell[0] - cell[1])))
