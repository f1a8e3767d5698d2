"""Positives beside the pairs: pairs of the global batch with equal ids are positives of each other."""

import torch

from flipscale.objectives.exchange import Gathered, exchange_of

Ids = torch.Tensor | None


class EqualIds:
    """The pairs of the global batch whose ids equal those of this process's pairs.

    A visit's `first_pair` is that of `flipscale.objectives.exchange`. It is 0 for this process's own rows. Time and
    memory grow with the number of rows, not with its square.

    Attributes:
        is_shared: bool `(batch,)`, whether the global batch has another pair with the id.
        shares: fp64 `(batch,)`, 1 / the number of pairs with the id; 0 if it is not shared.
    """

    def __init__(self, ids: torch.Tensor):
        """Collective. Gather the `ids`, int64 `(batch,)`, the same `batch` on every process."""
        everywhere = exchange_of(ids, "gather")
        self._all, self._first = everywhere.texts, everywhere.first if isinstance(everywhere, Gathered) else 0
        self._known, ordered = ids.sort().values, self._all.sort().values
        counts = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
        self.is_shared = counts > 1
        self.shares = self.is_shared.double() / counts

    def visited(self, first_pair: int, count: int) -> torch.Tensor:
        """Return the ids of the `count` texts of a visit."""
        return self._all.narrow(0, self._first - first_pair, count)

    def no_sums(self, rows: torch.Tensor) -> torch.Tensor:
        """Return empty sums of rows like `rows`: a row for each id here, and as many for all other ids."""
        return rows.new_zeros(2 * len(self._known), rows.shape[1])

    def add(self, sums: torch.Tensor, rows: torch.Tensor, first_pair: int) -> None:
        """Add the rows of a visit to the sums of their ids."""
        places = self._places(first_pair, len(rows))
        if rows.is_cuda:
            sums.index_put_((places,), rows, accumulate=True)  # there, index_add_ adds in an order that varies
        else:
            sums.index_add_(0, places, rows)

    def look_up(self, sums: torch.Tensor, first_pair: int, count: int) -> torch.Tensor:
        """Return the sum of each id of a visit, `(count, dim)`. It is that of other ids for an id that is not here."""
        return sums.index_select(0, self._places(first_pair, count))

    def _places(self, first_pair: int, count: int) -> torch.Tensor:
        ids, here = self.visited(first_pair, count), len(self._known)
        places = torch.searchsorted(self._known, ids).clamp_(max=here - 1)
        # Other ids are spread over rows, because a GPU adds to one row in turn.
        others = torch.arange(count, device=ids.device) % here + here
        return torch.where(self._known.gather(0, places) == ids, places, others)
