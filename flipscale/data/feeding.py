"""The batches of a run, step after step: dead workers are restarted, and batches are copied to the device ahead."""

import logging
import queue
import re
import threading
from collections.abc import Generator, Iterator
from itertools import islice
from typing import Any, Protocol

import torch

from flipscale.data.loader import PackedBatch, StepSampler, build_loader, replace_torch_handler, start_workers
from flipscale.data.pairs import PairDataset

_log = logging.getLogger(__name__)

# A limit, because a sample that kills its worker would be read again by each new worker.
_MAX_DEATHS_IN_A_ROW = 3
# Number of batches that wait on the device.
_SLOTS = 2
# The waiting batches, the step's own, and the last step's, which the device may still read.
BATCHES_ON_DEVICE = _SLOTS + 2
_CLOSING_SECONDS = 10.0

Batches = Generator[list[PackedBatch], None, None]


def restartable_batches(
    dataset: PairDataset, first_step: int, last_step: int, rank: int, world_size: int, pin_memory: bool
) -> Batches:
    """Yield the batches of process `rank` in steps [first_step, last_step), each as a list of micro-batches.

    The list has the only references to the micro-batches, so clearing it frees them.

    When a worker dies (out of memory, killed), its shard is logged and all workers start again at the current step. A
    batch is a function of its step, so none is lost or repeated.
    """
    step, deaths = first_step, 0
    while step < last_step:
        loader = build_loader(dataset, step, last_step, rank, world_size, pin_memory)
        assert isinstance(loader.batch_sampler, StepSampler)
        micro_batches = start_workers(loader)
        try:
            while batch := _next_batch(micro_batches, loader.batch_sampler.micro_batches):
                step, deaths = step + 1, 0
                yield batch
        except _WorkerDied as error:
            description = _describe_death(error, dataset)
            deaths += 1
            if deaths >= _MAX_DEATHS_IN_A_ROW:
                raise OSError(
                    f"{description}; that is {deaths} times in a row at step {step}: remove that shard, or give "
                    "workers more memory or use fewer (data.num_workers), and start the run again"
                ) from error
            _log.warning("%s; starting the workers again at step %d", description, step)


class _WorkerDied(Exception):
    """A worker died."""

    def __init__(self, pids: set[int]):
        self.pids = pids


def _next_batch(micro_batches: Iterator[PackedBatch | Exception], count: int) -> list[PackedBatch]:
    """Return the next `count` micro-batches, an empty list at the end."""
    try:
        batch = list(islice(micro_batches, count))
    except RuntimeError as error:
        death = re.search(r"DataLoader worker \(pid\(?s?\)?:? ?([\d, ]+)\)|Pin memory thread exited", str(error))
        if death is None:
            raise
        raise _WorkerDied({int(pid) for pid in (death[1] or "").split(",") if pid.strip()}) from error
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        # The worker announced a batch and died before it handed over the shared memory.
        raise _WorkerDied(set()) from error
    for part in batch:
        if isinstance(part, Exception):
            raise part
    return [part for part in batch if isinstance(part, PackedBatch)]


def _describe_death(death: _WorkerDied, dataset: PairDataset) -> str:
    """Return the dead workers and their shards as a sentence."""
    reading = [
        dataset.source.shard_name(shard)
        for pid, shard in dataset.reading.tolist()
        if pid and (pid in death.pids or not death.pids)
    ]
    pids = f" (pid {', '.join(str(pid) for pid in sorted(death.pids))})" if death.pids else ""
    return f"a loader worker{pids} died while reading {', '.join(dict.fromkeys(reading)) or 'its first shard'}"


class Transfer(Protocol):
    """A way to a device. The feeding thread calls `send`; the computing thread calls `receive`."""

    def send(self, batch: list[PackedBatch]) -> Any:
        """Start to copy a batch, without waiting, and return the argument of `receive`."""

    def receive(self, sent: Any) -> list[PackedBatch]:
        """Return the batch on the device, which computes with it only after it has arrived."""


class CudaTransfer:
    """Copies from page-locked memory on a stream of its own, beside the computation."""

    def __init__(self, device: torch.device):
        self._device = device
        self._copying = torch.cuda.Stream(device)

    def send(self, batch: list[PackedBatch]) -> tuple[list[PackedBatch], torch.cuda.Event]:
        """Start to copy a batch; the event is its arrival."""
        with torch.cuda.stream(self._copying):
            sent = [micro_batch.to(self._device) for micro_batch in batch]
            return sent, self._copying.record_event()

    def receive(self, sent: tuple[list[PackedBatch], torch.cuda.Event]) -> list[PackedBatch]:
        """Return the batch. The device waits for it; this thread does not."""
        batch, arrival = sent
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(arrival)
        for micro_batch in batch:
            # The memory belongs to the copying stream, which must not reuse it before the computation ends.
            micro_batch.buffer.record_stream(computing)
        return batch


def on_device(batches: Batches, device: torch.device) -> Batches:
    """Yield the batches on `device`; for a GPU, they are copied ahead."""
    return prefetch(batches, CudaTransfer(device)) if device.type == "cuda" else batches


def prefetch(batches: Batches, transfer: Transfer) -> Batches:
    """Yield the batches after their transfer. A thread sends them ahead, into two slots.

    The next step's batch is there before its step begins, even when the one after it is late. A device holds at most
    `BATCHES_ON_DEVICE` batches. Errors of `batches` are raised in their place, after the batches before them. Closing
    this generator, at any time, ends the thread and closes `batches`. It does not wait for a thread that waits for its
    disk.
    """
    slots, ended = threading.Semaphore(_SLOTS), threading.Event()
    ready: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def feed() -> None:
        try:
            while slots.acquire() and not ended.is_set():
                batch = next(batches, None)
                if batch is None or ended.is_set():
                    break
                ready.put(transfer.send(batch))
                del batch  # else it would stay in memory while a slow source makes the next one
            ready.put(None)
        except Exception as error:
            ready.put(error)
        finally:
            batches.close()

    replace_torch_handler()
    thread = threading.Thread(target=feed, name="feeder", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            slots.release()
            batch, item = transfer.receive(item), None
            yield batch
    finally:
        ended.set()
        slots.release()
        thread.join(_CLOSING_SECONDS)
