"""How the texts of the whole batch meet the images of each process: all gathered at once, or passed around a ring.

Gathered, a loss of `V` views of `b` pairs of width `d` on each of `N` processes takes these collectives, however many
processes there are. Sizes are numbers of 4 bytes, of what goes in and what comes out on one process:

| | in | out | infonce | sigmoid |
|---|---:|---:|---|---|
| all-gather of the texts | b d | N b d | 1 | 1 |
| all-to-all of the texts' log-sum-exps | 2 V N b | 2 V N b | 1 | |
| all-gather of the texts' softmax | 2 V b | 2 V N b | 1 | |
| reduce-scatter of the texts' gradients (on CPUs all-to-all, `N b d` out) | N b d | b d | 1 | 1 |
| all-reduce of three numbers, on CPUs only (`logsumexp.common_shift`) | 3 | 3 | 1 | |

A ring sends the same numbers in pieces of a process each: `N - 1` of texts and `N` of what was found for them, in each
of infonce's two passes and in sigmoid's one. See `Ring` for what that costs.

Both start when both towers have ended. Starting the gather when the text tower has ended, beside the image tower, did
not pay: it takes 0.2 % of the step of a tiny model at 1,024 pairs on each of two CPU processes, and 0.01 % of B/16's
step at 136.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

EXCHANGES = ("gather", "ring")
# Tensors of one shape and dtype that have a row for each of some texts.
Rows = tuple[torch.Tensor, ...]
# How the finds of several processes for the same texts, `(processes, texts)` each, become one.
Merge = Callable[[Rows], Rows]


def world_size() -> int:
    """Return how many processes share a batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def exchange_bytes(exchange: str, pairs: int, world: int, dim: int, views: int = 1, device_type: str = "cuda") -> int:
    """Return the most bytes that an exchange holds at once on one of `world` processes beside its own embeddings: other
    processes' texts, the gradients for them, and what is on its way.

    Args:
        pairs: of one process.
        dim: width of the embeddings, in fp32.
        views: of each image.
        device_type: reduce-scatter is all-to-all on `cpu`, whose output is as large as its input.
    """
    if world == 1:
        return 0
    texts, along = 4 * pairs * dim, 4 * 2 * views * pairs
    if exchange == "ring":
        # Texts that were here, are here and arrive; gradients that are being found, leave and arrive.
        return 6 * texts + 2 * along
    received = world * texts if device_type == "cpu" else texts
    return 2 * world * texts + received + world * along


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
    """Every process, of two at least, holds all texts: as many messages in any world, and memory that grows with it."""

    def __init__(self, texts: torch.Tensor):
        """Collective. Gather `texts` `(batch, dim)`, the same `batch` on every process."""
        self.first = dist.get_rank() * len(texts)
        self.texts = _gather(texts).flatten(0, 1)
        self.reduced: Rows = ()

    def visits(self, merge: Merge | None, *along: torch.Tensor) -> Iterator[Visit]:
        """Collective. Yield `(first_pair, texts, slot)` until these images have met all texts: `first_pair` is the text
        that is image 0's own, which may be outside of `texts`.

        Afterwards `reduced` is what all processes found for this process's texts.

        Args:
            merge: how finds become one; None adds them.
            along: tensors with a row for each of this process's texts, which travel with them.
        """
        slot = Slot(_unpacked(_gather(_packed(along)).transpose(0, 1).flatten(1, 2)) if along else ())
        yield self.first, self.texts, slot
        # Taken out of the slot, which whoever iterates still holds.
        found, slot.found = slot.found, ()
        by_owner = tuple(rows.unflatten(0, (world_size(), -1)) for rows in found)
        if merge is None:
            self.reduced = tuple(_sum_to_owner(rows) for rows in by_owner)
        else:
            self.reduced = merge(_to_owner(torch.stack(by_owner, dim=1)).unbind(1))


class Ring:
    """The texts go round, from each process to the one before it. What was found for them follows a step behind, to be
    reduced just in time. Both travel while tiles are multiplied; memory does not grow with the world.

    Its launches and the messages that it waits for do: at 256 processes infonce is 512 visits, each with tiles of one
    process's texts, and 1,022 messages, where the gathered exchange has 2 and 4. It is for batches whose texts do not
    fit (`exchange_bytes`), and for so few processes that the products of a visit take longer than its message.
    """

    def __init__(self, texts: torch.Tensor):
        self.texts = texts
        self.world = world_size()
        self.rank = dist.get_rank() if self.world > 1 else 0
        self.reduced: Rows = ()

    def visits(self, merge: Merge | None, *along: torch.Tensor) -> Iterator[Visit]:
        """Collective. Do what `Gathered.visits` does."""
        texts: Rows = (self.texts, *((_packed(along),) if along else ()))
        behind: _Passing | None = None
        for step in range(self.world):
            owner = (self.rank + step) % self.world
            ahead = self._pass_on(texts) if step < self.world - 1 else None
            slot = Slot(_unpacked(*texts[1:]) if along else ())
            yield (self.rank - owner) * len(self.texts), texts[0], slot
            # Taken out of the slot, as above.
            found, slot.found = slot.found, ()
            if behind is not None:
                found = _reduce_two(merge, found, _unpacked(*behind.wait()))
            if self.world == 1:
                self.reduced = found
                return
            behind = self._pass_on((_packed(found),))
            if ahead is not None:
                texts = ahead.wait()
        assert behind is not None
        self.reduced = _unpacked(*behind.wait())

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


def exchange_of(texts: torch.Tensor, exchange: str) -> Gathered | Ring:
    """Collective. Return the exchange of that name; a single process needs none and takes the ring of one."""
    return Gathered(texts) if exchange == "gather" and world_size() > 1 else Ring(texts)


def _packed(rows: Rows) -> torch.Tensor:
    """Return one tensor `(count, batch, ...)`, to travel as one message."""
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)


def _unpacked(message: torch.Tensor) -> Rows:
    return message.unbind(0)


def _reduce_two(merge: Merge | None, one: Rows, other: Rows) -> Rows:
    if merge is None:
        return tuple(a.add_(b) for a, b in zip(one, other, strict=True))
    return merge(tuple(torch.stack(pair) for pair in zip(one, other, strict=True)))


def _gather(rows: torch.Tensor) -> torch.Tensor:
    """Return what all processes have, `(world, *rows.shape)`."""
    everywhere = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_single(everywhere, rows.contiguous())
    return everywhere.unflatten(0, (world_size(), -1))


def _to_owner(parts: torch.Tensor) -> torch.Tensor:
    """Send part r of `(world, ...)` to process r; return what this process was sent, in the same shape."""
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts)
    return received


def _sum_to_owner(parts: torch.Tensor) -> torch.Tensor:
    """Return the sum over processes of their part `r` of `(world, ...)`, on process r.

    gloo has no reduce-scatter of its own: it reduces all parts everywhere, which took 1.5 times as long as sending
    each where it belongs (2 and 4 processes, 2,048 rows of 512 each).
    """
    if parts.device.type == "cpu":
        return _to_owner(parts.contiguous()).sum(0)
    mine = parts.new_empty(parts.shape[1:])
    dist.reduce_scatter_single(mine, parts.flatten(0, 1).contiguous())
    return mine
