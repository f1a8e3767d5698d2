"""How the texts of the whole batch meet the images of each process: all gathered at once, or passed around a ring.

Both start when both towers have ended. Starting the gather when the text tower has ended, beside the image tower, did
not pay: it takes 0.2 % of the step of a tiny model at 1,024 pairs on each of two CPU processes, and 0.01 % of B/16's
step at 136.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

EXCHANGES = ("gather", "ring")
# Tensors that have a row for each of some texts.
Rows = tuple[torch.Tensor, ...]
# How the finds of two processes for the same texts become one.
Reduce = Callable[[Rows, Rows], Rows]


def world_size() -> int:
    """Return how many processes share a batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


@dataclass
class Slot:
    """What belongs to the texts of a visit.

    Args:
        along: what came with the texts.
        found: what this process's images have for the texts; whoever iterates over the visits sets it.
    """

    along: Rows
    found: Rows = ()


Visit = tuple[int, torch.Tensor, Slot]


class Gathered:
    """Every process, of two at least, holds all texts: the fewest messages, and memory that grows with the world."""

    def __init__(self, texts: torch.Tensor):
        """Collective. Gather `texts` `(batch, dim)`, the same `batch` on every process."""
        self.first = dist.get_rank() * len(texts)
        self.texts = _gather(texts)
        self.reduced: Rows = ()

    def visits(self, reduce: Reduce, *along: torch.Tensor) -> Iterator[Visit]:
        """Collective. Yield `(first_pair, texts, slot)` until these images have met all texts: `first_pair` is the text
        that is image 0's own, which may be outside of `texts`.

        Afterwards `reduced` is what all processes found for this process's texts.

        Args:
            reduce: the reduction; it may write to its first argument.
            along: tensors with a row for each of this process's texts, which travel with them.
        """
        slot = Slot(tuple(_gather(rows) for rows in along))
        yield self.first, self.texts, slot
        found = [_scatter(rows) for rows in slot.found]
        self.reduced = tuple(parts[0] for parts in found)
        for rank in range(1, len(found[0])):
            self.reduced = reduce(self.reduced, tuple(parts[rank] for parts in found))


class Ring:
    """The texts go round, from each process to the one before it. What was found for them follows a step behind, to be
    reduced just in time. Both travel while tiles are multiplied; memory does not grow with the world."""

    def __init__(self, texts: torch.Tensor):
        self.texts = texts
        self.world = world_size()
        self.rank = dist.get_rank() if self.world > 1 else 0
        self.reduced: Rows = ()

    def visits(self, reduce: Reduce, *along: torch.Tensor) -> Iterator[Visit]:
        """Collective. Do what `Gathered.visits` does."""
        texts: Rows = (self.texts, *along)
        behind: _Passing | None = None
        for step in range(self.world):
            owner = (self.rank + step) % self.world
            ahead = self._pass_on(texts) if step < self.world - 1 else None
            slot = Slot(texts[1:])
            yield (self.rank - owner) * len(self.texts), texts[0], slot
            # Taken out of the slot, which whoever iterates still holds.
            found, slot.found = slot.found, ()
            if behind is not None:
                found = reduce(found, behind.wait())
            if self.world == 1:
                self.reduced = found
                return
            behind = self._pass_on(found)
            if ahead is not None:
                texts = ahead.wait()
        assert behind is not None
        self.reduced = behind.wait()

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
        """Return what was received."""
        for work in self._works:
            work.wait()
        return self._received


def add(one: Rows, other: Rows) -> Rows:
    """Reduce by adding `other` to `one` in place."""
    return tuple(a.add_(b) for a, b in zip(one, other, strict=True))


def exchange_of(texts: torch.Tensor, exchange: str) -> Gathered | Ring:
    """Collective. Return the exchange of that name; a single process needs none and takes the ring of one."""
    return Gathered(texts) if exchange == "gather" and world_size() > 1 else Ring(texts)


def _gather(rows: torch.Tensor) -> torch.Tensor:
    everywhere = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    dist.all_gather(list(everywhere.chunk(world_size())), rows.contiguous())
    return everywhere


def _scatter(rows: torch.Tensor) -> torch.Tensor:
    """Return what each process has for this one's texts, `(world, batch, ...)`."""
    parts = torch.empty_like(rows)
    dist.all_to_all_single(parts, rows.contiguous())
    return parts.unflatten(0, (world_size(), -1))
