"""The matrix of similarities of all images and texts, a tile at a time: it is never in memory as a whole.

A tile fits the cache, so that what happens to its logits between the matrix products costs little beside them.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

# Rows and columns of a tile. On CPUs its fp32 logits and their gradients share the cache; a GPU wants large products.
_TILE = {"cpu": (2048, 512), "cuda": (4096, 8192)}
# The smallest side of a block that is worth a thread of its own.
_BLOCK = 1024
# Gradients of logits below this become 0: on a CPU a product of denormal numbers takes 200 times as long.
_TINY = 1e-30


class Tile(NamedTuple):
    """A part of the matrix.

    Args:
        rows, columns: the slices of the whole matrix.
        scaled: the rows times `scale`.
        logits: `(rows, columns)`, in memory that the next tile takes over.
        positives: the logits of the pairs, a view of `logits`.
        paired: the rows that have their pair in this tile.
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
        first_pair: the column that is row 0's pair; row i's is i further. It may be outside of the columns.
        row_part, column_part: the block; left out, the whole matrix.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        columns: torch.Tensor,
        scale: float,
        first_pair: int,
        row_part: slice | None = None,
        column_part: slice | None = None,
    ):
        self.rows, self.columns, self.scale, self.first_pair = rows, columns, scale, first_pair
        self._row_part, self._column_part = row_part or slice(0, len(rows)), column_part or slice(0, len(columns))
        height, width = _TILE["cuda" if rows.is_cuda else "cpu"]
        self._height = min(height, self._row_part.stop - self._row_part.start)
        self._width = min(width, self._column_part.stop - self._column_part.start)
        self._logits, self._beside = rows.new_empty(2, self._height * self._width)
        self._scaled = rows.new_empty(self._height, rows.shape[1])

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

    def beside(self, tile: Tile) -> torch.Tensor:
        """Return memory of the size of the tile's logits."""
        return self._view(self._beside, tile.rows, tile.columns)

    def positives_of(self, matrix: torch.Tensor, tile: Tile) -> torch.Tensor:
        """Return a view of the pairs' elements in a matrix of the size of the tile."""
        return matrix.diagonal(self.first_pair + tile.rows.start - tile.columns.start)

    def add_products(
        self, tile: Tile, logit_gradient: torch.Tensor, row_gradient: torch.Tensor, column_gradient: torch.Tensor
    ) -> None:
        """Back-propagate the gradient of a tile's logits: add that of its columns to `column_gradient`, and that of its
        rows, which is still to be multiplied by `scale`, to `row_gradient`."""
        if not logit_gradient.is_cuda:
            torch.hardshrink(logit_gradient, _TINY, out=logit_gradient)
        row_gradient[tile.rows].addmm_(logit_gradient, self.columns[tile.columns])
        column_gradient[tile.columns].addmm_(logit_gradient.t(), tile.scaled)

    def _view(self, buffer: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        height, width = rows.stop - rows.start, columns.stop - columns.start
        return buffer[: height * width].view(height, width)


def for_each_block(
    work: Callable[..., None],
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
    first_pair: int,
    *arguments: Any,
) -> None:
    """Call `work(tiles, *arguments)` for blocks that make up the matrix of `SimilarityTiles`' arguments.

    On a CPU, blocks that share no row and no column run at the same time, a thread each. If all threads shared each
    product instead, as torch does by itself, they would wait for the slowest after each: a tile has no time to spare
    for a core on which something else runs.
    """

    @torch.no_grad()
    def on_thread(tiles: SimilarityTiles) -> None:
        work(tiles, *arguments)

    threads = torch.get_num_threads() if rows.device.type == "cpu" else 1
    count = max(1, min(threads, len(rows) // _BLOCK, len(columns) // _BLOCK))
    if count == 1:
        work(SimilarityTiles(rows, columns, scale, first_pair), *arguments)
        return
    row_parts, column_parts = _parts(len(rows), count), _parts(len(columns), count)
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(threads // count,)) as pool:
            for turn in range(count):
                parts = zip(row_parts, column_parts[turn:] + column_parts[:turn], strict=True)
                # Buffers are made on this thread: memory of another stays with its allocator when the thread has ended.
                list(pool.map(on_thread, (SimilarityTiles(rows, columns, scale, first_pair, *part) for part in parts)))
    finally:
        # A thread's number of torch threads is its own, but also that of the threads that begin after it.
        torch.set_num_threads(threads)


def _parts(length: int, count: int) -> list[slice]:
    return [slice(length * part // count, length * (part + 1) // count) for part in range(count)]


def views_of(rows: torch.Tensor, batch: int) -> tuple[torch.Tensor, ...]:
    """Return the first view of each image, the second, and so on, of `rows` `(batch * views, ...)`, which have the
    views of an image in a row."""
    return rows.unflatten(0, (batch, -1)).unbind(1)
