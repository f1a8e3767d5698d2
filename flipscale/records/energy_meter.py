"""Energy counters and their sum over all processes, in `energy.jsonl`.

Counters: NVML for a GPU, Linux's powercap files (RAPL) for processors. Energy without a counter is left out; it is
never estimated from a data sheet.
"""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flipscale.io import json_lines
from flipscale.records.run_summary import ENERGY_FILE, Energy, RunSummary

if TYPE_CHECKING:
    from accelerate import Accelerator

_log = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")
_JOULES_OF_A_KWH = 3.6e6
_READ_SECONDS = 60.0


class Counter:
    """An energy counter with `per_joule` units per joule. It wraps at `limit`; 0 if it never does."""

    def __init__(self, read: Callable[[], int], per_joule: float, limit: int = 0):
        self._read, self._per_joule, self._limit = read, per_joule, limit
        self._last = read()

    def joules(self) -> float:
        before, self._last = self._last, self._read()
        wrapped = self._limit if self._last < before else 0
        return (self._last - before + wrapped) / self._per_joule


def open_gpu(device: torch.device) -> list[Counter]:
    """Return the counter of a CUDA GPU, from Volta on; MIG slices have none. Empty for another device."""
    if device.type != "cuda":
        return []
    import pynvml

    pynvml.nvmlInit()
    properties: Any = torch.cuda.get_device_properties(device)  # the type stubs lack `uuid`
    # By its UUID, because NVML and CUDA_VISIBLE_DEVICES number GPUs differently.
    gpu: Any = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
    return [Counter(partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, gpu), 1e3)]


def open_processors() -> list[Counter]:
    """Return the counters of this machine's processors, with their caches and memory controllers. They wrap after some
    minutes, and by default only root may read them. Empty without powercap files.

    `intel-rapl:0:1` is a part of `intel-rapl:0`, and `psys` contains the processors. Neither is counted.
    """
    zones = [zone for zone in sorted(POWERCAP.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    packages = [zone for zone in zones if (zone / "name").read_text(encoding="ascii").startswith("package")]
    limits = [_number_in(zone / "max_energy_range_uj") for zone in packages]
    reads = [partial(_number_in, zone / "energy_uj") for zone in packages]
    return [Counter(read, 1e6, limit) for read, limit in zip(reads, limits, strict=True)]


def _number_in(file: Path) -> int:
    return int(file.read_text(encoding="ascii"))


class EnergyMeter:
    """The energy of one start of a run, summed over all processes.

    A process reads its GPU; the first process of a machine also reads the processors. A kind that some process cannot
    read is left out of the sum. A counter that fails later ends the measurement, and the run continues.
    """

    def __init__(self, accelerator: "Accelerator", run_dir: Path):
        """Collective. Open the counters and agree on the kinds that all processes can read."""
        self._accelerator = accelerator
        self._file = run_dir / ENERGY_FILE
        wanted = {"GPUs": accelerator.device.type == "cuda", "processors": accelerator.local_process_index == 0}
        opened: dict[str, Sequence[Counter]] = dict.fromkeys(wanted, ())
        for kind in wanted:
            try:
                if kind == "GPUs":
                    opened[kind] = open_gpu(accelerator.device)
                elif wanted[kind]:
                    opened[kind] = open_processors()
            except Exception as error:  # pynvml raises classes of its own
                _log.info("the energy of the %s is not measured: %s", kind, " ".join(str(error).split()))
        missing = [float(wanted[kind] and not opened[kind]) for kind in wanted]
        sums = self._sum([*map(len, opened.values()), *missing])
        sums_of = zip(wanted, sums[:2], sums[2:], strict=True)
        self._numbers = {kind: int(number) for kind, number, lacking in sums_of if number and not lacking}
        self._counters = {kind: opened[kind] for kind in self._numbers}
        earlier = RunSummary(run_dir).energy if accelerator.is_main_process else Energy()
        self._before, self._start = earlier.kwh or 0.0, earlier.num_starts
        self._joules = dict.fromkeys(self._counters, 0.0)
        self._parts = dict.fromkeys(self._counters, 0.0)
        self._failed, self._last_read = False, time.monotonic()

    def read(self, now: bool = False) -> None:
        """Read this process's counters, by default once a minute: a processor's counter wraps after some minutes."""
        if self._failed or not (now or time.monotonic() - self._last_read > _READ_SECONDS):
            return
        self._last_read = time.monotonic()
        try:
            for kind, counters in self._counters.items():
                self._joules[kind] += sum(counter.joules() for counter in counters)
        except Exception as error:  # pynvml raises classes of its own
            self._failed = True
            _log.warning("the energy is not measured from here on: %s", " ".join(str(error).split()))

    def update(self, step: int) -> dict[str, float]:
        """Collective. Return `energy_kwh` of the run so far for the main process's records, and append it to
        `energy.jsonl`. Empty, and no collective, without a counter."""
        if not self._counters:
            return {}
        self.read(now=True)
        *sums, num_failed = self._sum([*self._joules.values(), float(self._failed)])
        for kind, joules in zip(self._joules, sums, strict=True):
            self._parts[kind] += joules / _JOULES_OF_A_KWH
            self._joules[kind] = 0.0
        kwh = sum(self._parts.values())
        if self._accelerator.is_main_process:
            line = {
                "start": self._start,
                "time": time.time(),
                "step": step,
                "energy_kwh": kwh,
                "energy_parts": self._parts,
                "counters": self._numbers,
                "failed": num_failed > 0,
            }
            json_lines.append(self._file, [line])
        if num_failed:
            self._counters = {}
        return {"energy_kwh": self._before + kwh}

    def _sum(self, numbers: Sequence[float]) -> list[float]:
        mine = torch.tensor(numbers, dtype=torch.float64, device=self._accelerator.device)
        total: torch.Tensor = self._accelerator.reduce(mine, "sum")
        return total.tolist()
