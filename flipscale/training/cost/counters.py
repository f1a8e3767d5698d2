"""Counters of energy: of a GPU by NVML, of a machine's processors by Linux's powercap files (RAPL).

Each counts the joules since it was last asked. What cannot be read is absent, and never estimated from a data sheet.
"""

from pathlib import Path
from typing import Any, Protocol

import torch

POWERCAP = Path("/sys/class/powercap")


class Counter(Protocol):
    """What counts energy."""

    def joules(self) -> float:
        """Return the joules since it was last asked.

        Raises:
            Exception: it cannot be read any more.
        """


class GpuCounter:
    """The counter of a GPU, which Volta and later have. A slice of one (MIG) has none."""

    def __init__(self, uuid: str):
        """Take the GPU of a UUID: NVML numbers all of a machine, CUDA those that CUDA_VISIBLE_DEVICES leaves.

        Raises:
            Exception: there is no such GPU, or it has no counter.
        """
        import pynvml

        pynvml.nvmlInit()
        self._gpu: Any = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        self._ask: Any = pynvml.nvmlDeviceGetTotalEnergyConsumption  # millijoules
        self._last: int = self._ask(self._gpu)

    def joules(self) -> float:
        before, self._last = self._last, self._ask(self._gpu)
        return (self._last - before) / 1e3


class ProcessorCounter:
    """The counter of a processor with its caches and memory controller. At its limit, minutes apart, it starts anew."""

    def __init__(self, zone: Path):
        """Take a folder such as `intel-rapl:0`.

        Raises:
            OSError, ValueError: it cannot be read: by default, root alone may.
        """
        self._file = zone / "energy_uj"
        self._limit = int((zone / "max_energy_range_uj").read_text(encoding="ascii"))
        self._last = self._microjoules()

    def joules(self) -> float:
        before, self._last = self._last, self._microjoules()
        wrapped = self._limit if self._last < before else 0
        return (self._last - before + wrapped) / 1e6

    def _microjoules(self) -> int:
        return int(self._file.read_text(encoding="ascii"))


def open_gpu(device: torch.device) -> list[Counter]:
    """Return the counter of a CUDA device, none of another.

    Raises:
        Exception: it has none, or none that can be read.
    """
    if device.type != "cuda":
        return []
    properties: Any = torch.cuda.get_device_properties(device)  # the type stubs lack the field
    return [GpuCounter(f"GPU-{properties.uuid}")]


def open_processors() -> list[Counter]:
    """Return the counters of this machine's processors, none where it has no such files.

    `intel-rapl:0:1` is a part of `intel-rapl:0`, and `psys` is the processors and what is beside them: neither counts.

    Raises:
        OSError, ValueError: one cannot be read, and the sum would lack it.
    """
    whole = [zone for zone in sorted(POWERCAP.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    named = [zone for zone in whole if (zone / "name").read_text(encoding="ascii").startswith("package")]
    return [ProcessorCounter(zone) for zone in named]
