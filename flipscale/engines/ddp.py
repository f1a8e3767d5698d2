"""Data parallel: every process holds the whole model, and gradients are averaged. Also the engine of one process."""

import warnings
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flipscale.engines.engine import Engine, ModelMemory
from flipscale.engines.launch import PATIENCE, Launch


class DdpEngine(Engine):
    """torch's DistributedDataParallel, products in bf16 by autocast."""

    @classmethod
    def memory(cls, model: nn.Module, launch: Launch, accumulates: bool = False) -> ModelMemory:
        """Return the memory: everything is whole, and gradients are accumulated and sent in place."""
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
        whole, trained = sum(parameter.numel() for parameter in model.parameters()), sum(sizes.values())
        return ModelMemory(weights=whole, copies=0, gradients=trained, moments=sizes, communication_bytes=0)

    def _wrap(self) -> nn.Module:
        if self.accelerator.num_processes == 1:
            return self.model
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else None
        # `broadcast_buffers` is off because all buffers are fixed tables. Not every torch has its new name.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        return DistributedDataParallel(
            self.model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def _muon_group(self) -> dist.ProcessGroup | None:
        world, count = self.accelerator.num_processes, self.launch.neighbours
        if self.recipe.name != "muon" or world == 1:
            return None
        if count == world:
            return dist.group.WORLD
        first = self.accelerator.process_index // count * count
        return dist.new_group(range(first, first + count), timeout=PATIENCE, use_local_synchronization=True)

    def __call__(self, **batch: Any) -> Any:
        with self.accelerator.autocast():
            return super().__call__(**batch)

    def _reduce_gradients(self, enabled: bool) -> None:
        if isinstance(self.wrapped, DistributedDataParallel):
            self.wrapped.require_backward_grad_sync = enabled
