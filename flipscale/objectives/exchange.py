"""How the texts of the whole batch meet the images of each process: all gathered at once, or handed round a ring.

Both start when both towers have ended. To start the gather when the text tower has, beside the image tower, did not
pay: on two CPU processes it is 0.2 % of the step of a tiny model at 1,024 pairs each, and 0.01 % of B/16's at 136.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

EXCHANGES = ("gather", "ring")
# Tensors that have a row for each of some texts.
Rows = tuple[torch.Tensor, ...]
# From the text that is image 0's own (it may be outside), the texts and what goes with them, to what these images have
# for each of them.
Contribute = Callable[..., Rows]
Combine = Callable[[Rows, Rows], Rows]


def world_size() -> int:
    """How many processes share a batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


class Gathered:
    """Every process, of two at least, holds all texts: the fewest messages, and memory that grows with the world."""

    def __init__(self, texts: torch.Tensor):
        """Collective. Gathers `texts` `(batch, dim)`, the same `batch` on every process."""
        self.first = dist.get_rank() * len(texts)
        self.texts = _gather(texts)

    def visit(self, contribute: Contribute, combine: Combine, *along: torch.Tensor) -> Rows:
        """Collective. What all processes contribute to this one's texts, combined; `along` goes with the texts."""
        mine = contribute(self.first, self.texts, *(_gather(rows) for rows in along))
        found = [_scatter(rows) for rows in mine]
        result = tuple(parts[0] for parts in found)
        for rank in range(1, len(found[0])):
            result = combine(result, tuple(parts[rank] for parts in found))
        return result


class Ring:
    """The texts go round, each process's to the one before it; what is contributed to them follows a step behind, to
    be combined just in time. Both travel while tiles are multiplied; memory does not grow with the world."""

    def __init__(self, texts: torch.Tensor):
        self.texts = texts
        self.world = world_size()
        self.rank = dist.get_rank() if self.world > 1 else 0

    def visit(self, contribute: Contribute, combine: Combine, *along: torch.Tensor) -> Rows:
        """Collective. As `Gathered.visit`."""
        if self.world == 1:
            return contribute(0, self.texts, *along)
        texts: Rows = (self.texts, *along)
        behind: _Passing | None = None
        for step in range(self.world):
            owner = (self.rank + step) % self.world
            ahead = self._pass_on(texts) if step < self.world - 1 else None
            mine = contribute((self.rank - owner) * len(self.texts), *texts)
            if behind is not None:
                mine = combine(mine, behind.wait())
            behind = self._pass_on(mine)
            if ahead is not None:
                texts = ahead.wait()
        assert behind is not None
        return behind.wait()

    def _pass_on(self, rows: Rows) -> "_Passing":
        return _Passing(rows, (self.rank - 1) % self.world, (self.rank + 1) % self.world)


class _Passing:
    """Tensors on their way to process `to`, and the like of them on their way from process `source`."""

    def __init__(self, rows: Rows, to: int, source: int):
        self._sent = tuple(part.contiguous() for part in rows)
        self._received = tuple(torch.empty_like(part) for part in self._sent)
        sends = [dist.P2POp(dist.isend, part, to) for part in self._sent]
        receives = [dist.P2POp(dist.irecv, part, source) for part in self._received]
        self._works = dist.batch_isend_irecv([*sends, *receives])

    def wait(self) -> Rows:
        """What came."""
        for work in self._works:
            work.wait()
        return self._received


def summed(one: Rows, other: Rows) -> Rows:
    """A way to combine: the sums, which take the place of `one`."""
    return tuple(a.add_(b) for a, b in zip(one, other, strict=True))


def exchange_of(texts: torch.Tensor, exchange: str) -> Gathered | Ring:
    """Collective. The way that `exchange` names; one process needs none."""
    return Gathered(texts) if exchange == "gather" and world_size() > 1 else Ring(texts)


def _gather(rows: torch.Tensor) -> torch.Tensor:
    everywhere = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    dist.all_gather(list(everywhere.chunk(world_size())), rows.contiguous())
    return everywhere


def _scatter(rows: torch.Tensor) -> torch.Tensor:
    """What each process has for this one's texts, `(world, batch, ...)`."""
    parts = torch.empty_like(rows)
    dist.all_to_all_single(parts, rows.contiguous())
    return parts.unflatten(0, (world_size(), -1))
