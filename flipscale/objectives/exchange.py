"""The exchange of texts between processes, so that each process's images meet all texts of the batch.

The texts are gathered on every process at once. A loss of `V` views of `b` pairs of width `d` on each of `N` processes
takes these collectives, for any `N`. Sizes are input and output of one process, in numbers of 4 bytes:

| | in | out | infonce | sigmoid |
|---|---:|---:|---|---|
| all-gather of the texts | b d | N b d | 1 | 1 |
| all-to-all of the texts' log-sum-exps | 2 V N b | 2 V N b | 1 | |
| all-gather of the texts' softmax | 2 V b | 2 V N b | 1 | |
| reduce-scatter of the texts' gradients (on CPUs all-to-all, `N b d` out) | N b d | b d | 1 | 1 |
| all-reduce of three numbers, on CPUs only (`tiles.common_shift`) | 3 | 3 | 1 | |
| all-gather of the captions' ids, only if equal captions are positives | 2 b | 2 N b | | 1 |
"""

import torch
import torch.distributed as dist

from flipscale.objectives.tiles import LogSumExp, Softmax, merge


def world_size() -> int:
    """Return the number of processes that share a batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def exchange_bytes(pairs: int, world: int, dim: int, views: int = 1, device_type: str = "cuda") -> int:
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
    received = world * texts if device_type == "cpu" else texts
    return 2 * world * texts + received + world * along


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


class GatheredTexts:
    """The texts of all processes, on every process.

    Attributes:
        rows: `(processes * batch, dim)`.
        first: index in `rows` of this process's first text, which is that of its first image.
    """

    def __init__(self, texts: torch.Tensor, begun: EarlyGather | None = None):
        """Collective. Gather `texts` `(batch, dim)`, the same `batch` on every process, or take the gather `begun`."""
        self._world = world_size()
        self.first = dist.get_rank() * len(texts) if self._world > 1 else 0
        if begun is not None:
            self.rows = begun.wait().to(texts.dtype)
        else:
            self.rows = _gather(texts).flatten(0, 1) if self._world > 1 else texts

    def bring(self, softmax: list[Softmax]) -> list[Softmax]:
        """Collective. Return each softmax of all processes' texts, from those of this process's texts."""
        if self._world == 1:
            return softmax
        everywhere = _gather(torch.stack([tensor for one in softmax for tensor in one]))
        return [Softmax(*one) for one in everywhere.transpose(0, 1).flatten(1, 2).unflatten(0, (-1, 2))]

    def merged(self, negatives: list[LogSumExp]) -> list[LogSumExp]:
        """Collective. Return the negatives of this process's texts on all processes, from those of all texts here."""
        if self._world == 1:
            return negatives
        parts = torch.stack([tensor.unflatten(0, (self._world, -1)) for one in negatives for tensor in one], dim=1)
        return [merge(LogSumExp(*one.unbind(1))) for one in _to_owner(parts).unflatten(1, (-1, 2)).unbind(1)]

    def summed(self, rows: torch.Tensor) -> torch.Tensor:
        """Collective. Return the sum over the processes of the rows of this process's texts."""
        return _sum_to_owner(rows.unflatten(0, (self._world, -1))) if self._world > 1 else rows


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
