"""A batch in one buffer: one shared-memory segment from the worker, one pinned copy, one transfer to the device."""

import math
from typing import Any, NamedTuple

import torch

from flipscale.data.faults import Fault

_ALIGNMENT = 64


class Field(NamedTuple):
    """Where a tensor lies in the buffer."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class PackedBatch(dict[str, torch.Tensor]):
    """The tensors of a batch by name, all of them views of the uint8 tensor `buffer`, and the batch's `faults`."""

    def __init__(self, buffer: torch.Tensor, layout: dict[str, Field], faults: list[Fault]):
        self.buffer, self.layout, self.faults = buffer, layout, faults
        for name, (dtype, shape, offset) in layout.items():
            end = offset + math.prod(shape) * dtype.itemsize
            self[name] = buffer[offset:end].view(dtype).view(shape)

    @classmethod
    def of(cls, batch: dict[str, Any]) -> "PackedBatch":
        """Pack what `PairDataset` returns. A worker packs into shared memory, where the batch would go anyway."""
        tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        packed = cls.empty({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
        packed.faults = batch["faults"]
        for name, tensor in tensors.items():
            packed[name].copy_(tensor)
        return packed

    @classmethod
    def empty(cls, columns: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> "PackedBatch":
        """Return a batch with room for tensors of these types and shapes, in a worker in shared memory."""
        layout, size = {}, 0
        for name, (dtype, shape) in columns.items():
            layout[name] = Field(dtype, shape, size)
            size += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        if torch.utils.data.get_worker_info() is None:
            buffer = torch.empty(size, dtype=torch.uint8)
        else:
            buffer = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
        return cls(buffer, layout, [])

    def pin_memory(self) -> "PackedBatch":
        """Return a copy in page-locked memory; the DataLoader calls this."""
        return PackedBatch(self.buffer.pin_memory(), self.layout, self.faults)

    def to(self, device: torch.device) -> "PackedBatch":
        """Return a copy on `device`, made by one transfer that is not waited for."""
        return PackedBatch(self.buffer.to(device, non_blocking=True), self.layout, self.faults)

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedBatch, (self.buffer, self.layout, self.faults)
