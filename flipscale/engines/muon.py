"""Muon: momentum made orthogonal by a Newton-Schulz iteration, with the matrices distributed over the processes.

The iteration needs whole matrices, and repeating it on every process would be a waste. So each process does it for some
of the matrices, several of one shape at a time. Weights and momentum stay where the engine has them: whole, or sharded
by rows. Where groups of processes have a copy each (HSDP), each group does all the work, and nothing more is sent
between groups.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

# Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024); torch.optim.Muon has the same.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# Matrices that a process orthogonalises at once; this bounds the memory of a step.
_AT_ONCE = 8


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon's steps (Nesterov momentum, decoupled decay, rate times sqrt(rows / columns) for tall matrices)
    for matrices that are whole on every process, or DTensors sharded by rows.

    Args:
        dtype: of the iteration and of what the processes exchange for it.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], weight_decay: float, momentum: float, dtype: torch.dtype
    ) -> None:
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype
        self.found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Collective. Update the matrices that have a gradient, which must be the same ones on every process; where
        `found_inf`, fp32 `()` on their device, is 1, leave matrices and momentum as they are."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                rate = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                holders = _holders(parameters[0])
                at_once = _AT_ONCE * _world_size(holders)
                for first in range(0, len(parameters), at_once):
                    some = parameters[first : first + at_once]
                    updates = self._orthogonal([self._momentum(p, group["momentum"]) for p in some], shape, holders)
                    for parameter, update in zip(some, updates, strict=True):
                        values = local(parameter)
                        moved = values * (1.0 - group["lr"] * group["weight_decay"])
                        self._put(values, moved.sub_(update.to(values.dtype), alpha=rate))

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> torch.Tensor:
        """Update the momentum in place; return this process's shard of the Nesterov momentum."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(local(parameter))
        buffer, gradient = state["momentum_buffer"], local(gradient)
        self._put(buffer, buffer.lerp(gradient, 1.0 - momentum))
        return gradient.lerp(buffer, momentum).to(self.dtype)

    def _put(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Write `values` to a target, unless the step is left out."""
        if self.found_inf is None:
            target.copy_(values)
        else:
            torch.where(self.found_inf > 0.0, target, values, out=target)

    def _orthogonal(
        self, mine: list[torch.Tensor], shape: torch.Size, group: dist.ProcessGroup | None
    ) -> list[torch.Tensor]:
        """Return this process's shards of the orthogonal matrices; process i % world of the group computes matrix i."""
        world = _world_size(group)
        if world == 1:
            return list(orthogonalise(torch.stack(mine)))
        rank, count = dist.get_rank(group), len(mine)
        each = -(-count // world)
        if mine[0].shape == shape:
            own = torch.stack([mine[min(rank + turn * world, count - 1)] for turn in range(each)])
            everyone = own.new_empty(world, *own.shape)
            dist.all_gather_single(everyone.flatten(0, 1), orthogonalise(own), group)
            return [everyone[number % world, number // world] for number in range(count)]
        rows = -(-shape[0] // world)
        parts = mine[0].new_zeros(each, world, rows, shape[1])
        for number, part in enumerate(mine):
            parts[number // world, number % world, : len(part)] = part
        whole = _exchange(parts.transpose(0, 1), group).transpose(0, 1).flatten(1, 2)[:, : shape[0]]
        whole = nn.functional.pad(orthogonalise(whole), (0, 0, 0, rows * world - shape[0]))
        back = _exchange(whole.unflatten(1, (world, rows)).transpose(0, 1), group)
        return [back[number % world, number // world, : len(part)] for number, part in enumerate(mine)]


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices `(count, rows, columns)` with the given ones' singular vectors, and singular values near 1."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor, which may be a DTensor."""
    # Asked by name, as DTensor takes a second to import.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _holders(parameter: nn.Parameter) -> dist.ProcessGroup | None:
    """Return the group that shares a matrix's work: the holders of its rows, or all (None) if each has it whole."""
    from torch.distributed.tensor import DTensor  # an engine that shards has imported it

    return parameter.device_mesh.get_group("shard") if isinstance(parameter, DTensor) else None


def _world_size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def _exchange(parts: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Collective. Send `parts[i]` to process i of the group; return what all sent to this one, in rank order."""
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous(), group=group)
    return received
