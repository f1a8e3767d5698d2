"""A profile of some steps, and garbage collection outside of all steps."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

_log = logging.getLogger(__name__)

# The first steps of a start allocate memory and choose kernels, so a profile leaves them out.
_UNPROFILED_STEPS = 3
# Number of the newest allocations and frees in the memory snapshot.
_MEMORY_EVENTS = 1_000_000
_COLLECT_EVERY_STEPS = 1_000


class StepProfiler:
    """Writes a trace of some steps, and on CUDA a memory snapshot, of every rank to `profile/`.

    Args:
        num_steps: number of steps to profile; 0 for none.
    """

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
        # A run that ends early keeps the profile of its steps. After an error on several GPUs there is none, because
        # waiting for the device may mean waiting for other processes.
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
        viewers = "open its rank-*.trace.json.gz at https://ui.perfetto.dev"
        if self._cuda:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"rank-{self._rank:05d}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
            viewers += " and its rank-*.memory.pickle at https://docs.pytorch.org/memory_viz"
        _log.info("the profile of the steps is in %s: %s", self._folder, viewers)


@contextmanager
def garbage_between_steps() -> Iterator[Callable[[int], None]]:
    """Turn Python's garbage collector off in a `with` block, and return a function that runs it after some steps.

    All ranks run it at the same steps, so no rank makes the others wait at another time.
    """
    gc.collect()
    gc.freeze()  # the objects of the set-up live as long as the run
    gc.disable()
    try:
        yield lambda num_steps: None if num_steps % _COLLECT_EVERY_STEPS else _collect()
    finally:
        gc.enable()
        gc.unfreeze()


def _collect() -> None:
    gc.collect()
