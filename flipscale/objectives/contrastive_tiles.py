"""The arithmetic of the tiled contrastive loss: both softmaxes of a similarity matrix that is never there as a whole.

One pass over the tiles gives the normalisers of the rows' and of the columns' softmax together; a second one makes each
tile again and takes both gradients from it: four matrix products in all, where autograd on the whole matrix takes six.
A tile fits the cache, so that what happens to it between the products costs little beside them.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch

# Rows and columns of a tile. On CPUs its fp32 logits and their weights share the cache; a GPU wants large products.
_TILE = {"cpu": (2048, 512), "cuda": (4096, 8192)}
# The least side of a block that is worth a thread of its own.
_BLOCK = 1024

# How far above and below the common shift logits may lie. exp(60) times a million is finite in fp32. A million of
# exp(-80) add less than exp(-16) to a row whose own pair is above exp(-50).
_ABOVE, _BELOW = 60.0, 50.0
# Powers are of exponents down to this, and weights below this are 0: a CPU takes 200 times as long for a product of
# denormal numbers, and 150 times to make one with exp.
_LOWEST, _TINY = -80.0, 1e-30


class Rivals(NamedTuple):
    """What each row (or column) has beside its own pair: the sum of the exponentials of its other logits, as
    `total * exp(shift)`, two tensors `(count,)`. The pair is kept apart, since what is learned where it has won is in
    the few that are left: added to it they would be lost to rounding."""

    shift: torch.Tensor
    total: torch.Tensor

    @classmethod
    def none(cls, embeds: torch.Tensor, shift: float | None) -> "Rivals":
        """No rivals yet for each of `embeds`. All keep `shift`; None follows the running maxima, the pair's counted."""
        start = torch.full_like(embeds[:, 0], float("-inf") if shift is None else shift)
        return cls(start, torch.zeros_like(start))

    def of(self, part: slice) -> "Rivals":
        """Those of a part of the rows, views."""
        return Rivals(self.shift[part], self.total[part])

    def rise_to(self, shift: torch.Tensor) -> None:
        """Moves each shift up to `shift` where that is higher."""
        higher = torch.maximum(self.shift, shift)
        self.total.mul_((self.shift - higher).exp_())
        self.shift.copy_(higher)

    def cross_entropy(self, pairs: torch.Tensor) -> torch.Tensor:
        """Of each row with the logit of its pair, fp64 `(count,)`."""
        return (self.total.double() * (self.shift.double() - pairs).exp()).log1p()

    def share(self, pairs: torch.Tensor) -> "Share":
        """The softmax of each row with the logit of its pair."""
        return Share(self.shift, (self.total + (pairs - self.shift).exp()).reciprocal_())


class Share(NamedTuple):
    """A softmax with its sum known: of a logit it is `exp(logit - shift) * factor`; two tensors `(count,)`."""

    shift: torch.Tensor
    factor: torch.Tensor

    def of(self, part: slice) -> "Share":
        """That of a part of the rows, views."""
        return Share(self.shift[part], self.factor[part])


def merge(one: Rivals, other: Rivals) -> Rivals:
    """The rivals of both."""
    shift = torch.maximum(one.shift, other.shift)
    return Rivals(shift, one.total * (one.shift - shift).exp() + other.total * (other.shift - shift).exp())


def common_shift(highest: float, lowest_pair: float) -> float | None:
    """A shift under which one exponential of a logit serves its row and its column, 0 where that will do; None where
    there is none.

    Args:
        highest: no logit is above it.
        lowest_pair: no row's or column's own pair is below it, so neither is its largest logit.
    """
    if highest <= _ABOVE and lowest_pair >= -_BELOW:
        return 0.0
    shift = min(highest, lowest_pair + _BELOW)
    return shift if highest - shift <= _ABOVE else None


def in_blocks(
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
    first_pair: int,
    work: Callable[["SimilarityTiles", slice, slice], None],
) -> None:
    """Calls `work(tiles, row_part, column_part)` for blocks that make up the matrix of `SimilarityTiles`' arguments.

    On a CPU those that share no row and no column are worked on at once, a thread each. Were each product shared by
    all threads, as torch does by itself, they would wait for the slowest after each: a tile has no time to spare for
    a core on which something else runs.
    """

    def tiles_of(row_part: slice, column_part: slice) -> SimilarityTiles:
        pair = first_pair + row_part.start - column_part.start
        return SimilarityTiles(rows[row_part], columns[column_part], scale, pair)

    threads = torch.get_num_threads() if rows.device.type == "cpu" else 1
    count = max(1, min(threads, len(rows) // _BLOCK, len(columns) // _BLOCK))
    if count == 1:
        whole = (slice(0, len(rows)), slice(0, len(columns)))
        work(tiles_of(*whole), *whole)
        return
    row_parts, column_parts = _parts(len(rows), count), _parts(len(columns), count)
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(threads // count,)) as pool:
            for turn in range(count):
                turned = column_parts[turn:] + column_parts[:turn]
                # Made on this thread: what another allocates stays with its allocator when it has ended.
                tiles = map(tiles_of, row_parts, turned)
                list(pool.map(torch.no_grad()(work), tiles, row_parts, turned))
    finally:
        # A thread's number of torch threads is its own, but also that of the threads that begin after it.
        torch.set_num_threads(threads)


def _parts(length: int, count: int) -> list[slice]:
    return [slice(length * part // count, length * (part + 1) // count) for part in range(count)]


def views_of(rows: torch.Tensor, batch: int) -> tuple[torch.Tensor, ...]:
    """Those of `rows`, `(batch * views, ...)` with the views of an image in a row, that are each image's first view,
    its second, and so on."""
    return rows.unflatten(0, (batch, -1)).unbind(1)


def kernels_for(rows: torch.Tensor) -> ModuleType | None:
    """What makes the tiles of `rows` in Triton: for fp32 on a GPU, where Triton is installed."""
    if not rows.is_cuda or rows.dtype != torch.float32 or find_spec("triton") is None:
        return None
    from flipscale.objectives import contrastive_triton

    return contrastive_triton


class Tile(NamedTuple):
    """Logits `(rows, columns)`, the slices that they are of, and those rows times `scale`; `pairs` are the logits that
    belong together, a view, and `paired` the rows that these are of."""

    rows: slice
    columns: slice
    scaled: torch.Tensor
    logits: torch.Tensor
    pairs: torch.Tensor
    paired: slice


class SimilarityTiles:
    """`scale * rows @ columns.T`, a tile at a time, in memory that the next one takes over.

    Args:
        rows, columns: `(count, dim)`, of one dtype.
        first_pair: the column that is row 0's pair; row i's is i further. It may be outside the columns.
    """

    def __init__(self, rows: torch.Tensor, columns: torch.Tensor, scale: float, first_pair: int):
        self.rows, self.columns, self.scale, self.first_pair = rows, columns, scale, first_pair
        height, width = _TILE["cuda" if rows.is_cuda else "cpu"]
        self._height, self._width = min(height, len(rows)), min(width, len(columns))
        self._logits, self._weights = rows.new_empty(2, self._height * self._width)
        self._scaled = rows.new_empty(self._height, rows.shape[1])

    def __iter__(self) -> Iterator[Tile]:
        for tile in self.unfilled():
            torch.mm(tile.scaled, self.columns[tile.columns].t(), out=tile.logits)
            yield tile

    def unfilled(self) -> Iterator[Tile]:
        """The tiles, their logits still to be made."""
        for row in range(0, len(self.rows), self._height):
            rows = slice(row, min(row + self._height, len(self.rows)))
            scaled = torch.mul(self.rows[rows], self.scale, out=self._scaled[: rows.stop - rows.start])
            for column in range(0, len(self.columns), self._width):
                columns = slice(column, min(column + self._width, len(self.columns)))
                logits = self._view(self._logits, rows, columns)
                offset = self.first_pair + row - column
                pairs, first = logits.diagonal(offset), row + max(0, -offset)
                yield Tile(rows, columns, scaled, logits, pairs, slice(first, first + len(pairs)))

    def add_rivals(self, of_rows: Rivals, of_columns: Rivals, pairs: torch.Tensor, shift: float | None) -> None:
        """Adds all logits to `of_rows` and `of_columns`, but for those of the pairs, which are written to `pairs`.

        Args:
            shift: the `common_shift`, if all have it.
        """
        if kernels := kernels_for(self.rows):
            return kernels.add_rivals(self, of_rows, of_columns, pairs, shift)
        for tile in self:
            pairs[tile.paired] = tile.pairs
            sides = ((of_rows, tile.rows, 1), (of_columns, tile.columns, 0))
            if shift is not None:
                self._exponentials(tile, shift)
                tile.pairs.zero_()
                for rivals, part, dim in sides:
                    rivals.total[part] += tile.logits.sum(dim)
                continue
            powers = self.beside(tile)
            for rivals, part, dim in sides:
                mine = rivals.of(part)
                mine.rise_to(tile.logits.amax(dim))
                torch.sub(tile.logits, mine.shift.unsqueeze(dim), out=powers)
                self.pairs_of(powers.clamp_(min=_LOWEST).exp_(), tile).zero_()
                mine.total.add_(powers.sum(dim))

    def add_gradients(
        self,
        of_rows: Share,
        of_columns: Share,
        of_pairs: torch.Tensor,
        row_gradient: torch.Tensor,
        column_gradient: torch.Tensor,
        shift: float | None,
    ) -> None:
        """Adds the gradients of the sum of both sides' cross entropies: that of `rows`, still to be multiplied by
        `scale`, to `row_gradient`, and that of `columns` to `column_gradient`.

        Args:
            of_pairs: `(rows,)`: the gradients of the pairs' logits.
            shift: as for `add_rivals`.
        """
        if kernels := kernels_for(self.rows):
            return kernels.add_gradients(self, of_rows, of_columns, of_pairs, row_gradient, column_gradient)
        for tile in self:
            weights = self.beside(tile)
            row_factor, column_factor = of_rows.factor[tile.rows, None], of_columns.factor[tile.columns]
            if shift is not None:
                torch.add(row_factor, column_factor, out=weights)
                weights.mul_(self._exponentials(tile, shift))
            else:
                torch.sub(tile.logits, of_rows.shift[tile.rows, None], out=weights)
                weights.clamp_(min=_LOWEST).exp_().mul_(row_factor)
                powers = tile.logits.sub_(of_columns.shift[tile.columns]).clamp_(min=_LOWEST).exp_()
                weights.addcmul_(powers, column_factor)
            self.pairs_of(weights, tile).copy_(of_pairs[tile.paired])
            self.add_products(tile, weights, row_gradient, column_gradient)

    def add_products(
        self, tile: Tile, weights: torch.Tensor, row_gradient: torch.Tensor, column_gradient: torch.Tensor
    ) -> None:
        """Hands the gradients of a tile's logits, `weights`, on to its rows, still to be multiplied by `scale`, and to
        its columns."""
        if not weights.is_cuda:
            torch.hardshrink(weights, _TINY, out=weights)
        row_gradient[tile.rows].addmm_(weights, self.columns[tile.columns])
        column_gradient[tile.columns].addmm_(weights.t(), tile.scaled)

    def beside(self, tile: Tile) -> torch.Tensor:
        """Memory of the size of the tile's logits."""
        return self._view(self._weights, tile.rows, tile.columns)

    def pairs_of(self, matrix: torch.Tensor, tile: Tile) -> torch.Tensor:
        """The elements of the tile's pairs in a matrix of its size, a view."""
        return matrix.diagonal(self.first_pair + tile.rows.start - tile.columns.start)

    @staticmethod
    def _exponentials(tile: Tile, shift: float) -> torch.Tensor:
        return (tile.logits.sub_(shift).clamp_(min=_LOWEST) if shift else tile.logits).exp_()

    def _view(self, buffer: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        height, width = rows.stop - rows.start, columns.stop - columns.start
        return buffer[: height * width].view(height, width)
