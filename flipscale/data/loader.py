"""The batches of a run's steps, made by loader workers: which positions each process takes, and the DataLoader."""

import ctypes
import gc
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from multiprocessing import forkserver
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from flipscale.data.lanes import divisors_around
from flipscale.data.packed import PackedBatch
from flipscale.data.pairs import PairDataset
from flipscale.io.errors import UserError


class StepSampler(Sampler[list[int]]):
    """The positions that process `rank` of `world_size` takes of each step in [first_step, last_step).

    Each step is `micro_batches` lists of `micro_batch_size` positions.

    Raises:
        ValueError: the processes do not divide the global batch, or the micro-batch does not divide a process's part.
    """

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
        self.per_process = pairs_of_a_process(global_batch_size, world_size)
        whole = self.per_process
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
    """Return how many pairs of a batch each process takes.

    Raises:
        ValueError: the processes do not divide the batch.
    """
    if global_batch_size % world_size == 0:
        return global_batch_size // world_size
    fits = [count for count in range(1, min(2 * world_size, global_batch_size + 1)) if global_batch_size % count == 0]
    below = max(count for count in fits if count <= world_size)
    above = min((count for count in fits if count >= world_size), default=None)
    processes = f"{below} or {above}" if above else f"{below}"
    raise UserError(
        f"global_batch_size {global_batch_size} is not divisible by {world_size} processes; use {processes} "
        f"processes, or {global_batch_size // world_size * world_size or world_size}"
    )


class _ErrorsAsBatches(Dataset):
    """A dataset that returns its errors in place of a batch; raised in a worker, they would come with its traceback."""

    def __init__(self, dataset: PairDataset):
        self.dataset = dataset

    def __getitems__(self, positions: list[int]) -> dict[str, Any] | Exception:
        try:
            return self.dataset.__getitems__(positions)
        except (ValueError, OSError, MemoryError) as error:
            return error
        except Exception as error:  # an arbitrary class may fail to unpickle, or torch puts its traceback into the text
            failure = RuntimeError(f"{type(error).__name__}: {error}")
            failure.__notes__ = [traceback.format_exc()]  # type: ignore[attr-defined]
            return failure


def _pack(batch: Any) -> PackedBatch | Exception:
    return batch if isinstance(batch, Exception) else PackedBatch.of(batch)


def build_loader(
    dataset: PairDataset, first_step: int, last_step: int, rank: int, world_size: int, pin_memory: bool
) -> DataLoader:
    """Return a DataLoader over the micro-batches of steps [first_step, last_step) that process `rank` takes.

    It yields each as a `PackedBatch`, or in its place the ValueError or OSError that making it raised.

    Raises:
        ValueError: as `StepSampler`.
    """
    recipe = dataset.recipe
    sizes = (recipe.global_batch_size, rank, world_size, recipe.micro_batch_size)
    return DataLoader(
        _ErrorsAsBatches(dataset),
        batch_sampler=StepSampler(first_step, last_step, *sizes),
        collate_fn=_pack,
        num_workers=recipe.num_workers,
        pin_memory=pin_memory,
        worker_init_fn=settle_worker,
        multiprocessing_context=worker_context() if recipe.num_workers else None,
    )


# Locks and queues take less; batches that find no room go through pipes.
_LEAST_SHARED_BYTES = 1 << 20
# What workers import, beside the trainer's own module: their server does so once for all of them.
_IMPORTED_BY_WORKERS = ["flipscale.pretrain", "flipscale.data.loader", "flipscale.evaluation.embedding"]


def worker_context() -> str | None:
    """Return how workers start: where there is a GPU, from a server that has imported what they need, as a fork of a
    process with CUDA, its network and their threads may hang or crash; None for Python's default elsewhere."""
    return "forkserver" if torch.cuda.is_available() else None


def prepare_workers() -> None:
    """Start the server that workers come from, where they come from one, and do not wait for its imports."""
    if worker_context() == "forkserver":
        multiprocessing.set_forkserver_preload(_IMPORTED_BY_WORKERS)
        forkserver.ensure_running()


def check_shared_memory(num_workers: int, folder: str = "/dev/shm") -> None:
    """Raise if not even what processes wait for each other with has room where shared memory lies.

    Raises:
        OSError: there are workers, and it is full.
    """
    if not num_workers or not os.path.isdir(folder):
        return
    free = os.statvfs(folder)
    if free.f_bavail * free.f_frsize < _LEAST_SHARED_BYTES:
        raise OSError(
            f"{folder} is full ({free.f_bavail * free.f_frsize} of {free.f_blocks * free.f_frsize} bytes free), and "
            "loader workers need it; free it, give the container more (docker run --shm-size 8g), or use "
            "--data.num_workers 0"
        )


def settle_worker(worker: int) -> None:
    """Let a worker have one thread of its own: there are as many workers as cores. It keeps memory for its next images.

    Also turn on the garbage collector, which a trainer turns off for itself and thus for the workers that it forks, and
    leave signals to the trainer: a terminal or a batch system sends them to all its processes, and it needs its workers
    until it has saved.
    """
    signal.set_wakeup_fd(-1)  # else the trainer would hear them twice
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    gc.enable()
    _keep_freed_memory()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer looks for each batch


def _keep_freed_memory() -> None:
    """Tell glibc to keep up to 64 MiB of freed memory. It would give a decoded image's back and get it anew, page by
    page, which takes a tenth of a worker's time. This has no effect with another allocator."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3
    mallopt(mmap_threshold, 1 << 25)
    mallopt(trim_threshold, 1 << 26)


def start_workers(loader: DataLoader) -> Iterator[Any]:
    """Start the workers of `loader` and return the iterator over its batches.

    When a worker dies, torch's signal handler raises an exception wherever the main thread is, be it in the middle of a
    backward pass. Without that handler, the exception comes from the wait for the next batch.
    """
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    let_workers_die(before)
    return batches


def let_workers_die(handler: Any = signal.SIG_DFL) -> None:
    """Put `handler` in the place of torch's for children that die, if this is the main thread, which alone may do so
    and for which alone torch sets one."""
    if threading.current_thread() is threading.main_thread() and _is_torchs(signal.getsignal(signal.SIGCHLD)):
        # None: it was set by no Python code. Torch's own: it was left by another loader.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None or _is_torchs(handler) else handler)


def _is_torchs(handler: Any) -> bool:
    return (getattr(handler, "__module__", None) or "").startswith("torch.")
