"""FSDP2: weights, gradients and moments sharded by rows; a block's weights are whole only while it computes.

Sharded over all processes, or over groups of them that each hold a copy (HSDP).
"""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from flipscale.engines.engine import Engine, Part
from flipscale.engines.optimizers import moment_names


class Fsdp2Engine(Engine):
    """`fully_shard` on every block, the towers, the projections and the rest.

    In bf16 the blocks and towers are gathered in bf16 and compute in it; gradients are reduced in fp32. The
    projections and `logit_scale`, and with them the embeddings and the loss, are fp32 throughout.

    Args:
        shard_size: neighbouring processes that share one copy of the weights; None for all processes.
    """

    name = "fsdp2"

    def __init__(self, *arguments: Any, shard_size: int | None):
        super().__init__(*arguments)
        if not dist.is_initialized():
            backend = "nccl" if self.accelerator.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        # Nothing here changes an output in place, which is what the warning is about.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        shard_size = shard_size or dist.get_world_size()
        self._replica, self._num_replicas = dist.get_rank() // shard_size, dist.get_world_size() // shard_size
        mesh = {"shard": shard_size}
        if self._num_replicas > 1:
            self.name = "hsdp"
            mesh = {"replicate": self._num_replicas, **mesh}
        self._mesh = init_device_mesh(self.accelerator.device.type, tuple(mesh.values()), mesh_dim_names=tuple(mesh))

    def _shard(self, module: nn.Module, output_dtype: torch.dtype | None = None, fp32: bool = False) -> None:
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if self.accelerator.mixed_precision == "bf16" and not fp32:
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype)
        fully_shard(module, mesh=self._mesh, mp_policy=policy)

    def _keep(self, block: nn.Module) -> None:
        self._shard(block)

    def _keep_rest(self) -> None:
        self.weights.to(self.accelerator.device)
        for part in self.weights.children():
            self._shard(part, torch.float32, fp32=isinstance(part, nn.Linear))
        self._shard(self.weights, fp32=True)

    def prepare(self) -> None:
        self.model = self.weights
        assert isinstance(self.model, FSDPModule)
        # An evaluation may call a tower before training has called the model, which must be the root of all.
        self.model._get_fsdp_state()._lazy_init()
        self._build_optimizers()

    def __call__(self, **batch: Any) -> Any:
        return self.model(**batch, return_logits=False)

    def _reduce_gradients(self, enabled: bool) -> None:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(enabled)

    def gradient_norm(self) -> torch.Tensor:
        norm = super().gradient_norm()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def resident(self, parameter: nn.Parameter) -> Part:
        return self._rows(parameter, parameter)

    def moments(self, parameter: nn.Parameter) -> dict[str, Part]:
        for optimizer in self.optimizers:
            if parameter in optimizer.state:
                state = optimizer.state[parameter]
                return {name: self._rows(parameter, state[name]) for name in moment_names(optimizer)}
        return {}

    def share(self) -> dict[str, range]:
        """Of the rows that this process holds, those of the parameters that are its replica's to write."""
        total, start, found = sum(shape.numel() for shape in self.shapes().values()), 0, {}
        for name, parameter in self.weights.named_parameters():
            values, first = self.resident(parameter)
            writer = (start + parameter.numel() // 2) * self._num_replicas // total
            found[name] = range(first, first + values.numel() * (writer == self._replica))
            start += parameter.numel()
        return found

    def _rows(self, parameter: nn.Parameter, tensor: torch.Tensor) -> Part:
        assert isinstance(parameter, DTensor)
        local = tensor.detach().to_local()  # type: ignore[attr-defined]
        _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        row = parameter.shape[1:].numel()
        return local.view(-1), min(offset[0] * row, parameter.numel())
