"""The tiles of the contrastive loss in Triton, for fp32 on a GPU: the functions of `contrastive_torch`, fused.

What becomes of a block of logits is computed where its product leaves them, so that no logit is written to the GPU's
memory, only the sums of their exponentials and, in the second pass, their gradients.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from flipscale.objectives.logsumexp import LogSumExp, Softmax
from flipscale.objectives.tiles import SimilarityTiles, Tile, workspace

# Rows, columns and depth that a program multiplies at a time. It fits in 128 registers a thread, so that two programs
# share a processor and the exponentials of one hide behind the products of the other.
BLOCK = {"HEIGHT": 128, "WIDTH": 64, "DEPTH": 16}
OPTIONS = {"num_warps": 8, "num_stages": 3}


def add_negatives(
    tiles: SimilarityTiles,
    row_negatives: LogSumExp,
    column_negatives: LogSumExp,
    positives: torch.Tensor,
    shift: float | None,
) -> None:
    """Do what `contrastive_torch.add_negatives` does."""
    for tile in tiles.unfilled():
        (height, width), (down, across) = tile.logits.shape, _blocks(tile)
        by_row, by_column = tile.logits.new_empty(2, across, height), tile.logits.new_empty(2, down, width)
        _launch(tile_negatives, tiles, tile, positives[tile.rows], *by_row, *by_column)
        sides = ((row_negatives.part(tile.rows), by_row), (column_negatives.part(tile.columns), by_column))
        for negatives, (highest, total) in sides:
            if shift is None:
                negatives.raise_shift(highest.amax(0))
            negatives.total.add_(total.mul_(highest.sub_(negatives.shift).exp_()).sum(0))


def add_gradients(
    tiles: SimilarityTiles,
    row_softmax: Softmax,
    column_softmax: Softmax,
    positive_gradient: torch.Tensor,
    row_gradient: torch.Tensor,
    column_gradient: torch.Tensor,
    shift: float | None,
) -> None:
    """Do what `contrastive_torch.add_gradients` does. The kernel uses each row's and column's own shift."""
    for tile in tiles.unfilled():
        logit_gradient = tiles.beside(tile)
        softmax = (*row_softmax.part(tile.rows), *column_softmax.part(tile.columns))
        _launch(tile_gradients, tiles, tile, positive_gradient[tile.rows], *softmax, logit_gradient)
        tiles.add_products(tile, logit_gradient, row_gradient, column_gradient)


def try_out(device: torch.device) -> None:
    """Compile both passes' kernels for a GPU and run them. Whatever stands in the way is raised here."""
    rows, scale = torch.ones(16, 16, device=device), torch.ones((), dtype=torch.float64, device=device)
    sums, row_gradient, column_gradient = LogSumExp.empty(rows, None), torch.zeros_like(rows), torch.zeros_like(rows)
    tiles = SimilarityTiles(rows, rows, scale, 0, workspace(rows, rows, buffers=1)[0])
    add_negatives(tiles, sums, LogSumExp.empty(rows, None), rows[:, 0].clone(), None)
    softmax = sums.softmax(rows[:, 0])
    add_gradients(tiles, softmax, softmax, rows[:, 0], row_gradient, column_gradient, None)
    torch.cuda.synchronize(device)


def _blocks(tile: Tile) -> tuple[int, int]:
    height, width = tile.logits.shape
    return triton.cdiv(height, BLOCK["HEIGHT"]), triton.cdiv(width, BLOCK["WIDTH"])


def _launch(kernel: Any, tiles: SimilarityTiles, tile: Tile, *others: torch.Tensor) -> None:
    rows, columns = tile.scaled, tiles.columns[tile.columns].contiguous()
    first_pair, depth = tiles.first_pair + tile.rows.start - tile.columns.start, rows.shape[1]
    with torch.cuda.device_of(rows):
        kernel[_blocks(tile)](rows, columns, first_pair, *tile.logits.shape, depth, *others, **BLOCK, **OPTIONS)


@triton.jit
def tile_negatives(
    rows: tl.tensor,
    columns: tl.tensor,
    first_pair: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    depth: tl.tensor,
    positives: tl.tensor,
    row_shift: tl.tensor,
    row_total: tl.tensor,
    column_shift: tl.tensor,
    column_total: tl.tensor,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Sum the exponentials of the negatives that each row `(column blocks, height)` and each column
    `(row blocks, width)` has in a block, shifted by the largest logit, the positive's included. Write the logits of the
    pairs to `positives` `(height,)`."""
    row, column, logits = logits_of_block(rows, columns, height, width, depth, HEIGHT, WIDTH, DEPTH)
    partner, begin = row + first_pair, tl.program_id(1) * WIDTH
    paired, here = column == partner, (partner >= begin) & (partner < tl.minimum(begin + WIDTH, width))
    positive = tl.sum(tl.where(paired, logits, 0.0), 1, keep_dims=True)
    tl.store(positives + row, positive, here & (row < height))
    logits = tl.where((row < height) & (column < width), logits, float("-inf"))

    shift = tl.max(logits, 1, keep_dims=True)
    total = tl.sum(tl.where(paired, 0.0, tl.exp(logits - shift)), 1, keep_dims=True)
    part = tl.program_id(1) * height + row
    tl.store(row_shift + part, shift, row < height)
    tl.store(row_total + part, total, row < height)

    shift = tl.max(logits, 0, keep_dims=True)
    total = tl.sum(tl.where(paired, 0.0, tl.exp(logits - shift)), 0, keep_dims=True)
    part = tl.program_id(0) * width + column
    tl.store(column_shift + part, shift, column < width)
    tl.store(column_total + part, total, column < width)


@triton.jit
def tile_gradients(
    rows: tl.tensor,
    columns: tl.tensor,
    first_pair: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    depth: tl.tensor,
    positive_gradient: tl.tensor,
    row_shift: tl.tensor,
    row_factor: tl.tensor,
    column_shift: tl.tensor,
    column_factor: tl.tensor,
    logit_gradient: tl.tensor,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Compute the gradient of the logits `(height, width)` from that of the positives and from the softmax of each row
    and column."""
    row, column, logits = logits_of_block(rows, columns, height, width, depth, HEIGHT, WIDTH, DEPTH)
    of_row = tl.exp(logits - tl.load(row_shift + row, row < height)) * tl.load(row_factor + row, row < height)
    of_column = tl.exp(logits - tl.load(column_shift + column, column < width))
    of_column *= tl.load(column_factor + column, column < width)
    gradients = tl.where(column == row + first_pair, tl.load(positive_gradient + row, row < height), of_row + of_column)
    tl.store(logit_gradient + row * width + column, gradients, (row < height) & (column < width))


@triton.jit
def logits_of_block(
    rows: tl.tensor,
    columns: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    depth: tl.tensor,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return this program's rows `(HEIGHT, 1)`, its columns `(1, WIDTH)` and their products in full fp32, not TF32."""
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    logits = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for first in range(0, depth, DEPTH):
        step = first + tl.arange(0, DEPTH)
        left = tl.load(rows + row * depth + step[None, :], (row < height) & (step < depth)[None, :], 0.0)
        right = tl.load(columns + column * depth + step[:, None], (column < width) & (step < depth)[:, None], 0.0)
        logits = tl.dot(left, right, logits, input_precision="ieee")
    return row, column, logits
