"""The matrix of similarities of all images and texts, a tile at a time: it is never in memory as a whole.

A tile fits the cache, so that what happens to its logits between the matrix products costs little beside them.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

# Rows and columns of a tile. On CPUs its fp32 logits and their gradients share the cache; a GPU wants large products.
_TILE = {"cpu": (2048, 512), "cuda": (4096, 8192)}
# A GPU's tile of fewer rows has more columns in return, up to this many: as many logits for each launch.
_WIDEST = 2**19
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
        scale: 0-dimensional and fp64, on the rows' device: it counts as a number of Python's does.
        first_pair: the column that is row 0's pair; row i's is i further. It may be outside of the columns.
        memory: what tiles are made in, a row of a `workspace`.
        row_part, column_part: the block; left out, the whole matrix.
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
        # With one buffer, the logits' and what is beside them are the same.
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


def workspace(rows: torch.Tensor, columns: torch.Tensor, buffers: int) -> torch.Tensor:
    """Return the memory that `for_each_block` needs for the matrix of these rows and columns.

    Args:
        buffers: how many matrices of a tile's size are needed at once: two, or one if no logits are kept.
    """
    elements = workspace_elements(len(rows), len(columns), rows.shape[1], buffers, rows.device.type)
    return rows.new_empty(elements)


def workspace_elements(rows: int, columns: int, dim: int, buffers: int, device_type: str) -> tuple[int, int]:
    """Return the shape of a `workspace`: a row for each block that is worked at in its own thread."""
    count = _count_blocks(rows, columns, device_type)
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
    """Call `work(tiles, *arguments)` for blocks that make up the matrix of `SimilarityTiles`' arguments.

    On a CPU, blocks that share no row and no column run at the same time, a thread each. If all threads shared each
    product instead, as torch does by itself, they would wait for the slowest after each: a tile has no time to spare
    for a core on which something else runs.

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
        # A thread's number of torch threads is its own, but also that of the threads that begin after it.
        torch.set_num_threads(threads)


def _count_blocks(rows: int, columns: int, device_type: str) -> int:
    """Return how many blocks are worked at at the same time, each as high and as wide as the matrix is by so many."""
    threads = torch.get_num_threads() if device_type == "cpu" else 1
    return max(1, min(threads, rows // _BLOCK, columns // _BLOCK))


def _tile_shape(rows: int, columns: int, device_type: str) -> tuple[int, int]:
    """Return the largest tile of a matrix of so many rows and columns."""
    height, width = _TILE["cpu" if device_type == "cpu" else "cuda"]
    if device_type != "cpu" and rows < height:
        width = min(height * width // rows, _WIDEST)
    return min(height, rows), min(width, columns)


def _sizes(height: int, width: int, dim: int) -> tuple[int, int]:
    """Return how many elements the scaled rows and the logits of a tile take, each beginning at a cache line."""
    return -(-height * dim // 16) * 16, -(-height * width // 16) * 16


def _parts(length: int, count: int) -> list[slice]:
    return [slice(length * part // count, length * (part + 1) // count) for part in range(count)]


def views_of(rows: torch.Tensor, batch: int) -> tuple[torch.Tensor, ...]:
    """Return the first view of each image, the second, and so on, of `rows` `(batch * views, ...)`, which have the
    views of an image in a row."""
    return rows.unflatten(0, (batch, -1)).unbind(1)


def as_number(parameter: torch.Tensor) -> torch.Tensor:
    """Return a parameter `(1,)` of the model as a 0-dimensional fp64 tensor where it is: it counts as a number of
    Python's, digit for digit, without the host's waiting for it."""
    return parameter.detach().double().reshape(())
