"""A batch in one buffer: one shared-memory segment from the worker, one pinned copy, one transfer to the device."""

import logging
import math
import os
from typing import Any, NamedTuple

import torch

from flipscale.data.faults import Fault

_ALIGNMENT = 64
_log = logging.getLogger(__name__)


class Field(NamedTuple):
    """Where a tensor lies in the buffer."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class PackedBatch(dict[str, Any]):
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
        """Return a batch with room for tensors of these types and shapes, in a worker in shared memory if that has."""
        layout, size = {}, 0
        for name, (dtype, shape) in columns.items():
            layout[name] = Field(dtype, shape, size)
            size += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        buffer = None if torch.utils.data.get_worker_info() is None else shared_buffer(size)
        return cls(torch.empty(size, dtype=torch.uint8) if buffer is None else buffer, layout, [])

    def with_images_of(self, image_size: int | None) -> "PackedBatch":
        """Return this batch, which now says how many pixels its images have along a side: `image_size`, a number beside
        the tensors. None leaves it out, for the model's own size."""
        if image_size is not None:
            self["image_size"] = image_size
        return self

    def pin_memory(self) -> "PackedBatch":
        """Return a copy in page-locked memory; the DataLoader calls this."""
        return PackedBatch(self.buffer.pin_memory(), self.layout, self.faults)

    def to(self, device: torch.device) -> "PackedBatch":
        """Return a copy on `device`, made by one transfer that is not waited for."""
        return PackedBatch(self.buffer.to(device, non_blocking=True), self.layout, self.faults)

    def __reduce__(self) -> tuple[Any, ...]:
        if torch.utils.data.get_worker_info() is not None and not self.buffer.is_shared():
            return _from_pipe, (self.buffer.numpy().tobytes(), self.layout, self.faults)
        return PackedBatch, (self.buffer, self.layout, self.faults)


def shared_buffer(size: int) -> torch.Tensor | None:
    """Return a uint8 tensor of `size` bytes in shared memory, None if /dev/shm has no room for it.

    The room is taken at once. Torch only reserves addresses, and a process that writes to memory that is not there is
    killed by a bus error; a container has 64 MB unless it is told otherwise.
    """
    try:
        storage = torch.UntypedStorage._new_shared(size)
        if size and torch.multiprocessing.get_sharing_strategy() == "file_descriptor":
            os.posix_fallocate(storage._share_fd_cpu_()[0], 0, size)
    except (OSError, RuntimeError):
        return None
    return torch.empty(0, dtype=torch.uint8).set_(storage)


_told: list[bool] = []


def _from_pipe(content: bytes, layout: dict[str, Field], faults: list[Fault]) -> PackedBatch:
    """Return a batch that found no room in shared memory; the first one is told of."""
    if not _told:
        _told.append(True)
        _log.warning(
            "/dev/shm has no room for a batch of %.0f MB; workers send batches through pipes, which is slower: give "
            "the container more (docker run --shm-size 8g), or use fewer data.num_workers or a smaller "
            "data.micro_batch_size",
            len(content) / 1e6,
        )
    return PackedBatch(torch.frombuffer(bytearray(content), dtype=torch.uint8), layout, faults)
