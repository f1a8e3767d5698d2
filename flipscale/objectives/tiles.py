"""The similarity matrix of all images and texts, computed a tile at a time, so that it never lies in memory whole.

A tile fits the cache. The work on its logits between the matrix products therefore costs little.

One pass over the tiles sums the negatives of rows and columns together (`add_negatives`). A second pass makes each tile
again and takes both gradients from it (`add_gradients`): four matrix products. Autograd on the whole takes six.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

# Rows and columns of a tile. On CPUs its fp32 logits and their gradients share the cache; a GPU wants large products.
_TILE = {"cpu": (2048, 512), "cuda": (4096, 8192)}
# A GPU's tile of fewer rows gets more columns, at most this many, so that each launch has as many logits.
_WIDEST = 2**19
# The smallest side of a block that is worth a thread of its own.
_BLOCK = 1024
# Gradients of logits below this become 0, because a CPU's products of denormal numbers take 200 times as long.
_TINY = 1e-30
# How far above and below the common shift logits may lie. exp(60) times a million is finite in fp32. A million of
# exp(-80) add less than exp(-16) to a row whose positive is above exp(-50).
_ABOVE, _BELOW = 60.0, 50.0
# Exponents are clamped to this, so that no exponential is denormal.
LOWEST_EXPONENT = -80.0


class PrecomputedGradients(torch.autograd.Function):
    """A loss whose forward pass also computes its gradients, by a function of images, texts and the model's parameters.

    `backward` multiplies the gradients in place by the upstream gradient, so it can run only once.
    """

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Any], dtype: torch.dtype, *tensors: torch.Tensor) -> torch.Tensor:
        with torch.autocast(tensors[0].device.type, enabled=False):
            loss, gradients = compute(*(side.to(dtype) for side in tensors[:2]), *map(as_number, tensors[2:]))
        ctx.gradients = [g.to(t.dtype) for g, t in zip(gradients, tensors, strict=False)]
        return loss.float()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the backward pass of this loss ran before"
        return (None, None, *(gradient.mul_(upstream[0]) for gradient in gradients))


class LogSumExp(NamedTuple):
    """The log-sum-exp of each row's negatives so far, as `total * exp(shift)`: two tensors `(count,)`.

    The positive is not in the sum, because it would round the small negatives away once it dominates.
    """

    shift: torch.Tensor
    total: torch.Tensor

    @classmethod
    def empty(cls, rows: torch.Tensor, shift: float | None) -> "LogSumExp":
        """Return empty sums for `rows`. With `shift` None, shifts follow the running maxima."""
        start = rows.new_full((len(rows),), float("-inf") if shift is None else shift)
        return cls(start, torch.zeros_like(start))

    def part(self, rows: slice) -> "LogSumExp":
        """Return a view of some rows."""
        return LogSumExp(self.shift[rows], self.total[rows])

    def raise_shift(self, shift: torch.Tensor) -> None:
        """Raise each shift to at least `shift`."""
        higher = torch.maximum(self.shift, shift)
        self.total.mul_((self.shift - higher).exp_())
        self.shift.copy_(higher)

    def cross_entropy(self, positives: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of each row, given the logit of its positive: fp64 `(count,)`."""
        return (self.total.double() * (self.shift.double() - positives).exp()).log1p()

    def softmax(self, positives: torch.Tensor) -> "Softmax":
        """Return the softmax of each row over its negatives and its positive."""
        return Softmax(self.shift, (self.total + (positives - self.shift).exp()).reciprocal_())


class Softmax(NamedTuple):
    """A normalised softmax: the weight of a logit is `exp(logit - shift) * factor`; two tensors `(count,)`."""

    shift: torch.Tensor
    factor: torch.Tensor

    def part(self, rows: slice) -> "Softmax":
        """Return a view of some rows."""
        return Softmax(self.shift[rows], self.factor[rows])


def merge(parts: LogSumExp) -> LogSumExp:
    """Return the log-sum-exp of the negatives of all `parts` `(parts, count)`."""
    shift = parts.shift.amax(0)
    return LogSumExp(shift, (parts.total * (parts.shift - shift).exp_()).sum(0))


def common_shift(highest: float, lowest_positive: float) -> float | None:
    """Return a shift with which one exponential of a logit serves both its row and its column.

    The shift is 0 if that suffices, and None if no shift does.

    Args:
        highest: upper bound of all logits.
        lowest_positive: lower bound of the positives, and so of each row's and each column's largest logit.
    """
    if highest <= _ABOVE and lowest_positive >= -_BELOW:
        return 0.0
    shift = min(highest, lowest_positive + _BELOW)
    return shift if highest - shift <= _ABOVE else None


class Tile(NamedTuple):
    """A part of the matrix: its `rows` and `columns`.

    Args:
        scaled: the rows times `scale`.
        logits: `(rows, columns)`, in memory that the next tile reuses.
        positives: logits of the pairs, a view of `logits`.
        paired: rows that have their pair in this tile.
    """

    rows: slice
    columns: slice
    scaled: torch.Tensor
    logits: torch.Tensor
    positives: torch.Tensor
    paired: slice


class SimilarityTiles:
    """The tiles of a block of `scale * rows @ columns.T`.

    Args:
        rows, columns: all rows and columns `(count, dim)` of the matrix, of one dtype.
        scale: 0-dimensional, fp64, on the rows' device; it acts as a Python number does.
        first_pair: column of row 0's pair; the pair of row i is i columns further. It may lie outside of the columns.
        memory: a row of a `workspace`, in which tiles are made.
        row_part, column_part: the block; by default the whole matrix.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        columns: torch.Tensor,
        scale: torch.Tensor,
        first_pair: int,
        memory: torch.Tensor,
        row_part: slice | None = None,
        column_part: slice | None = None,
    ):
        self.rows, self.columns, self.scale, self.first_pair = rows, columns, scale, first_pair
        self._row_part, self._column_part = row_part or slice(0, len(rows)), column_part or slice(0, len(columns))
        height, width = (part.stop - part.start for part in (self._row_part, self._column_part))
        self._height, self._width = _tile_shape(height, width, rows.device.type)
        scaled, buffer = _sizes(self._height, self._width, rows.shape[1])
        self._scaled = memory[: self._height * rows.shape[1]].view(self._height, rows.shape[1])
        # In a workspace of one buffer, both are the same memory.
        self._logits, self._beside = memory[scaled : scaled + buffer], memory[-buffer:]

    def __iter__(self) -> Iterator[Tile]:
        """Yield each tile with its logits."""
        for tile in self.unfilled():
            torch.mm(tile.scaled, self.columns[tile.columns].t(), out=tile.logits)
            yield tile

    def unfilled(self) -> Iterator[Tile]:
        """Yield each tile with memory for its logits, which are not computed."""
        for row in range(self._row_part.start, self._row_part.stop, self._height):
            rows = slice(row, min(row + self._height, self._row_part.stop))
            scaled = torch.mul(self.rows[rows], self.scale, out=self._scaled[: rows.stop - rows.start])
            for column in range(self._column_part.start, self._column_part.stop, self._width):
                columns = slice(column, min(column + self._width, self._column_part.stop))
                logits = self._view(self._logits, rows, columns)
                offset = self.first_pair + row - column
                positives, first = logits.diagonal(offset), row + max(0, -offset)
                yield Tile(rows, columns, scaled, logits, positives, slice(first, first + len(positives)))

    def second_buffer(self, tile: Tile) -> torch.Tensor:
        """Return more memory of the size of the tile's logits; in a workspace of one buffer, the same memory."""
        return self._view(self._beside, tile.rows, tile.columns)

    def positives_of(self, matrix: torch.Tensor, tile: Tile) -> torch.Tensor:
        """Return a view of the pairs' elements in a matrix of the size of the tile."""
        return matrix.diagonal(self.first_pair + tile.rows.start - tile.columns.start)

    def add_products(
        self,
        tile: Tile,
        logit_gradient: torch.Tensor,
        row_gradient: torch.Tensor,
        column_gradient: torch.Tensor,
        student: Sequence[torch.Tensor] = (),
    ) -> None:
        """Back-propagate the gradient of a tile's logits to its rows and columns, or to those of a `student`.

        The caller still has to multiply `row_gradient` by `scale`.
        """
        rows, columns = tile.scaled, self.columns[tile.columns]
        if student:
            rows, columns = student[0][tile.rows], student[1][tile.columns]
        if not logit_gradient.is_cuda:
            torch.hardshrink(logit_gradient, _TINY, out=logit_gradient)
        row_gradient[tile.rows].addmm_(logit_gradient, columns)
        column_gradient[tile.columns].addmm_(logit_gradient.t(), rows)

    def _view(self, buffer: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        height, width = rows.stop - rows.start, columns.stop - columns.start
        return buffer[: height * width].view(height, width)


def add_negatives(
    tiles: SimilarityTiles,
    row_negatives: LogSumExp,
    column_negatives: LogSumExp,
    positives: torch.Tensor,
    shift: float | None,
) -> None:
    """Add the tiles' logits to the negatives of rows and columns; write the pairs' logits to `positives` `(rows,)`.

    `shift` is the `common_shift` of all negatives, or None.
    """
    for tile in tiles:
        positives[tile.paired] = tile.positives
        sides = ((row_negatives.part(tile.rows), 1), (column_negatives.part(tile.columns), 0))
        if shift is not None:
            _exponentials(tile, shift)
            tile.positives.zero_()
            for negatives, dim in sides:
                negatives.total.add_(tile.logits.sum(dim))
            continue
        exponentials = tiles.second_buffer(tile)
        for negatives, dim in sides:
            negatives.raise_shift(tile.logits.amax(dim))
            torch.sub(tile.logits, negatives.shift.unsqueeze(dim), out=exponentials)
            tiles.positives_of(exponentials.clamp_(min=LOWEST_EXPONENT).exp_(), tile).zero_()
            negatives.total.add_(exponentials.sum(dim))


def add_gradients(
    tiles: SimilarityTiles,
    row_softmax: Softmax,
    column_softmax: Softmax,
    positive_gradient: torch.Tensor,
    row_gradient: torch.Tensor,
    column_gradient: torch.Tensor,
    shift: float | None,
    student: Sequence[torch.Tensor] = (),
) -> None:
    """Add the gradients of the sum of both sides' cross-entropies to `row_gradient` and `column_gradient`.

    The caller still has to multiply `row_gradient` by `scale`.

    Args:
        positive_gradient: gradients of the pairs' logits, `(rows,)`.
        shift: the same as for `add_negatives`.
        student: rows and columns of another model, which get the gradients in place of the tiles' own.
    """
    for tile in tiles:
        logit_gradient = tiles.second_buffer(tile)
        rows, columns = row_softmax.part(tile.rows), column_softmax.part(tile.columns)
        if shift is not None:
            torch.add(rows.factor[:, None], columns.factor, out=logit_gradient)
            logit_gradient.mul_(_exponentials(tile, shift))
        else:
            torch.sub(tile.logits, rows.shift[:, None], out=logit_gradient)
            logit_gradient.clamp_(min=LOWEST_EXPONENT).exp_().mul_(rows.factor[:, None])
            exponentials = tile.logits.sub_(columns.shift).clamp_(min=LOWEST_EXPONENT).exp_()
            logit_gradient.addcmul_(exponentials, columns.factor)
        tiles.positives_of(logit_gradient, tile).copy_(positive_gradient[tile.paired])
        tiles.add_products(tile, logit_gradient, row_gradient, column_gradient, student)


def _exponentials(tile: Tile, shift: float) -> torch.Tensor:
    """Replace the tile's logits by their exponentials and return them."""
    return (tile.logits.sub_(shift).clamp_(min=LOWEST_EXPONENT) if shift else tile.logits).exp_()


def workspace(rows: torch.Tensor, columns: torch.Tensor, buffers: int) -> torch.Tensor:
    """Return the memory that `for_each_block` needs for the matrix of these rows and columns.

    `buffers` is the number of matrices of a tile's size that are needed at once: two, or one if logits are not kept.
    """
    return rows.new_empty(workspace_elements(len(rows), len(columns), rows.shape[1], buffers, rows.device.type))


def workspace_elements(rows: int, columns: int, dim: int, buffers: int, device_type: str) -> tuple[int, int]:
    """Return the shape of a `workspace`: a row for each block that runs in its own thread."""
    # Blocks run at the same time; rows and columns are each cut into that many parts.
    threads = torch.get_num_threads() if device_type == "cpu" else 1
    count = max(1, min(threads, rows // _BLOCK, columns // _BLOCK))
    scaled, buffer = _sizes(*_tile_shape(-(-rows // count), -(-columns // count), device_type), dim)
    return count, scaled + buffers * buffer


def for_each_block(
    work: Callable[..., None],
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: torch.Tensor,
    first_pair: int,
    memory: torch.Tensor,
    *arguments: Any,
) -> None:
    """Call `work(tiles, *arguments)` for blocks that together cover the matrix of `SimilarityTiles`' arguments.

    On a CPU, blocks that share no row and no column run at the same time, one thread each. torch would otherwise split
    each product over all threads, which then wait for the slowest thread. A tile's product is too short for such waits.

    Args:
        memory: a `workspace` for these rows and columns.
    """

    @torch.no_grad()
    def on_thread(tiles: SimilarityTiles) -> None:
        work(tiles, *arguments)

    count = len(memory)
    if count == 1:
        work(SimilarityTiles(rows, columns, scale, first_pair, memory[0]), *arguments)
        return
    threads = torch.get_num_threads()
    row_parts, column_parts = _parts(len(rows), count), _parts(len(columns), count)
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(threads // count,)) as pool:
            for turn in range(count):
                parts = zip(memory, row_parts, column_parts[turn:] + column_parts[:turn], strict=True)
                list(pool.map(on_thread, (SimilarityTiles(rows, columns, scale, first_pair, *part) for part in parts)))
    finally:
        # torch.set_num_threads in a thread also changes the number for threads that start later.
        torch.set_num_threads(threads)


def _tile_shape(rows: int, columns: int, device_type: str) -> tuple[int, int]:
    """Return the shape of the largest tile of a matrix."""
    height, width = _TILE["cpu" if device_type == "cpu" else "cuda"]
    if device_type != "cpu" and rows < height:
        width = min(height * width // rows, _WIDEST)
    return min(height, rows), min(width, columns)


def _sizes(height: int, width: int, dim: int) -> tuple[int, int]:
    """Return the numbers of elements of a tile's scaled rows and of its logits, rounded up to whole cache lines."""
    return -(-height * dim // 16) * 16, -(-height * width // 16) * 16


def _parts(length: int, count: int) -> list[slice]:
    return [slice(length * part // count, length * (part + 1) // count) for part in range(count)]


def views_of(rows: torch.Tensor, batch: int) -> tuple[torch.Tensor, ...]:
    """Split `rows` `(batch * views, ...)` by view: the first view of each image, then the second, and so on.

    The views of an image are neighbouring rows.
    """
    return rows.unflatten(0, (batch, -1)).unbind(1)


def as_number(parameter: torch.Tensor) -> torch.Tensor:
    """Return a model parameter `(1,)` as a 0-dimensional fp64 tensor on the same device.

    In arithmetic it acts as a Python number, digit for digit, and the host does not wait for it.
    """
    return parameter.detach().double().reshape(())
