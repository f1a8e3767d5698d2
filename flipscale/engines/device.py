"""What the device can do, what suits it, and how much of its memory was used."""

import ctypes
import os
import re
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

# Dense bf16 operations a second by words of the device's name, the first that has them all. From the makers' data
# sheets, without sparsity.
BF16_PEAKS = {
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
    """Return the operations a second of matrix products at `precision` (`bf16` or `no`): a GPU's by its data sheet, a
    CPU's measured; None where neither is known."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cpu":
        return fastest_product(device, dtype, sides=(1024,), times=2)
    if device.type != "cuda" or precision != "bf16":
        return None
    words = set(re.split("[ -]", torch.cuda.get_device_name(device)))
    return next((peak for name, peak in BF16_PEAKS.items() if words.issuperset(name.split())), None)


def fastest_product(device: torch.device, dtype: torch.dtype, sides: tuple[int, ...], times: int = 5) -> float:
    """Return the operations a second of the fastest of a few square matrix products."""
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
    """Wait until the device has done what it was sent."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_device(numbers: Sequence[float], device: torch.device) -> torch.Tensor:
    """Return numbers as fp32 on the device. The host does not wait until it has them."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.float32, device=device)
    # torch keeps page-locked memory for itself until what was sent from there has arrived.
    return torch.tensor(numbers, dtype=torch.float32).pin_memory().to(device, non_blocking=True)


class HostCopy:
    """Numbers on their way from the device to the host, which waits for them only when it reads them.

    Args:
        numbers: `(count,)`, not changed afterwards.
    """

    def __init__(self, numbers: torch.Tensor):
        self._numbers = numbers
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            # The process sleeps while it waits, and leaves its core to the loader's workers.
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record()

    def read(self) -> list[float]:
        """Wait until they have arrived and return them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[float] = self._numbers.tolist()
        return found


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that tensors held on a GPU so far; on a CPU, that the process had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def best_attention(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """Return the name of the transformers attention implementation that trains fastest on `device` with products in
    `dtype`.

    In bf16 on CPUs two plain matrix products beat the fused kernel, whose backward pass takes 7 times as long at the 50
    tokens that a 75 % mask leaves of B/16, and still twice as long at all 197. In fp32 the fused kernel is as fast with
    a mask and faster without. On GPUs `sdpa` picks the flash kernels by itself.
    """
    return "eager" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def default_precision() -> Literal["no", "bf16"]:
    """Return the precision of matrix products where a launch names none, in accelerate's words: bf16 on a GPU that has
    it, else fp32.

    On CPUs it is fp32 whatever they can: with AMX or AVX-512's bf16 they are faster in bf16, without them slower, and a
    recipe is not to learn otherwise from one CPU to the next.
    """
    return "bf16" if torch.cuda.is_available() and is_faster_in_bf16() else "no"


def is_faster_in_bf16() -> bool:
    """Return whether the device multiplies matrices faster in bf16 than in fp32: a GPU says so, a CPU is tried."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)

    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    # In turns, so that other work on the machine slows both; the first turn is spent on the start of the threads.
    for turn in range(8):
        for dtype in best:
            matrix = torch.ones(512, 512, dtype=dtype)
            start = time.perf_counter()
            matrix @ matrix
            if turn:
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.bfloat16] < 0.8 * best[torch.float32]


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next step.

    A CPU step otherwise spends a fifth of its time in page faults, since every large activation is mapped and unmapped
    anew. This has no effect with another allocator.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    mallopt(top_pad, 2**28)


def bind_to_numa(device: torch.device) -> None:
    """Keep this process on the CPUs of the socket that its GPU hangs on, so that what is sent to the GPU lies in memory
    beside it. The workers that it starts stay there, too.

    Nothing changes where the GPUs that this process sees leave a socket without one, whose CPUs would then idle.
    """
    if device.type != "cuda":
        return
    near = [_cpus_near(_pci_address(number)) for number in range(torch.cuda.device_count())]
    allowed = os.sched_getaffinity(0)
    if set().union(*near) >= allowed:
        os.sched_setaffinity(0, near[torch.cuda.current_device() if device.index is None else device.index] & allowed)


def _pci_address(gpu: int) -> str:
    properties: Any = torch.cuda.get_device_properties(gpu)  # the type stubs lack these fields
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def _cpus_near(pci_address: str, system: Path = Path("/sys")) -> set[int]:
    """Return the CPUs of the socket of a PCI device, not only those of its NUMA node: where a socket has several nodes,
    some have no GPU. Empty where the system does not say."""
    try:
        local = (system / "bus/pci/devices" / pci_address / "local_cpulist").read_text(encoding="utf-8").strip()
        sockets = {
            int(folder.name.removeprefix("cpu")): (folder / "topology/physical_package_id").read_text(encoding="utf-8")
            for folder in (system / "devices/system/cpu").glob("cpu[0-9]*")
            if (folder / "topology").exists()
        }
    except OSError:
        return set()
    spans = [
        (int(first), int(last or first))
        for first, _, last in (part.partition("-") for part in local.split(","))
        if first
    ]
    mine = {sockets.get(cpu) for first, last in spans for cpu in range(first, last + 1)}
    return {cpu for cpu, socket in sockets.items() if socket in mine}
