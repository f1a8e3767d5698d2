"""The peak memory of a stretch of work, and of a process."""

import ctypes
import re
from pathlib import Path

import torch

from flipscale.engines.device import peak_memory_bytes
from flipscale.io.errors import UserError


def forget_peak_memory(device: torch.device) -> int:
    """Reset the peak that `peak_memory_since` returns, and return the bytes in use now.

    Raises:
        ValueError: the device is no GPU and the system no Linux.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("the loss's peak memory is measured on a GPU or on Linux only")
    # Hand back what is free in the heap: allocated again, it would not show as new memory.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak_memory_since(device)


def peak_memory_since(device: torch.device) -> int:
    """Return the peak since `forget_peak_memory`, bytes: of tensors on a GPU, of resident memory on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak_bytes()


def resident_peak_bytes(pid: int | str | None = "self") -> int:
    """Return the peak of a process's resident memory. Where there is no /proc, it is always this process's."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return peak_memory_bytes(torch.device("cpu"))
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0
