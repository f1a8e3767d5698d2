"""What steps spend their time on: a profile of some of them, and garbage collection kept out of all of them."""

import gc
import logging
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

_log = logging.getLogger(__name__)

# The first steps of a start allocate memory and choose kernels. A profile is of those that follow.
_UNPROFILED_STEPS = 3
# The memory snapshot has this many of the newest allocations and frees.
_MEMORY_EVENTS = 1_000_000
_COLLECT_EVERY_STEPS = 1_000


class StepProfiler:
    """Writes a trace of `num_steps` steps, and on CUDA a memory snapshot, of every rank to `profile/`; none for 0."""

    def __init__(self, accelerator: "Accelerator", run_dir: Path, num_steps: int):
        self._cuda = accelerator.device.type == "cuda"
        self._rank = accelerator.process_index
        self._is_one_of_several = accelerator.num_processes > 1
        self._folder = run_dir / "profile"
        self._num_steps = num_steps
        self._steps = 0
        self._profile: torch.profiler.profile | None = None

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A run that ends early leaves a profile of the steps that it took. After an error, the wait for the device
        # might be one for other processes, which wait for this one.
        if error is None or not (self._cuda and self._is_one_of_several):
            self._stop()

    def after_step(self) -> None:
        """Count a step, and begin or write the profile."""
        self._steps += 1
        if self._num_steps and self._steps == _UNPROFILED_STEPS:
            self._start()
        if self._steps == _UNPROFILED_STEPS + self._num_steps:
            self._stop()

    def _start(self) -> None:
        if self._cuda:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self._profile = torch.profiler.profile(record_shapes=True)
        self._profile.start()

    def _stop(self) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._folder / f"rank-{self._rank:05d}.trace.json.gz"))
        self._profile = None
        how = "open its rank-*.trace.json.gz at https://ui.perfetto.dev"
        if self._cuda:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"rank-{self._rank:05d}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
            how += " and its rank-*.memory.pickle at https://docs.pytorch.org/memory_viz"
        _log.info("steps were profiled, see %s: %s", self._folder, how)


class GarbageCollection:
    """Keeps Python's garbage collector out of the steps of a `with` block; `after_step` runs it, at the same step on
    every rank, so that no rank makes the others wait."""

    def __enter__(self) -> "GarbageCollection":
        # What set-up has made lives as long as the run: it is not looked at again.
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        gc.enable()
        gc.unfreeze()

    def after_step(self, step: int) -> None:
        """Collect garbage if it is time to."""
        if step % _COLLECT_EVERY_STEPS == 0:
            gc.collect()
