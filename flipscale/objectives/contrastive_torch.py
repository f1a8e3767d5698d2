"""The tiles of the contrastive loss in torch.

One pass over the tiles sums the negatives of the rows and of the columns together. A second pass makes each tile again
and takes both gradients from it: four matrix products in all, where autograd on the whole matrix takes six.
"""

import torch

from flipscale.objectives.logsumexp import LOWEST_EXPONENT, LogSumExp, Softmax
from flipscale.objectives.tiles import SimilarityTiles, Tile


def add_negatives(
    tiles: SimilarityTiles,
    row_negatives: LogSumExp,
    column_negatives: LogSumExp,
    positives: torch.Tensor,
    shift: float | None,
) -> None:
    """Add the logits of the tiles to the negatives of their rows and columns; write those of the pairs to `positives`.

    Args:
        positives: `(rows,)`.
        shift: the `common_shift` if there is one, which all negatives then have.
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
        exponentials = tiles.beside(tile)
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
) -> None:
    """Add the gradients of the sum of both sides' cross-entropies to `row_gradient`, which is still to be multiplied by
    `scale`, and to `column_gradient`.

    Args:
        positive_gradient: of the pairs' logits, `(rows,)`.
        shift: as for `add_negatives`.
    """
    for tile in tiles:
        logit_gradient = tiles.beside(tile)
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
        tiles.add_products(tile, logit_gradient, row_gradient, column_gradient)


def _exponentials(tile: Tile, shift: float) -> torch.Tensor:
    """Return the exponentials of the tile's logits, which take their place."""
    return (tile.logits.sub_(shift).clamp_(min=LOWEST_EXPONENT) if shift else tile.logits).exp_()
