"""The batches of a run: the positions of each process, batches in one buffer, workers, and the way to the device.

Dead workers are restarted, and batches are copied to the device ahead.
"""

import ctypes
import logging
import math
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from itertools import islice
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from flipscale.data.batches import BatchDataset
from flipscale.data.samples import Fault
from flipscale.io.cores import end_with_parent
from flipscale.io.errors import UserError
from flipscale.process.state import begin_worker
from flipscale.recipe.data import divisors_around

_ALIGNMENT = 64
# Locks and queues need less; batches without room go through pipes.
_LEAST_SHARED_BYTES = 1 << 20
# A limit, because a sample that kills its worker would be read again by each new worker.
_MAX_DEATHS_IN_A_ROW = 3
# Signals of a terminal or a batch system to all processes, which are for the trainer.
_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
# Number of batches that wait on the device.
_SLOTS = 2
# The waiting batches, the step's own, and the last step's, which the device may still read.
BATCHES_ON_DEVICE = _SLOTS + 2
# Page-locked batches: those of the slots, and the one that is copied there.
PINNED_BATCHES = _SLOTS + 1
# Batches that each worker makes ahead, in shared memory: the DataLoader's default.
BATCHES_OF_A_WORKER = 2
_CLOSING_SECONDS = 10.0
_DYING_SECONDS = 5.0
# Errors of a loader whose worker died: torch's own, or of a batch that the worker had announced.
LOST = (RuntimeError, ConnectionError, EOFError, FileNotFoundError)

_log = logging.getLogger(__name__)


class StepSampler(Sampler[list[int]]):
    """Positions of a process in steps [first_step, last_step): `micro_batches` lists of `micro_batch_size` a step."""

    def __init__(
        self,
        first_step: int,
        last_step: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        micro_batch_size: int | None = None,
    ):
        self.steps = range(first_step, last_step)
        self.global_batch_size = global_batch_size
        self.rank = rank
        self.per_process = whole = pairs_of_a_process(global_batch_size, world_size)
        self.micro_batch_size = whole if micro_batch_size is None else min(micro_batch_size, whole)
        if self.micro_batch_size < 1 or whole % self.micro_batch_size:
            raise UserError(
                f"data.micro_batch_size {micro_batch_size} does not divide the {whole} pairs of a process "
                f"(global_batch_size {global_batch_size} over {world_size} processes); use "
                f"{divisors_around(whole, self.micro_batch_size)}"
            )
        self.micro_batches = whole // self.micro_batch_size

    def __len__(self) -> int:
        return len(self.steps) * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = step * self.global_batch_size + self.rank * self.per_process
            for start in range(first, first + self.per_process, self.micro_batch_size):
                yield list(range(start, start + self.micro_batch_size))


def pairs_of_a_process(global_batch_size: int, world_size: int) -> int:
    if global_batch_size % world_size == 0:
        return global_batch_size // world_size
    raise UserError(
        f"global_batch_size {global_batch_size} is not divisible by {world_size} processes; use "
        f"{divisors_around(global_batch_size, world_size)} processes, or "
        f"{global_batch_size // world_size * world_size or world_size}"
    )


# Type, shape and byte offset of a tensor in the buffer of a batch.
Field = tuple[torch.dtype, tuple[int, ...], int]


class PackedBatch(dict[str, Any]):
    """A batch in one buffer: one shared-memory segment from the worker, one pinned copy, one transfer to the device."""

    def __init__(self, buffer: torch.Tensor, layout: dict[str, Field], faults: list[Fault]):
        self.buffer, self.layout, self.faults = buffer, layout, faults
        for name, (dtype, shape, offset) in layout.items():
            end = offset + math.prod(shape) * dtype.itemsize
            self[name] = buffer[offset:end].view(dtype).view(shape)

    @classmethod
    def of(cls, batch: dict[str, Any]) -> "PackedBatch":
        """Pack a batch of `BatchDataset`. A worker packs into shared memory, where the batch would go anyway."""
        tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        packed = cls.empty({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
        packed.faults = batch["faults"]
        for name, tensor in tensors.items():
            packed[name].copy_(tensor)
        return packed

    @classmethod
    def empty(cls, columns: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> "PackedBatch":
        """Return a batch of uninitialised tensors. In a worker it lies in shared memory if there is room."""
        layout, size = {}, 0
        for name, (dtype, shape) in columns.items():
            layout[name] = (dtype, shape, size)
            size += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        buffer = None if torch.utils.data.get_worker_info() is None else shared_buffer(size)
        return cls(torch.empty(size, dtype=torch.uint8) if buffer is None else buffer, layout, [])

    def with_image_size(self, image_size: int | None) -> "PackedBatch":
        """Set the number `image_size` beside the tensors, and return this batch. None means the model's own size."""
        if image_size is not None:
            self["image_size"] = image_size
        return self

    def pin_memory(self) -> "PackedBatch":
        return PackedBatch(self.buffer.pin_memory(), self.layout, self.faults)

    def to(self, device: torch.device) -> "PackedBatch":
        """Return a copy on `device`, made by one asynchronous transfer."""
        return PackedBatch(self.buffer.to(device, non_blocking=True), self.layout, self.faults)

    def __reduce__(self) -> tuple[Any, ...]:
        if torch.utils.data.get_worker_info() is not None and not self.buffer.is_shared():
            return _from_pipe, (self.buffer.numpy().tobytes(), self.layout, self.faults)
        return PackedBatch, (self.buffer, self.layout, self.faults)


def shared_buffer(size: int) -> torch.Tensor | None:
    """Return a uint8 tensor of `size` bytes in shared memory; None if /dev/shm has no room.

    The room is allocated at once, because torch only reserves addresses: a write without memory behind it kills the
    process by a bus error. A container has 64 MB by default.
    """
    try:
        storage = torch.UntypedStorage._new_shared(size)
        if size and torch.multiprocessing.get_sharing_strategy() == "file_descriptor":
            os.posix_fallocate(storage._share_fd_cpu_()[0], 0, size)
    except (OSError, RuntimeError):
        return None
    return torch.empty(0, dtype=torch.uint8).set_(storage)


_pipe_warned: list[bool] = []


def _from_pipe(content: bytes, layout: dict[str, Field], faults: list[Fault]) -> PackedBatch:
    """Return a batch without room in shared memory, and warn at the first one."""
    if not _pipe_warned:
        _pipe_warned.append(True)
        _log.warning(
            "/dev/shm has no room for a batch of %.0f MB; workers send batches through pipes, which is slower: give "
            "the container more (docker run --shm-size 8g), or use fewer data.num_workers or a smaller "
            "data.micro_batch_size",
            len(content) / 1e6,
        )
    return PackedBatch(torch.frombuffer(bytearray(content), dtype=torch.uint8), layout, faults)


class ErrorsInPlace(Dataset):
    """Batches of a dataset, or errors in their place: a worker would add its traceback to one that it raises."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitems__(self, rows: Sequence[int]) -> Any:
        try:
            batch = self.dataset.__getitems__(rows)
            return PackedBatch.of(batch) if isinstance(self.dataset, BatchDataset) else batch
        except (ValueError, OSError, MemoryError) as error:
            return error
        except Exception as error:  # because other classes may fail to unpickle
            failure = RuntimeError(f"{type(error).__name__}: {error}")
            failure.__notes__ = [traceback.format_exc()]  # type: ignore[attr-defined]
            return failure


def _unchanged(batch: Any) -> Any:
    return batch


def build_loader(dataset: BatchDataset, first_step: int, last_step: int, rank: int, world_size: int) -> DataLoader:
    """Return a DataLoader over the micro-batches of process `rank` in steps [first_step, last_step).

    It yields a `PackedBatch`, or the error that making the batch raised.
    """
    recipe = dataset.recipe
    sampler = StepSampler(first_step, last_step, recipe.global_batch_size, rank, world_size, recipe.micro_batch_size)
    return loader_of(ErrorsInPlace(dataset), sampler, recipe.workers)


def loader_of(batches: Dataset, sampler: Any, num_workers: int) -> DataLoader:
    """Return a DataLoader over whole batches, which `batches` makes of the rows that `sampler` lists."""
    # multiprocessing refuses children of a daemon, such as a worker of its Pool.
    if num_workers and multiprocessing.current_process().daemon:
        _log.warning(
            "this process decodes the images itself, because a daemon may have no workers; use a "
            "concurrent.futures.ProcessPoolExecutor in place of a multiprocessing.Pool"
        )
        num_workers = 0
    return DataLoader(
        batches,
        batch_sampler=sampler,
        collate_fn=_unchanged,
        num_workers=num_workers,
        prefetch_factor=BATCHES_OF_A_WORKER if num_workers else None,
        worker_init_fn=set_up_worker,
        multiprocessing_context=_context() if num_workers else None,
    )


class _Event:
    """multiprocessing's Event without a lock. A worker that is killed or suspended may hold the lock, and then torch's
    `set` at the end of the loader never returns."""

    def __init__(self) -> None:
        self._is_set = multiprocessing.RawValue(ctypes.c_bool)

    def set(self) -> None:
        self._is_set.value = True

    def is_set(self) -> bool:
        return self._is_set.value


def _context() -> BaseContext:
    """Return multiprocessing's context of workers."""
    context = copy(multiprocessing.get_context(worker_context()))
    context.Event = _Event  # type: ignore[assignment, method-assign]
    return context


def worker_context() -> str | None:
    """Return the start method of workers: with a GPU, from a server; else None, Python's default.

    A fork of a process with CUDA, its network and their threads may hang or crash.
    """
    return "forkserver" if torch.cuda.is_available() else None


def prepare_workers(modules: Sequence[str]) -> None:
    """Start the server of workers (with a GPU only), without waiting for its imports: `modules`, once for all."""
    if worker_context() == "forkserver":
        multiprocessing.set_forkserver_preload([*modules])
        with _deaf_children():
            forkserver.ensure_running()


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Let processes that are started in a `with` block inherit blocked signals. A batch system's signal would end the
    server of workers, and the kernel ends the workers with it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        resource_tracker.ensure_running()  # which unblocks SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_shared_memory(num_workers: int, folder: str = "/dev/shm") -> None:
    """Raise if shared memory has no room even for the locks of processes."""
    if not num_workers or not os.path.isdir(folder):
        return
    free = os.statvfs(folder)
    if free.f_bavail * free.f_frsize < _LEAST_SHARED_BYTES:
        raise OSError(
            f"{folder} is full ({free.f_bavail * free.f_frsize} of {free.f_blocks * free.f_frsize} bytes free), and "
            "loader workers need it; free it, give the container more (docker run --shm-size 8g), or use "
            "--data.num_workers 0"
        )


def set_up_worker(worker: int) -> None:
    """Set up a worker process, which keeps freed memory. It ends with its parent, even while it is suspended."""
    end_with_parent()
    begin_worker(_IGNORED)
    keep_decoded_memory()


def keep_decoded_memory() -> None:
    """Let glibc keep up to 64 MiB of freed memory, because returning and getting a decoded image's pages takes a tenth
    of a worker's time."""
    # Other C libraries lack this function.
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 1 << 25)
        mallopt(trim_threshold, 1 << 26)


def start_workers(loader: DataLoader) -> Iterator[Any]:
    """Start the workers of `loader` and return the iterator over its batches.

    torch's handler of SIGCHLD raises in the main thread, even in a backward pass. Without it, the death of a worker is
    raised by the wait for the next batch.

    At the end, torch terminates a worker that does not answer, by a signal that workers ignore; here it is killed.
    """
    before = signal.getsignal(signal.SIGCHLD)
    # The server may have to be started again.
    with _deaf_children() if worker_context() == "forkserver" else nullcontext():
        batches = iter(loader)
    for worker in getattr(batches, "_workers", ()):
        worker.terminate = worker.kill
    replace_torch_handler(before)
    return batches


def replace_torch_handler(handler: Any = signal.SIG_DFL) -> None:
    """Replace torch's handler of SIGCHLD by `handler`. Other threads than the main one cannot, and need not."""
    if threading.current_thread() is threading.main_thread() and _is_of_torch(signal.getsignal(signal.SIGCHLD)):
        # None is a handler that was not set from Python. A handler of torch is left over from another loader.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None or _is_of_torch(handler) else handler)


def _is_of_torch(handler: Any) -> bool:
    return (getattr(handler, "__module__", None) or "").startswith("torch.")


Batches = Generator[list[PackedBatch], None, None]


def restartable_batches(dataset: BatchDataset, first_step: int, last_step: int, rank: int, world_size: int) -> Batches:
    """Yield the batches of process `rank` in steps [first_step, last_step), each as a list of micro-batches.

    The list has the only references to the micro-batches, so clearing it frees them.

    When a worker dies (out of memory, killed), its shard is logged and all workers start again at the current step. A
    batch is a function of its step, so none is lost or repeated.
    """
    step, deaths = first_step, 0
    while step < last_step:
        loader = build_loader(dataset, step, last_step, rank, world_size)
        assert isinstance(loader.batch_sampler, StepSampler)
        micro_batches = start_workers(loader)
        while step < last_step:
            try:
                batch = list(islice(micro_batches, loader.batch_sampler.micro_batches))
            except LOST as error:
                if not (dead := dead_workers(micro_batches)):
                    raise
                shards = (dataset.source.shard_name(shard) for pid, shard in dataset.reading.tolist() if pid in dead)
                where = ", ".join(dict.fromkeys(shards)) or "its first shard"
                death = f"a loader worker (pid {', '.join(map(str, dead))}) died while reading {where}"
                deaths += 1
                if deaths >= _MAX_DEATHS_IN_A_ROW:
                    raise OSError(
                        f"{death}; that is {deaths} times in a row at step {step}: remove that shard, or give workers "
                        "more memory or use fewer (data.num_workers), and start the run again"
                    ) from error
                _log.warning("%s; starting the workers again at step %d", death, step)
                break
            if errors := [part for part in batch if isinstance(part, Exception)]:
                del micro_batches  # ends the workers, for which the exit of the process would wait
                raise errors[0]
            step, deaths = step + 1, 0
            yield batch


def dead_workers(batches: Iterator[Any]) -> list[int]:
    """Return the process numbers of a loader's dead workers, after an error of `LOST` kinds from its batches."""
    workers = getattr(batches, "_workers", ())
    # A sentinel is ready once its worker has closed its files, a moment after other connections broke.
    ended = connection.wait([worker.sentinel for worker in workers], _DYING_SECONDS if workers else 0.0)
    return sorted(worker.pid for worker in workers if worker.sentinel in ended)


class CudaTransfer:
    """Pins batches and copies them on its own stream, beside the computation.

    A DataLoader would pin all batches that are ready, two for each worker. The feeding thread calls `send`; the
    computing thread calls `receive` with the result.
    """

    def __init__(self, device: torch.device):
        # Without a launcher, accelerate's device is `cuda` without a number, which `set_device` refuses.
        self._device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        self._copying = torch.cuda.Stream(self._device)

    def chosen(self, batches: Batches) -> Batches:
        """Yield the batches, after the thread that asks for the first has chosen this device."""
        # A thread begins on the first GPU. There, a DataLoader, pinned memory and the end of `stream` would make a
        # context, of half a gigabyte.
        torch.cuda.set_device(self._device)
        yield from batches

    def send(self, batch: list[PackedBatch]) -> tuple[list[PackedBatch], torch.cuda.Event]:
        """Start to copy a batch, without waiting; the event is its arrival."""
        with torch.cuda.stream(self._copying):
            sent = [micro_batch.pin_memory().to(self._device) for micro_batch in batch]
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
    if device.type != "cuda":
        return batches
    transfer = CudaTransfer(device)
    return prefetch(transfer.chosen(batches), transfer)


def prefetch(batches: Batches, transfer: CudaTransfer) -> Batches:
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
