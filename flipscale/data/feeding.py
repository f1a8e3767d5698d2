"""The batches of a run, step after step: dead workers are restarted, and batches are copied to the device ahead."""

import logging
import re
import signal
import threading
from collections.abc import Iterator
from itertools import islice

import torch
from torch.utils.data import DataLoader

from flipscale.data.loader import StepSampler, build_loader
from flipscale.data.packed import PackedBatch
from flipscale.data.pairs import PairDataset

_log = logging.getLogger(__name__)

# Otherwise a sample that kills every worker that reads it would keep the run restarting them for ever.
_MAX_DEATHS_IN_A_ROW = 3


def enduring_batches(
    dataset: PairDataset, first_step: int, last_step: int, rank: int, world_size: int, pin_memory: bool
) -> Iterator[list[PackedBatch]]:
    """Yield the batches of steps [first_step, last_step) that process `rank` takes, each as a list of micro-batches.

    Nothing else refers to the micro-batches: clearing the list frees them.

    When a worker dies (out of memory, killed), what it was reading is logged and all workers are started again at the
    current step. A batch is a function of its step, so none is lost or seen twice.

    Raises:
        ValueError: the data cannot be used.
        OSError: a shard cannot be read, or workers died `_MAX_DEATHS_IN_A_ROW` times without a batch in between.
    """
    step, deaths = first_step, 0
    while step < last_step:
        loader = build_loader(dataset, step, last_step, rank, world_size, pin_memory)
        assert isinstance(loader.batch_sampler, StepSampler)
        micro_batches = _start(loader)
        try:
            while batch := _together(micro_batches, loader.batch_sampler.micro_batches):
                step, deaths = step + 1, 0
                yield batch
        except _WorkerDied as error:
            died = _describe_death(error, dataset)
            deaths += 1
            if deaths >= _MAX_DEATHS_IN_A_ROW:
                raise OSError(
                    f"{died}; that is {deaths} times in a row at step {step}: remove that shard, or give workers more "
                    "memory or use fewer (data.num_workers), and start the run again"
                ) from error
            _log.warning("%s; starting the workers again at step %d", died, step)


class _WorkerDied(Exception):
    """A worker died. `pids` are the workers that torch names, empty if it names none."""

    def __init__(self, pids: set[int]):
        self.pids = pids


def _together(micro_batches: Iterator[PackedBatch | Exception], count: int) -> list[PackedBatch]:
    """Return the next `count` micro-batches, an empty list at the end.

    Raises:
        _WorkerDied: a worker died before it delivered them.
        ValueError, OSError: the data cannot be used or read.
    """
    try:
        batch = list(islice(micro_batches, count))
    except RuntimeError as error:
        found = re.search(r"DataLoader worker \(pid\(?s?\)?:? ?([\d, ]+)\)|Pin memory thread exited", str(error))
        if found is None:
            raise
        raise _WorkerDied({int(pid) for pid in (found[1] or "").split(",") if pid.strip()}) from error
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        # It died between announcing a batch and handing over the memory that it lies in.
        raise _WorkerDied(set()) from error
    for part in batch:
        if isinstance(part, Exception):
            raise part
    return [part for part in batch if isinstance(part, PackedBatch)]


def _start(loader: DataLoader) -> Iterator[PackedBatch | Exception]:
    """Start the workers of `loader` and return the iterator over its micro-batches.

    When a worker dies, torch's signal handler raises an exception wherever the main thread is, be it in the middle of a
    backward pass. Without that handler, the exception comes from the wait for the next batch.
    """
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if threading.current_thread() is threading.main_thread() and before is not None:
        set_by_torch = getattr(before, "__module__", "").startswith("torch.")  # for an earlier loader
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if set_by_torch else before)
    return batches


def _describe_death(death: _WorkerDied, dataset: PairDataset) -> str:
    """Say which workers died, and what they were reading."""
    reading = [
        dataset.source.shard_name(shard)
        for pid, shard in dataset.reading.tolist()
        if pid and (pid in death.pids or not death.pids)
    ]
    pids = f" (pid {', '.join(str(pid) for pid in sorted(death.pids))})" if death.pids else ""
    return f"a loader worker{pids} died while reading {', '.join(dict.fromkeys(reading)) or 'its first shard'}"


def on_device(batches: Iterator[list[PackedBatch]], device: torch.device) -> Iterator[list[PackedBatch]]:
    """Yield the batches on `device`. To a GPU, each is copied while the step before it computes."""
    if device.type != "cuda":
        yield from batches
        return
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def copied() -> list[PackedBatch] | None:
        batch = next(batches, None)
        with torch.cuda.stream(copying):
            return None if batch is None else [micro_batch.to(device) for micro_batch in batch]

    upcoming = copied()
    while upcoming is not None:
        batch = upcoming
        computing.wait_stream(copying)
        for micro_batch in batch:
            # The memory belongs to the copying stream, which must not reuse it before this stream is done with it.
            micro_batch.buffer.record_stream(computing)
        upcoming = copied()
        yield batch
