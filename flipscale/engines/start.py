"""From a launch to its processes and their engine, and the end of those processes."""

import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from flipscale.engines.device import bind_to_numa, keep_freed_memory
from flipscale.engines.launch import Launch, launched_precision, whole_number
from flipscale.engines.optimizers import OptimRecipe
from flipscale.io.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flipscale.engines.engine import Engine

# Set by the batch scripts: how many processes a run must have.
NUM_PROCESSES = "FLIPSCALE_NUM_PROCESSES"
# What `accelerate launch` sets to have accelerate shard the model; flipscale does that itself, by the same settings.
_SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG")

# Keys in the store where the processes met: the first failure, and how many processes know of it.
_FAILED = "flipscale/failed"
_KNOWING = "flipscale/knowing"
# How many signs of life all have given, and how often the process of this rank has looked at the store.
_SIGNS = "flipscale/signs"
_LOOKS = "flipscale/looks/{}"
_LONGEST_WORDS = 2_000
_STORE_SECONDS = 3.0
# Between a failure's message and the end of the others, and between two looks at the store.
_LATER_SECONDS = 2.0
# How long the first process, which may keep the store, stays until all others know.
_STAY_SECONDS = 10.0
# How long a run that ends waits for the thread that looks at the others: it may ask a store that is gone.
_CLOSING_SECONDS = 1.0


def engine_classes() -> dict[str, type["Engine"]]:
    """Return the engines, by the names that a `Launch` has for them."""
    # They import torch's sharding and the models, which takes seconds: nobody waits for it who only starts processes.
    from flipscale.engines.ddp import DdpEngine
    from flipscale.engines.fsdp2 import Fsdp2Engine
    from flipscale.engines.zero import ZeroEngine

    return {
        "ddp": DdpEngine,
        "fsdp2": Fsdp2Engine,
        "zero1": ZeroEngine,
        "zero2": ZeroEngine,
        "zero3": ZeroEngine,
    }


def engine_class(launch: Launch) -> type["Engine"]:
    """Return the class of the engine that a launch names.

    Raises:
        ValueError: there is no such engine.
    """
    engines = engine_classes()
    if launch.engine not in engines:
        raise UserError(f"the launch's role {launch.engine!r} is no engine; leave it out, or use {', '.join(engines)}")
    return engines[launch.engine]


def build_engine(accelerator: "Accelerator", launch: Launch, recipe: OptimRecipe, global_batch_size: int) -> "Engine":
    """Collective. Return the engine that the launch names, its model yet to be built.

    Raises:
        ValueError: there is no such engine, or it cannot carry the recipe's optimiser.
    """
    assert launch.num_processes == accelerator.num_processes
    engine = engine_class(launch)
    refusal = engine.refusal(launch, recipe.name)
    if refusal is not None:
        raise UserError(refusal)
    return engine(accelerator, launch, recipe, global_batch_size)


def start_accelerator(report_to: list[str], run_dir: str) -> "Accelerator":
    """Collective. Return accelerate's view of this run's processes; gloo and CPU where there is no GPU.

    Raises:
        ValueError: there are fewer processes than the launcher promised, or the precision is neither bf16 nor fp32, or
            the environment is none of a launcher's.
    """
    if not torch.cuda.is_available():
        keep_freed_memory()
    from accelerate import Accelerator

    precision = launched_precision(os.environ)
    with _unsharded():
        try:
            accelerator = Accelerator(
                mixed_precision=precision,
                cpu=not torch.cuda.is_available(),
                log_with=report_to or None,
                project_dir=run_dir,
            )
        except ValueError as error:  # an address, a port or a switch that is none
            raise UserError(
                f"the environment is not one that a launcher sets ({error}); unset its ACCELERATE_ and MASTER_ "
                "variables, or use a launcher"
            ) from error
    bind_to_numa(accelerator.device)
    promised = promised_processes(os.environ)
    if accelerator.num_processes < promised:
        raise UserError(
            f"the launcher promised {promised} or more processes, {accelerator.num_processes} started; on CPU use "
            "`torchrun --nproc_per_node N -m flipscale.pretrain`, or accelerate with distributed_type MULTI_GPU and "
            "ACCELERATE_USE_CPU=1"
        )
    return accelerator


def promised_processes(environment: Mapping[str, str]) -> int:
    """Return how many processes the batch script or the launcher of `environment` meant to start; 1 where none says.

    Raises:
        ValueError: it says so in words.
    """
    for name in (NUM_PROCESSES, "WORLD_SIZE"):
        if name in environment:
            return whole_number(environment, name, 1)
    # `accelerate launch --cpu --num_processes 2` sets an address for the others, then starts one process.
    return 2 if "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment else 1


def close_process_group() -> None:
    """Collective. Wait at a barrier for all processes of a finished run, then destroy their process group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# The failure of another process, once this one has heard of it: the store may be gone by the time that it fails too.
_heard_of: list["Failure"] = []


class Failure(NamedTuple):
    """A process that failed, and in what words it says so."""

    rank: int
    host: str
    words: str


def claim_failure(words: str) -> Failure:
    """Return the first failure of this run's processes: this process's, which it describes in `words`, unless another
    process has failed before. Takes five seconds at most, whatever the others do."""
    mine = Failure(int(os.environ.get("RANK", "0")), socket.gethostname(), words[:_LONGEST_WORDS])
    if not _have_met():
        # They check their recipe at the same time, each for itself: the first one's message is enough.
        time.sleep(0.0 if mine.rank == 0 else _LATER_SECONDS)
        return mine
    if _heard_of:
        return _heard_of[0]
    found = [mine]

    def claim() -> None:
        # A connection to a store whose process is gone is tried for minutes before it is refused.
        store = own_store()
        try:
            if store is not None:
                found[0] = Failure(*json.loads(store.compare_set(_FAILED, "", json.dumps(mine))))
                store.add(_KNOWING, 1)
                return
        except RuntimeError:
            pass
        found[0] = Failure(0, "the first host", "")

    asking = threading.Thread(target=claim, daemon=True)
    asking.start()
    asking.join(_STORE_SECONDS)
    if found[0] != mine:
        time.sleep(_LATER_SECONDS)  # its message is on its way; a launcher that sees this process end would cut it off
    return found[0]


def stay_until_others_know() -> None:
    """Return when every process knows of the failure that this one has claimed, or after ten seconds.

    The first process may keep the store: where it ends at once, a process that fails alike cannot tell that the same
    has been said.
    """
    store = own_store() if os.environ.get("RANK", "0") == "0" else None
    deadline = time.monotonic() + _STAY_SECONDS
    try:
        while store is not None and store.add(_KNOWING, 0) < dist.get_world_size() and time.monotonic() < deadline:
            time.sleep(0.05)
    except RuntimeError:  # a launcher's store, and the launcher is gone
        return


class OtherProcesses:
    """Looks every few seconds whether another process of this run has failed, and ends this one then.

    This process may be anywhere: behind a GPU that waits for the others, or in an evaluation that does not. Its
    launcher asks it to end by SIGTERM, which is a request to save, and kills it half a minute later. Meanwhile they
    tell each other that they are alive.

    Args:
        signs: of life, that this process has given so far.
        heard: how many the others have given.
    """

    def __init__(self) -> None:
        self.signs = 0
        self.heard = 0
        self._finished = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self) -> None:
        """Begin, if there are other processes, as soon as they have met."""
        if promised_processes(os.environ) > 1:
            self._thread = threading.Thread(target=self._look, name="other processes", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End, without a store that does not answer. All processes do so before any of them leaves the group."""
        self._finished.set()
        if self._thread is not None:
            self._thread.join(_CLOSING_SECONDS)

    def silent_ranks(self) -> list[int]:
        """Return the ranks of the processes that do not look at the store any more: they were stopped, or their machine
        is gone. Takes nine seconds at most. Where the store does not answer, rank 0 is silent, which keeps it."""
        found = [0] if _have_met() else []

        def ask() -> None:
            store = own_store()
            if store is None:
                return
            with suppress(RuntimeError):
                before = [store.add(_LOOKS.format(rank), 0) for rank in range(dist.get_world_size())]
                time.sleep(3 * _LATER_SECONDS)
                found[:] = [rank for rank, looks in enumerate(before) if store.add(_LOOKS.format(rank), 0) == looks]

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(3 * _LATER_SECONDS + _STORE_SECONDS)
        return found

    def _look(self) -> None:
        given, store = 0, None
        while not self._finished.wait(_LATER_SECONDS):
            store = store or own_store()
            if store is None:
                continue
            try:
                store.add(_LOOKS.format(dist.get_rank()), 1)
                news = self.signs - given
                given += news
                self.heard = store.add(_SIGNS, news) - given
                if not store.check([_FAILED]):
                    continue
                failure = Failure(*json.loads(store.get(_FAILED)))
                store.add(_KNOWING, 1)
            except RuntimeError:
                failure = Failure(0, "the first host", "")
            _heard_of.append(failure)
            # Its message first.
            if not self._finished.wait(_LATER_SECONDS):
                leave(failure)


def leave(failure: Failure) -> NoReturn:
    """End this process, since another one has failed. The first process says so."""
    if os.environ.get("RANK", "0") == "0":
        print(
            f"flipscale: rank 0 ends too, as rank {failure.rank} on {failure.host} has failed; its message says why",
            file=sys.stderr,
        )
    end_process(1)


def exit_now(code: int = 0) -> None:
    """Exit at once if this process is one of several.

    A process that unwinds the interpreter while gloo's threads still run is aborted now and then (about one launch in
    ten on a busy CPU), and its launcher then reports that the whole run failed. After a failure, unwinding may also
    wait for a GPU that waits for other processes.
    """
    if promised_processes(os.environ) > 1:
        end_process(code)


def end_process(code: int) -> NoReturn:
    """Kill the loader's workers and exit, from any thread, without unwinding the interpreter."""
    for worker in multiprocessing.active_children():
        worker.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def _have_met() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def own_store() -> dist.Store | None:
    """Return a connection of its own to the store that the processes met at, None if they have not met."""
    if not _have_met():
        return None
    try:
        return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    except RuntimeError:  # a store that cannot be cloned, or whose process is gone
        return None


@contextmanager
def _unsharded() -> Iterator[None]:
    """Hide from accelerate, for a while, that the launch asks for sharding."""
    asked = {name: os.environ.pop(name) for name in _SHARDING if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(asked)
