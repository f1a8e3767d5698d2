"""Measures the energy of a start of a run, all its processes' together, and keeps it in `energy.jsonl`.

A line has what the start has taken until then, so that the last line of each start counts. None is ever taken back.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch.distributed as dist

from flipscale.engines.start import own_store
from flipscale.io import json_lines
from flipscale.training.cost.counters import Counter, open_gpu, open_processors
from flipscale.training.cost.energy import ENERGY, KINDS, read_energy
from flipscale.training.watch import StepWatch

if TYPE_CHECKING:
    from accelerate import Accelerator

_log = logging.getLogger(__name__)

READ_SECONDS, WRITE_SECONDS = 10.0, 60.0
# At the start for the store, and at the end for what the other processes have read.
_WAIT_SECONDS = 10.0
_MILLIJOULES_OF_A_KWH = 3.6e9
# Every process makes its meters in the same order.
_number = itertools.count()


class EnergyMeter:
    """In a `with` block, a thread reads the counters of this process: its GPU's and, on the first process of a machine,
    the processors'. All add what they read in the store that they met at, and the main process writes the sums.

    A kind of which some process cannot read its own is left out. A counter that fails ends the measuring with a line:
    nothing here raises.
    """

    def __init__(self, accelerator: "Accelerator", run_dir: Path, watch: StepWatch):
        self._run_dir, self._watch = run_dir, watch
        self._is_main, self._num_processes = accelerator.is_main_process, accelerator.num_processes
        is_first, is_gpu = accelerator.local_process_index == 0, accelerator.device.type == "cuda"
        self._store = _store()
        self._key = f"flipscale/energy/{next(_number)}"
        self._counters = {
            "GPUs": self._opened("GPUs", is_gpu, lambda: open_gpu(accelerator.device)),
            "processors": self._opened("processors", is_first, lambda: open_processors() if is_first else []),
        }
        self._before = read_energy(run_dir).parts if self._is_main else {}
        self._start = len(json_lines.read(run_dir / "starts.jsonl")) if self._is_main else 0
        self._parts: dict[str, float] = {}
        self._written, self._is_over = float("-inf"), False
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._read_now_and_then, name="energy", daemon=True)
        self._add("opened", 1)

    def __enter__(self) -> "EnergyMeter":
        if self._is_main or any(self._counters.values()):
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or self._is_main:
            self.settle(waits=error is None)
        else:  # the main process may be gone, and the store with it, which would say so at length
            self._finished.set()

    def kwh(self) -> dict[str, float]:
        """Return the run's energy so far as a field of the main process's records, none where nothing is measured."""
        return {"energy_kwh": sum(self._before.values()) + sum(self._parts.values())} if self._parts else {}

    def settle(self, waits: bool = True) -> None:
        """End the measuring and write what the start has taken, unless that was done.

        Args:
            waits: for what the other processes have read, some seconds at most.
        """
        if self._finished.is_set():
            return
        self._finished.set()
        if self._thread.is_alive():
            self._thread.join(_WAIT_SECONDS)
        self._read()
        self._add("settled", 1)
        deadline = time.monotonic() + (_WAIT_SECONDS if waits and self._is_main else 0.0)
        while self._add("settled", 0) < self._num_processes and time.monotonic() < deadline:
            time.sleep(0.01)
        self._write()

    def _read_now_and_then(self) -> None:
        while not self._is_over and not self._finished.wait(READ_SECONDS):
            self._read()
            if time.monotonic() - self._written > WRITE_SECONDS:
                self._write()

    def _read(self) -> None:
        """Add what the counters have counted to what all processes have; one that fails ends the measuring."""
        try:
            for kind, counters in self._counters.items():
                if counters:
                    self._add(f"{kind}/millijoules", round(1e3 * sum(counter.joules() for counter in counters)))
        except Exception as error:  # of drivers of any age
            self._counters = {}
            self._add("failed", 1)
            _log.warning("energy is not measured any more: %s", " ".join(str(error).split()))

    def _write(self) -> None:
        """Write what the start has taken, if all processes have said what they can read, and can read something."""
        if not self._is_main or self._is_over or self._add("opened", 0) < self._num_processes:
            return
        self._written = time.monotonic()
        numbers = {kind: self._add(f"{kind}/counters", 0) for kind in KINDS if not self._add(f"{kind}/missing", 0)}
        counted = {kind: count for kind, count in numbers.items() if count}
        self._parts = {kind: self._add(f"{kind}/millijoules", 0) / _MILLIJOULES_OF_A_KWH for kind in counted}
        if not self._parts:
            self._is_over = True
            return
        line = {
            "start": self._start,
            "time": time.time(),
            "step": self._watch.step,
            "energy_kwh": sum(self._parts.values()),
            "energy_parts": self._parts,
            "counters": counted,
            "failed": self._add("failed", 0) > 0,
        }
        self._is_over = bool(line["failed"])
        with suppress(OSError, ValueError):  # the next checkpoint reports a full disk
            json_lines.append(self._run_dir / ENERGY, [line])

    def _opened(self, kind: str, is_wanted: bool, opens: Callable[[], Sequence[Counter]]) -> Sequence[Counter]:
        """Return the counters of a kind, and tell the others how many they are, or that they are missing."""
        counters: Sequence[Counter] = []
        try:
            counters = opens()
        except Exception as error:
            _log.info("the energy of the %s is not measured: %s", kind, " ".join(str(error).split()))
        self._add(f"{kind}/counters", len(counters))
        self._add(f"{kind}/missing", int(is_wanted and not counters))
        return counters

    def _add(self, name: str, number: int) -> int:
        """Add to a number that all processes share, and return the sum so far; 0 where the store is gone."""
        try:
            return self._store.add(f"{self._key}/{name}", number)
        except RuntimeError:
            return 0


def _store() -> dist.Store:
    """Return the store that the processes met at; one of this process's where they have not, or where it does not
    answer: a connection to a process that is gone is tried for minutes."""
    found: list[dist.Store | None] = []
    asking = threading.Thread(target=lambda: found.append(own_store()), name="store of the energy", daemon=True)
    asking.start()
    asking.join(_WAIT_SECONDS)
    return (found[0] if found else None) or dist.HashStore()
