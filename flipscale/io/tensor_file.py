"""Safetensors files, written one tensor at a time."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from flipscale.io.digests import Digester, FileDigest
from flipscale.io.errors import UserError

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_tensors(
    path: Path, layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], tensors: Iterable[torch.Tensor]
) -> FileDigest:
    """Write a safetensors file of `tensors`, in the order of `layout`, wait until it is on disk and return its digest.

    The library's own writer needs all tensors at once and holds the interpreter's lock while it writes. This one needs
    one at a time and lets training go on.

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
    digester = Digester()
    # Neither hashing nor writing holds the interpreter's lock, so one hides behind the other.
    with open(path, "wb") as file, ThreadPoolExecutor(1) as hashing:

        def write(data: bytes | memoryview) -> None:
            hashed = hashing.submit(digester.update, data)
            file.write(data)
            hashed.result()

        write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return digester.digest()


def check_weight(name: str, weight: torch.Tensor) -> None:
    """Raise if a tensor cannot be a weight.

    Raises:
        ValueError: it is no floating-point tensor, or has a NaN or an infinite number.
    """
    if not weight.is_floating_point():
        raise UserError(f"weight {name} is of type {str(weight.dtype).removeprefix('torch.')}; it must be a float")
    if weight.numel() and not all(end.isfinite() for end in weight.detach().float().aminmax()):
        raise UserError(f"weight {name} has numbers that are NaN or infinite; use weights of an earlier step")
