"""Muon: momentum made orthogonal by a Newton-Schulz iteration, with the matrices distributed over processes.

The iteration needs whole matrices. To not repeat it on every process, each process takes some matrices of about equal
work. One exchange without padding carries all shapes:

- Whole matrices (DDP): the processes of one machine share the work, and every machine does all of it. H/14's 336
  matrices take 28 Tflop. An eighth of that takes 9 ms on an H100 at 40 % of its peak. Each process receives 1.9 GB,
  which stay on the machine. Sharing with all 256 processes would save 8 ms and send as much over the network.
- Matrices sharded by rows (FSDP2): the processes with the rows share the work. Rows go to the computing process and
  back. Groups that hold a copy each (HSDP) all do the whole work, without messages between groups.
"""

import functools
import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

# Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024); torch.optim.Muon has the same.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# Largest number of matrices in one iteration, which bounds its memory.
_AT_ONCE = 8


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon's steps (Nesterov momentum, decoupled decay, rate times sqrt(rows / columns) for tall matrices)
    for matrices that are whole on every process, or DTensors sharded by rows.

    Args:
        dtype: dtype of the iteration and of its messages.
        group: processes that share the work on whole matrices; None if each does all of it.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype
        self.group = group
        self.found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Collective. Update the matrices that have a gradient, the same ones on every process.

        Gradients are overwritten. If `found_inf`, fp32 `()` on their device, is 1, matrices and momentum do not change.
        """
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            self._move_momentum(parameters, group["momentum"])
            first: Any = parameters[0]
            shards = first.device_mesh.get_group("shard") if hasattr(first, "to_local") else None  # None: it is whole
            if shards is None or dist.get_world_size(shards) == 1:
                updates = self._of_whole_ones(parameters, group["momentum"])
            else:
                updates = self._of_shards(parameters, group["momentum"], shards)
            kept: float | torch.Tensor = 1.0 - group["lr"] * group["weight_decay"]
            if self.found_inf is not None:
                kept = torch.where(self.found_inf > 0.0, 1.0, kept)
            for parameter, update in zip(parameters, updates, strict=True):
                values = local(parameter)
                rate = group["lr"] * math.sqrt(max(1.0, parameter.shape[0] / parameter.shape[1]))
                values.mul_(kept).sub_(update.to(values.dtype), alpha=rate)

    def _move_momentum(self, parameters: Sequence[nn.Parameter], momentum: float) -> None:
        share: float | torch.Tensor = 1.0 - momentum
        if self.found_inf is not None:
            share = torch.where(self.found_inf > 0.0, 0.0, share)
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(local(parameter))
            gradient = local(parameter.grad)  # type: ignore[arg-type]
            if self.found_inf is not None:
                # Needed besides the share of 0, because 0 times NaN is NaN.
                gradient.masked_fill_(self.found_inf > 0.0, 0.0)
            self.state[parameter]["momentum_buffer"].lerp_(gradient, share)

    def _nesterov(self, parameter: nn.Parameter, momentum: float) -> torch.Tensor:
        """Return this process's part of a matrix's Nesterov momentum."""
        gradient = local(parameter.grad)  # type: ignore[arg-type]
        return gradient.lerp(self.state[parameter]["momentum_buffer"], momentum).to(self.dtype)

    def _orthogonal(self, matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the orthogonal matrices; zeros if the step is skipped. Matrices of one shape are computed together."""
        orthogonal: list[torch.Tensor] = [*matrices]
        for shape in dict.fromkeys(matrix.shape for matrix in matrices):
            numbers = [number for number, matrix in enumerate(matrices) if matrix.shape == shape]
            for first in range(0, len(numbers), _AT_ONCE):
                some = numbers[first : first + _AT_ONCE]
                results = orthogonalise(torch.stack([matrices[number] for number in some]))
                if self.found_inf is not None:
                    results.masked_fill_(self.found_inf > 0.0, 0.0)
                for number, result in zip(some, results, strict=True):
                    orthogonal[number] = result
        return orthogonal

    def _of_whole_ones(self, parameters: Sequence[nn.Parameter], momentum: float) -> list[torch.Tensor]:
        """Return the orthogonal matrices of this process and of the group's other processes."""
        shapes = tuple(parameter.shape for parameter in parameters)
        count = 1 if self.group is None else dist.get_world_size(self.group)
        owners, rank = assign_owners(shapes, count), dist.get_rank(self.group) if count > 1 else 0
        mine = [parameter for parameter, owner in zip(parameters, owners, strict=True) if owner == rank]
        results = self._orthogonal([self._nesterov(parameter, momentum) for parameter in mine])
        if count == 1:
            return results
        sizes = [[shape.numel() for shape, t in zip(shapes, owners, strict=True) if t == n] for n in range(count)]
        own = local(parameters[0]).new_empty(max(map(sum, sizes)), dtype=self.dtype)
        if results:
            torch.cat([result.reshape(-1) for result in results], out=own[: sum(sizes[rank])])
        everyone = own.new_empty(count, len(own))
        dist.all_gather_single(everyone.view(-1), own, self.group)
        parts = [iter(part[: sum(of)].split(of)) for part, of in zip(everyone, sizes, strict=True)]
        return [next(parts[owner]).view(shape) for shape, owner in zip(shapes, owners, strict=True)]

    def _of_shards(
        self, parameters: Sequence[nn.Parameter], momentum: float, group: dist.ProcessGroup
    ) -> list[torch.Tensor]:
        """Return this process's rows of the orthogonal matrices."""
        count, rank = dist.get_world_size(group), dist.get_rank(group)
        shapes = tuple(parameter.shape for parameter in parameters)
        # A process without rows of any matrix takes no matrix.
        owners = assign_owners(shapes, max(-(-s[0] // _rows(s, 0, count)) for s in shapes))
        order = sorted(range(len(shapes)), key=owners.__getitem__)
        held = [self._nesterov(parameters[number], momentum) for number in order]
        to_send = [0] * count
        for number, rows in zip(order, held, strict=True):
            to_send[owners[number]] += rows.numel()
        mine = [shapes[number] for number in order if owners[number] == rank]
        rows_of = [tuple(_rows(shape, other, count) for shape in mine) for other in range(count)]
        to_receive = [sum(n * s[1] for n, s in zip(rows, mine, strict=True)) for rows in rows_of]
        received = _exchange(torch.cat([rows.reshape(-1) for rows in held]), to_send, to_receive, group)
        results = self._orthogonal(_from_rows(received, rows_of, mine))
        back = _exchange(_into_rows(results, rows_of, received), to_receive, to_send, group)
        parts = back.split([rows.numel() for rows in held])
        rows_of_number = {number: part.view(rows.shape) for number, part, rows in zip(order, parts, held, strict=True)}
        return [rows_of_number[number] for number in range(len(shapes))]


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices `(count, rows, columns)` with the same singular vectors and with singular values near 1."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


@functools.lru_cache(maxsize=8)
def assign_owners(shapes: tuple[torch.Size, ...], count: int) -> list[int]:
    """Assign each matrix to one of `count` processes: the largest first, each to the process with the least work."""
    owners = [0] * len(shapes)
    work = [(0, owner) for owner in range(count)]
    sides = [sorted(shape) for shape in shapes]
    operations = [_ITERATIONS * short * short * (4 * long + 2 * short) for short, long in sides]
    for number in sorted(range(len(shapes)), key=lambda number: -operations[number]):
        done, owners[number] = work[0]
        heapq.heapreplace(work, (done + operations[number], owners[number]))
    return owners


def buffer_elements(shapes: Sequence[torch.Size], count: int, is_sharded: bool) -> int:
    """Return the number of elements that a step needs on the fullest of `count` sharing processes.

    The matrices are sharded by rows over these processes, or whole on each.
    """
    if not shapes:
        return 0
    parts = [0] * count
    for shape, owner in zip(shapes, assign_owners(tuple(shapes), count), strict=True):
        parts[owner] += shape.numel()
    # Momentum, results and flat results of the process's own matrices; then all results, or the results' own rows.
    own = max(parts)
    exchanged = sum(_rows(s, 0, count) * s[1] for s in shapes) * 3 if is_sharded else count * own
    iteration = max(_AT_ONCE * (3 * s.numel() + 2 * min(s) ** 2) for s in shapes)
    return own * (2 if count == 1 else 3) + (exchanged if count > 1 else 0) + iteration


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor, which may be a DTensor."""
    # The attribute tells, because DTensor takes a second to import.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _rows(shape: torch.Size, rank: int, count: int) -> int:
    """Return the number of a matrix's rows on one of `count` ranks: equal on all but the last ones."""
    most = -(-shape[0] // count)
    return min(most, max(shape[0] - rank * most, 0))


def _exchange(values: torch.Tensor, to_send: list[int], to_receive: list[int], group: Any) -> torch.Tensor:
    """Collective. Send `to_send[i]` of the flat values to process i; return the received values by rank."""
    received = values.new_empty(sum(to_receive))
    dist.all_to_all_single(received, values, to_receive, to_send, group)
    return received


def _from_rows(
    received: torch.Tensor, rows_of: Sequence[tuple[int, ...]], shapes: Sequence[torch.Size]
) -> list[torch.Tensor]:
    """Return matrices from the processes' messages, which each have rows of every matrix."""
    pieces: list[list[torch.Tensor]] = [[] for _ in shapes]
    at = 0
    # Neighbours with equally many rows are copied together, so the number of copies does not grow with processes.
    for rows, run in itertools.groupby(rows_of):
        times, sizes = len(list(run)), [n * shape[1] for n, shape in zip(rows, shapes, strict=True)]
        block = received[at : at + times * sum(sizes)].view(times, sum(sizes))
        at += block.numel()
        for piece, part in zip(pieces, block.split(sizes, dim=1), strict=True):
            piece.append(part.reshape(-1))
    return [torch.cat(piece).view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _into_rows(
    matrices: Sequence[torch.Tensor], rows_of: Sequence[tuple[int, ...]], like: torch.Tensor
) -> torch.Tensor:
    """Return the messages back to the processes: the inverse of `_from_rows`."""
    if not matrices:
        return like.new_empty(0)
    flat, at, parts = [matrix.reshape(-1) for matrix in matrices], [0] * len(matrices), []
    for rows, run in itertools.groupby(rows_of):
        times, blocks = len(list(run)), []
        for number, matrix in enumerate(matrices):
            size = times * rows[number] * matrix.shape[1]
            blocks.append(flat[number][at[number] : at[number] + size].view(times, size // times))
            at[number] += size
        parts.append(torch.cat(blocks, dim=1).view(-1))
    return torch.cat(parts)
