"""What the device can do and how much of its memory was used."""

import re
import resource
import sys
import time

import torch

# Dense bf16 operations a second by words of the device's name, the first that has them all. From the makers' data
# sheets, without sparsity.
_BF16_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations a second of matrix products at `precision` (`bf16` or `no`): a GPU's by its data sheet, a CPU's
    measured; None where neither is known."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cpu":
        return fastest_product(device, dtype, sides=(1024,), times=2)
    if device.type != "cuda" or precision != "bf16":
        return None
    words = set(re.split("[ -]", torch.cuda.get_device_name(device)))
    return next((peak for name, peak in _BF16_PEAKS.items() if words.issuperset(name.split())), None)


def fastest_product(device: torch.device, dtype: torch.dtype, sides: tuple[int, ...], times: int = 5) -> float:
    """Operations a second of the fastest of a few square matrix products."""
    fastest = 0.0
    for side in sides:
        matrix = torch.randn(side, side, device=device).to(dtype)
        for _ in range(times):
            wait_for(device)
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            wait_for(device)
            fastest = max(fastest, 2 * side**3 / (time.perf_counter() - start))
    return fastest


def wait_for(device: torch.device) -> None:
    """Returns when what was sent to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that tensors held on a GPU; on a CPU the most that the process was given so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
