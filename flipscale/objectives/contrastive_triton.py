"""The kernels of the losses' tiles in Triton, for fp32 on a GPU: two passes of InfoNCE, one of the sigmoid loss.

A block of logits is processed in registers, right after its matrix product. The GPU's memory receives only sums along
rows and columns and, in the last pass, the gradients of the logits.
"""

from typing import Any

import torch
import triton
import triton.language as tl

# Rows, columns and depth of a program's products. They fit in 128 registers a thread, so two programs share a
# processor: the exponentials of one overlap the products of the other.
BLOCK = {"HEIGHT": 128, "WIDTH": 64, "DEPTH": 16}
OPTIONS = {"num_warps": 8, "num_stages": 3}


def block_negatives(
    rows: torch.Tensor, columns: torch.Tensor, first_pair: int, positives: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negatives of rows and of columns in each block of `rows @ columns.T`, and write the `positives`.

    These are the largest logits and the sums of exponentials relative to them: `(2, blocks of columns, rows)` and
    `(2, blocks of rows, columns)`. The pair of row i is i columns after `first_pair`.
    """
    down, across = _blocks(rows, columns)
    by_row, by_column = rows.new_empty(2, across, len(rows)), rows.new_empty(2, down, len(columns))
    _launch(tile_negatives, rows, columns, first_pair, positives, *by_row, *by_column)
    return by_row, by_column


def logit_gradient(rows: torch.Tensor, columns: torch.Tensor, first_pair: int, *weights: torch.Tensor) -> None:
    """Write the gradients of the logits `rows @ columns.T`, given the other arguments of `tile_gradients`."""
    _launch(tile_gradients, rows, columns, first_pair, *weights)


def block_decisions(
    rows: torch.Tensor,
    columns: torch.Tensor,
    first_pair: int,
    bias: torch.Tensor,
    ids: tuple[torch.Tensor, torch.Tensor] | None,
    gradients: torch.Tensor,
) -> torch.Tensor:
    """Return the sums along rows of the sigmoid loss and of its `gradients`, by block: `(2, blocks of columns, rows)`.

    The logits are `rows @ columns.T + bias`, and this writes their `gradients`. A row and a column are a pair if their
    `ids` are equal. Without `ids`, the pair of row i is i columns after `first_pair`.
    """
    sums = rows.new_empty(2, _blocks(rows, columns)[1], len(rows))
    _launch(tile_decisions, rows, columns, first_pair, bias, *(ids or (None, None)), *sums, gradients)
    return sums


def try_out(device: torch.device) -> None:
    """Compile and run all kernels on a GPU, so that any error appears here."""
    rows = torch.ones(16, 16, device=device)
    block_negatives(rows, rows, 0, rows[:, 0].clone())
    logit_gradient(rows, rows, 0, *rows[:5], torch.empty_like(rows))
    block_decisions(rows, rows, 0, rows[0, 0].double(), None, torch.empty_like(rows))
    torch.cuda.synchronize(device)


def _blocks(rows: torch.Tensor, columns: torch.Tensor) -> tuple[int, int]:
    return triton.cdiv(len(rows), BLOCK["HEIGHT"]), triton.cdiv(len(columns), BLOCK["WIDTH"])


def _launch(kernel: Any, rows: torch.Tensor, columns: torch.Tensor, first_pair: int, *others: Any) -> None:
    sizes = (len(rows), len(columns), rows.shape[1])
    with torch.cuda.device_of(rows):
        kernel[_blocks(rows, columns)](rows, columns.contiguous(), first_pair, *sizes, *others, **BLOCK, **OPTIONS)


@triton.jit
def tile_negatives(
    rows: tl.tensor, columns: tl.tensor, first_pair: tl.tensor, height: tl.tensor, width: tl.tensor, depth: tl.tensor,
    positives: tl.tensor, row_shift: tl.tensor, row_total: tl.tensor, column_shift: tl.tensor, column_total: tl.tensor,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
) -> None:  # fmt: skip
    """Sum the exponentials of a block's negatives by row `(column blocks, height)` and by column `(row blocks, width)`.

    The shift is the block's largest logit in that row or column, with positives. `positives` gets the pairs' logits.
    """
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
    rows: tl.tensor, columns: tl.tensor, first_pair: tl.tensor, height: tl.tensor, width: tl.tensor, depth: tl.tensor,
    positive_gradient: tl.tensor, row_shift: tl.tensor, row_factor: tl.tensor,
    column_shift: tl.tensor, column_factor: tl.tensor, logit_gradient: tl.tensor,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
) -> None:  # fmt: skip
    """Compute the gradients of the logits `(height, width)` from the softmax of rows and columns.

    The gradients of the positives are given.
    """
    row, column, logits = logits_of_block(rows, columns, height, width, depth, HEIGHT, WIDTH, DEPTH)
    of_row = tl.exp(logits - tl.load(row_shift + row, row < height)) * tl.load(row_factor + row, row < height)
    of_column = tl.exp(logits - tl.load(column_shift + column, column < width))
    of_column *= tl.load(column_factor + column, column < width)
    gradients = tl.where(column == row + first_pair, tl.load(positive_gradient + row, row < height), of_row + of_column)
    tl.store(logit_gradient + row * width + column, gradients, (row < height) & (column < width))


@triton.jit
def tile_decisions(
    rows: tl.tensor, columns: tl.tensor, first_pair: tl.tensor, height: tl.tensor, width: tl.tensor, depth: tl.tensor,
    bias: tl.tensor, row_ids: tl.tensor | None, column_ids: tl.tensor | None,
    row_loss: tl.tensor, row_gradient: tl.tensor, logit_gradient: tl.tensor,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
) -> None:  # fmt: skip
    """Compute the gradients of the logits `(height, width)`, and sum them and the losses by row `(column blocks,
    height)`."""
    row, column, logits = logits_of_block(rows, columns, height, width, depth, HEIGHT, WIDTH, DEPTH)
    logits += tl.load(bias).to(tl.float32)
    if row_ids is None:
        paired = column == row + first_pair
    else:
        paired = tl.load(row_ids + row, row < height) == tl.load(column_ids + column, column < width)
    # With the positives negated, softplus gives the losses of positives and negatives, and sigmoid their gradients.
    logits = tl.where(paired, -logits, logits)
    # exp(logit) and exp(-logit), whichever is at most 1.
    small = tl.exp(-tl.abs(logits))
    sigmoid = tl.where(logits < 0, small, 1.0) / (1 + small)
    inside = (row < height) & (column < width)
    gradients = tl.where(inside, tl.where(paired, -sigmoid, sigmoid), 0.0)
    tl.store(logit_gradient + row * width + column, gradients, inside)

    # log1p(small) is twice the artanh of this, at most 1 / 3, whose series is exact in fp32 after seven terms.
    ratio = small / (2 + small)
    square = ratio * ratio
    series = 1 / 11 + square * (1 / 13)
    series = 1 / 7 + square * (1 / 9 + square * series)
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * series))
    losses = tl.where(inside, tl.maximum(logits, 0.0) + 2 * ratio * series, 0.0)
    part = tl.program_id(1) * height + row
    tl.store(row_loss + part, tl.sum(losses, 1, keep_dims=True), row < height)
    tl.store(row_gradient + part, tl.sum(gradients, 1, keep_dims=True), row < height)


@triton.jit
def logits_of_block(
    rows: tl.tensor, columns: tl.tensor, height: tl.tensor, width: tl.tensor, depth: tl.tensor,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Return this program's rows `(HEIGHT, 1)`, its columns `(1, WIDTH)` and their products.

    Three products of TF32 are as exact as one of fp32, and tensor cores compute them.
    """
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    logits = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for first in range(0, depth, DEPTH):
        step = first + tl.arange(0, DEPTH)
        left = tl.load(rows + row * depth + step[None, :], (row < height) & (step < depth)[None, :], 0.0)
        right = tl.load(columns + column * depth + step[:, None], (column < width) & (step < depth)[:, None], 0.0)
        logits = tl.dot(left, right, logits, input_precision="tf32x3")
    return row, column, logits
