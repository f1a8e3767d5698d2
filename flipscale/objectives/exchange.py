"""The exchange of texts between processes, so that each process's images meet all texts of the batch.

The texts are gathered on every process at once, or passed around a ring.

With `gather`, a loss of `V` views of `b` pairs of width `d` on each of `N` processes takes these collectives, for any
`N`. Sizes are input and output of one process, in numbers of 4 bytes:

| | in | out | infonce | sigmoid |
|---|---:|---:|---|---|
| all-gather of the texts | b d | N b d | 1 | 1 |
| all-to-all of the texts' log-sum-exps | 2 V N b | 2 V N b | 1 | |
| all-gather of the texts' softmax | 2 V b | 2 V N b | 1 | |
| reduce-scatter of the texts' gradients (on CPUs all-to-all, `N b d` out) | N b d | b d | 1 | 1 |
| all-reduce of three numbers, on CPUs only (`tiles.common_shift`) | 3 | 3 | 1 | |
| all-gather of the captions' ids, only if equal captions are positives | 2 b | 2 N b | 1 | 1 |

A ring sends the same numbers in pieces, one process's each. A pass has `N - 1` messages of texts and `N` of results;
infonce has two passes, sigmoid one. See `Ring` for the cost.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

EXCHANGES = ("gather", "ring")
# Tensors of one shape and dtype with a row for each text.
Rows = tuple[torch.Tensor, ...]
# Merges the results of several processes for the same texts, `(processes, texts)` each.
Merge = Callable[[Rows], Rows]


def world_size() -> int:
    """Return the number of processes that share a batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def exchange_bytes(exchange: str, pairs: int, world: int, dim: int, views: int = 1, device_type: str = "cuda") -> int:
    """Return the peak bytes of an exchange on one of `world` processes, without the process's own embeddings.

    These are other processes' texts, their gradients, and messages in transit.

    Args:
        pairs: number of pairs of one process.
        dim: width of the embeddings, in fp32.
        device_type: `cpu` or `cuda`; on `cpu` all-to-all replaces reduce-scatter, with an output as large as its input.
    """
    if world == 1:
        return 0
    texts, along = 4 * pairs * dim, 4 * 2 * views * pairs
    if exchange == "ring":
        # Three texts: previous, current and arriving. Three gradients: in computation, leaving and arriving.
        return 6 * texts + 2 * along
    received = world * texts if device_type == "cpu" else texts
    return 2 * world * texts + received + world * along


@dataclass
class Slot:
    """Rows that travelled `along` with a visit's texts, and this process's `results`, set by the caller of `visits`."""

    along: Rows
    results: Rows = ()


Visit = tuple[int, torch.Tensor, Slot]


class Gathered:
    """All texts on every process, of two or more: a fixed number of messages, and memory that grows with the world."""

    def __init__(self, texts: torch.Tensor, begun: "EarlyGather | None" = None):
        """Collective. Gather `texts` `(batch, dim)`, the same `batch` on every process, or take the gather `begun`."""
        self.first = dist.get_rank() * len(texts)
        self.texts = _gather(texts).flatten(0, 1) if begun is None else begun.wait().to(texts.dtype)
        self.reduced: Rows = ()

    def visits(self, merge: Merge | None, *along: torch.Tensor) -> Iterator[Visit]:
        """Collective. Yield `(first_pair, texts, slot)` until this process's images have met all texts.

        `first_pair` is the index in `texts` of image 0's own text; it may lie outside of `texts`. Afterwards `reduced`
        has the merged results of all processes for this process's texts.

        Args:
            merge: function that merges results; None adds them.
            along: tensors with a row for each of this process's texts, which travel with the texts.
        """
        slot = Slot(_gather(_packed(along)).transpose(0, 1).flatten(1, 2).unbind(0) if along else ())
        yield self.first, self.texts, slot
        # Taken out of the slot, because the caller still holds the slot.
        results, slot.results = slot.results, ()
        by_owner = tuple(rows.unflatten(0, (world_size(), -1)) for rows in results)
        if merge is None:
            self.reduced = tuple(_sum_to_owner(rows) for rows in by_owner)
        else:
            self.reduced = merge(_to_owner(torch.stack(by_owner, dim=1)).unbind(1))


class EarlyGather:
    """The gather of a step's texts, which begins when the text tower is done and goes on beside the image tower."""

    def __init__(self, micro_batches: int):
        self._missing, self._own = micro_batches, torch.empty(0)

    def add(self, texts: torch.Tensor) -> None:
        """Collective. Take the embeddings `(batch, dim)` of the next micro-batch, and gather all after the last."""
        self._own = torch.cat([self._own, texts.detach()]) if len(self._own) else texts.detach().contiguous()
        self._missing -= 1
        if not self._missing:
            self._everywhere = texts.new_empty(world_size() * len(self._own), texts.shape[1])
            self._work = dist.all_gather_single(self._everywhere, self._own, async_op=True)

    def wait(self) -> torch.Tensor:
        """Return the texts of all processes `(processes * batch, dim)`, once. A GPU's stream waits for them."""
        self._work.wait()
        everywhere = self._everywhere
        # This object outlives the loss, and the backward pass needs the memory.
        del self._work, self._everywhere, self._own
        return everywhere


class Ring:
    """Texts that go around, from each process to the one before it; memory does not grow with the world.

    The results for the texts follow one step behind, and each process merges its own. Both travel during the products.

    Launches and messages do grow with the world. At 256 processes infonce takes 512 visits and 1,022 messages, where
    `Gathered` takes 2 and 4. Use the ring where the texts do not fit (`exchange_bytes`).
    """

    def __init__(self, texts: torch.Tensor):
        self.texts = texts
        self.world = world_size()
        self.rank = dist.get_rank() if self.world > 1 else 0
        self.reduced: Rows = ()

    def visits(self, merge: Merge | None, *along: torch.Tensor) -> Iterator[Visit]:
        """Collective. Yield the same as `Gathered.visits`, in several visits."""
        texts: Rows = (self.texts, *((_packed(along),) if along else ()))
        behind: _Passing | None = None
        for step in range(self.world):
            owner = (self.rank + step) % self.world
            ahead = self._pass_on(texts) if step < self.world - 1 else None
            slot = Slot(texts[1].unbind(0) if along else ())
            yield (self.rank - owner) * len(self.texts), texts[0], slot
            # Taken out of the slot, because the caller still holds the slot.
            results, slot.results = slot.results, ()
            if behind is not None:
                results = _reduce_two(merge, results, behind.wait()[0].unbind(0))
            if self.world == 1:
                self.reduced = results
                return
            behind = self._pass_on((_packed(results),))
            if ahead is not None:
                texts = ahead.wait()
        assert behind is not None
        self.reduced = behind.wait()[0].unbind(0)

    def _pass_on(self, rows: Rows) -> "_Passing":
        return _Passing(rows, (self.rank - 1) % self.world, (self.rank + 1) % self.world)


class _Passing:
    """Tensors in transit to process `to`, and tensors of the same shapes in transit from process `source`."""

    def __init__(self, rows: Rows, to: int, source: int):
        self._sent = tuple(part.contiguous() for part in rows)
        self._received = tuple(torch.empty_like(part) for part in self._sent)
        sends = [dist.P2POp(dist.isend, part, to) for part in self._sent]
        receives = [dist.P2POp(dist.irecv, part, source) for part in self._received]
        self._works = dist.batch_isend_irecv([*sends, *receives])

    def wait(self) -> Rows:
        """Return the received tensors."""
        for work in self._works:
            work.wait()
        return self._received


def exchange_of(texts: torch.Tensor, exchange: str, begun: EarlyGather | None = None) -> Gathered | Ring:
    """Collective. Return the exchange of this name; a single process uses a ring of one."""
    return Gathered(texts, begun) if exchange == "gather" and world_size() > 1 else Ring(texts)


def _packed(rows: Rows) -> torch.Tensor:
    """Stack the rows into one message `(count, batch, ...)`."""
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)


def _reduce_two(merge: Merge | None, one: Rows, other: Rows) -> Rows:
    if merge is None:
        return tuple(a.add_(b) for a, b in zip(one, other, strict=True))
    return merge(tuple(torch.stack(pair) for pair in zip(one, other, strict=True)))


def _gather(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows of all processes, `(world, *rows.shape)`."""
    everywhere = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_single(everywhere, rows.contiguous())
    return everywhere.unflatten(0, (world_size(), -1))


def _to_owner(parts: torch.Tensor) -> torch.Tensor:
    """Send part r of `(world, ...)` to process r; return the parts that this process received, in the same shape."""
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts)
    return received


def _sum_to_owner(parts: torch.Tensor) -> torch.Tensor:
    """Return on process r the sum over all processes of part r of `(world, ...)`.

    On CPUs this uses all-to-all, because gloo's reduce-scatter reduces all parts everywhere. That took 1.5 times as
    long (2 and 4 processes, 2,048 rows of 512 each).
    """
    if parts.device.type == "cpu":
        return _to_owner(parts.contiguous()).sum(0)
    mine = parts.new_empty(parts.shape[1:])
    dist.reduce_scatter_single(mine, parts.flatten(0, 1).contiguous())
    return mine
