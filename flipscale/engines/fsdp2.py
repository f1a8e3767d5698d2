"""FSDP2: weights, gradients and moments are sharded by rows; a block's weights are whole only while it computes.

They are sharded over all processes, or over groups of processes that each hold a copy (HSDP).
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from flipscale.engines.checkpoint import CheckpointReader
from flipscale.engines.engine import Engine, Layout, ModelMemory, Shard, ShardedLayout, gradient_norm
from flipscale.engines.launch import PATIENCE, Launch
from flipscale.engines.muon import local
from flipscale.engines.optimizers import encoder_blocks, num_trained
from flipscale.model.modeling_flip import FlipProjection


class Fsdp2Engine(Engine):
    """`fully_shard` on every block, the towers, the projections and the rest.

    In bf16 the weights of blocks and towers are gathered in bf16 and compute in bf16; gradients are reduced in fp32,
    or in bf16 with `launch.reduce_in_bf16`.
    The projections, `logit_scale`, embeddings and the loss are fp32 throughout. `launch.shard_size` neighbouring
    processes share one copy of the weights.
    """

    autocasts = False

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        if not dist.is_initialized():
            backend = "nccl" if self.accelerator.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        # The warning is about outputs that are changed in place, and nothing here does that.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        shard_size = self.launch.shard_size or dist.get_world_size()
        self._num_replicas = dist.get_world_size() // shard_size
        # With several groups of processes, the stream of all messages of weights and gradients.
        self._messages: Any = None
        mesh = {"shard": shard_size}
        if self._num_replicas > 1:
            self.name = "hsdp"
            mesh = {"replicate": self._num_replicas, **mesh}
        self._mesh = init_device_mesh(self.accelerator.device.type, tuple(mesh.values()), mesh_dim_names=tuple(mesh))
        for group in self._mesh.get_all_groups():
            _set_pg_timeout(PATIENCE, group)

    @classmethod
    def memory(cls, model: nn.Module, launch: Launch, accumulates: bool = False) -> ModelMemory:
        """Return the memory of the first process of a group, which has the most rows of every parameter.

        Replicas sum a shard's gradients in place. Between the passes of a step, gradients are kept in fp32 and whole.
        """
        count = launch.shard_size or launch.num_processes
        rows = {name: -(-p.shape[0] // count) * p.shape[1:].numel() for name, p in model.named_parameters()}
        trained = {name: rows[name] for name, p in model.named_parameters() if p.requires_grad}
        kept = sum(rows.values())
        gradients = num_trained(model) if accumulates else sum(trained.values())
        blocks = [(sum(p.numel() for p in block.parameters()), num_trained(block)) for block in encoder_blocks(model)]
        rest = sum(p.numel() for p in model.parameters()) + num_trained(model) - sum(map(sum, blocks))
        # The computing block and the next, already gathered block; a block's gradients in both precisions; the weights
        # outside of blocks with their gradients, which are sent after the backward pass.
        width = 2 if launch.bf16 else 4
        of_blocks = [2 * width * whole + (width + 4) * learned for whole, learned in blocks]
        gathered = max(of_blocks, default=0) + rest * width
        if not launch.reshard_after_forward:
            gathered += sum(width * whole for whole, _ in blocks[2:])
        return ModelMemory(kept, 0, gradients, trained, gathered if launch.num_processes > 1 else 0)

    def shard(self, part: nn.Module, is_block: bool = True) -> Layout:
        replicas = self._mesh.get_group("replicate") if self._num_replicas > 1 else None
        layout = _RowLayout(part, dist.get_rank(), dist.get_world_size(), replicas)
        if is_block:
            self._fully_shard(part)
            return layout
        part.to(self.accelerator.device)
        for child in part.children():
            self._fully_shard(child, torch.float32, fp32=isinstance(child, nn.Linear | FlipProjection))
        self._fully_shard(part, fp32=True)
        for child in part.children() if self.launch.prefetches else ():
            blocks = [module for module in child.modules() if isinstance(module, FSDPModule) and module is not child]
            for block, following in itertools.pairwise(blocks):
                block.set_modules_to_forward_prefetch([following])
        return layout

    def _fully_shard(self, module: nn.Module, output_dtype: torch.dtype | None = None, fp32: bool = False) -> None:
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if self.launch.bf16 and not fp32:
            summed = torch.bfloat16 if self.launch.reduce_in_bf16 else torch.float32
            policy = MixedPrecisionPolicy(torch.bfloat16, summed, output_dtype)
        # By default the root alone stays whole.
        reshard = None if self.launch.reshard_after_forward else False
        fully_shard(module, mesh=self._mesh, mp_policy=policy, reshard_after_forward=reshard)

    def _freeze(self, frozen: Sequence[str]) -> None:
        model: nn.Module = self.model
        assert isinstance(model, FSDPModule)
        # The model must be the root, but an evaluation may call a tower before training has called the model. And FSDP2
        # looks once for the modules to reduce gradients of, so all that some stage trains must still be trainable.
        state = model._get_fsdp_state()
        state._lazy_init()
        if self._num_replicas > 1:
            self._put_in_order(state._comm_ctx)
        super()._freeze(frozen)

    def _put_in_order(self, context: Any) -> None:
        """Queue all messages of weights and gradients on one stream.

        NCCL may deadlock if messages of several groups run side by side, in an order of each process's own.
        """
        context.all_gather_stream = context.all_reduce_stream = self._messages = context.reduce_scatter_stream

    def __call__(self, **batch: Any) -> Any:
        if self._messages is not None and "on_texts" in batch:
            batch["on_texts"] = functools.partial(self._send_in_order, batch["on_texts"])
        return super().__call__(**batch)

    def _send_in_order(self, send: Callable[[torch.Tensor], dist.Work | None], texts: torch.Tensor) -> None:
        """Collective. Send the texts beside the image tower, whose weights are gathered after them."""
        work = send(texts)
        if work is not None:
            with torch.get_device_module(self.accelerator.device).stream(self._messages):
                work.wait()

    def _backward(self, loss: torch.Tensor) -> None:
        if self._messages is not None:
            # The messages of the loss come before those of the backward pass.
            self._messages.wait_stream(torch.get_device_module(self.accelerator.device).current_stream())
        super()._backward(loss)

    def _reduce_gradients(self, enabled: bool) -> None:
        self.wrapped.set_requires_gradient_sync(enabled)
        if not self.launch.reshard_after_forward:
            # Weights stay whole until the step's last backward pass.
            self.wrapped.set_reshard_after_backward(enabled)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        with super().averaged():
            yield
            # Without a backward pass, weights stay whole that are not dropped after a forward pass.
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def gradient_norm(self) -> torch.Tensor:
        # Groups with a copy each (HSDP) have the same gradients, so each sums its own.
        group = self._mesh.get_group("shard") if self._mesh["shard"].size() > 1 else None
        return gradient_norm(self._parameters, self.recipe.max_grad_norm, group)


class _RowLayout(ShardedLayout):
    """Each process holds a range of every parameter's rows; with replicas, several processes hold the same range."""

    def __init__(self, model: nn.Module, rank: int, world: int, replicas: dist.ProcessGroup | None):
        super().__init__(model, rank, world)
        self._replicas = replicas
        self._num_replicas, self._replica = (replicas.size(), replicas.rank()) if replicas is not None else (1, 0)
        # First element of each parameter here. Kept, because DTensor takes 50 us to compute one, and averages of the
        # weights ask for all of them in each step.
        self._firsts: dict[Any, int] = {}

    def weights(self, parameter: Any) -> Shard:
        return self._shard(parameter, parameter)

    def _shard(self, parameter: Any, moment: torch.Tensor) -> Shard:
        assert isinstance(parameter, DTensor)
        if parameter not in self._firsts:
            place = (parameter.shape, parameter.device_mesh, parameter.placements)
            _, offset = compute_local_shape_and_global_offset(*place)
            self._firsts[parameter] = min(offset[0] * parameter.shape[1:].numel(), parameter.numel())
        with torch.no_grad():  # else DTensor would take part in autograd, and take longer
            return Shard(local(moment).view(-1), self._firsts[parameter])

    def saved_ranges(self) -> dict[str, range]:
        """Return the rows that this process holds of the parameters that its replica saves."""
        savers, ranges = self._savers(), {}
        for name, parameter in self.model.named_parameters():
            values, first = self.weights(parameter)
            ranges[name] = range(first, first + values.numel() * (savers[name] == self._replica))
        return ranges

    def _savers(self) -> dict[str, int]:
        """Return the replica that saves each parameter."""
        sizes = {name: shape.numel() for name, shape in self.shapes().items()}
        total, start, savers = sum(sizes.values()), 0, {}
        for name, size in sizes.items():
            savers[name] = (start + size // 2) * self._num_replicas // total
            start += size
        return savers

    def fill(self, reader: CheckpointReader, kind: str, shards: Mapping[str, Shard]) -> None:
        """Collective. Fill this process's rows. Each replica reads what it would save, and sends it to the others."""
        savers = self._savers()
        super().fill(reader, kind, {name: one for name, one in shards.items() if savers[name] == self._replica})
        for name, (values, _) in shards.items() if self._num_replicas > 1 else ():
            if values.numel():
                dist.broadcast(values, group=self._replicas, group_src=savers[name])
