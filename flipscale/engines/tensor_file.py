"""Safetensors files, written one tensor after the other."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_tensors(
    path: Path, layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], tensors: Iterable[torch.Tensor]
) -> None:
    """Writes a safetensors file of `tensors`, in the order of `layout`, durable on disk when this returns.

    The library's own writer wants all tensors at once and keeps the interpreter to itself while it writes; this one
    holds one, and lets training go on beside it.

    Raises:
        OSError: the disk is full or not writable.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in layout.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
