"""Processes for tests, forked from a server that has imported the trainer: a new interpreter takes seconds to do so."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Set before torch is imported: a process of the tests computes on one thread and asks no Hub.
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}

# What the trainer imports in functions, as it takes seconds.
_IMPORTED_LATER = (
    "flipscale.engines.ddp",
    "flipscale.engines.fsdp2",
    "flipscale.hub.card",
    "flipscale.hub.export",
    "flipscale.hub.loading",
    "flipscale.hub.push",
    "flipscale.objectives.answer",
    "flipscale.objectives.captioning",
    "flipscale.objectives.classify",
    "flipscale.objectives.contrastive",
    "flipscale.objectives.sigmoid",
    "flipscale.pages.report",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "torch.utils.tensorboard",
)
# What the server starts with: torch reads some variables once, and no test's may reach the processes of another.
_AT_FIRST = {**os.environ, **QUIET}
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytest", "flipscale.pretrain", *_IMPORTED_LATER])


def free_port() -> int:
    """Return a TCP port that nothing listens on, and that the system gives to nobody who does not ask for it.

    This process keeps it, without listening, until it has asked for many others: the port of a socket that is closed
    again is soon somebody else's. Who listens there has to set SO_REUSEADDR too, as torch does.
    """
    kept = socket.socket()
    kept.bind(("127.0.0.1", 0))
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _kept_ports.append(kept)
    return kept.getsockname()[1]


_kept_ports: deque[socket.socket] = deque(maxlen=64)


def rank_environments(world: int) -> list[dict[str, str]]:
    """Return what torchrun would add to the environment of each of `world` processes of this machine."""
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        for rank in range(world)
    ]


def start(function: Callable[..., None], *arguments: object, environment: dict[str, str] | None = None) -> BaseProcess:
    """Start a process that has imported the trainer already and calls `function`.

    Args:
        function: of a module on `sys.path`; it and its arguments are pickled.
        environment: added to this process's.
    """
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(_AT_FIRST)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    process = _context.Process(
        target=_begin, args=(function, arguments, {**before, **QUIET, **(environment or {})}, os.getcwd()), daemon=True
    )
    process.start()
    return process


def _begin(function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], cwd: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    from flipscale.training import energy_meter

    # What this machine takes is none of a test's.
    energy_meter.POWERCAP = Path("/nowhere")
    # A daemon of multiprocessing may have no children, but a trainer has its loader's workers.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    # Its workers start as those of a command do, not as this process did.
    multiprocessing.set_start_method("fork", force=True)
    function(*arguments)


def call_main(module: str, arguments: list[str], folder: str) -> None:
    """Call `main` of a module as if it were the command line's; its output goes to files in `folder`."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = [module, *arguments]
    __import__(module)
    sys.modules[module].main(arguments)


def run(module: str, arguments: list[str], world: int = 1) -> subprocess.CompletedProcess:
    """Return the end of `python -m MODULE ARGUMENTS`, of `world` processes as under torchrun: when one fails, the
    others are ended, and the exit status is the first failure's."""
    environments = rank_environments(world) if world > 1 else [{}]
    with tempfile.TemporaryDirectory() as folder:
        processes = [start(call_main, module, arguments, folder, environment=e) for e in environments]
        deadline = time.monotonic() + 300
        while any(process.is_alive() for process in processes) and not any(p.exitcode for p in processes):
            if time.monotonic() > deadline:
                break
            multiprocessing.connection.wait([p.sentinel for p in processes if p.is_alive()], timeout=5)
        status = next((p.exitcode for p in processes if p.exitcode), 0)
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGTERM)
            process.join(30)
            if process.is_alive():
                process.kill()
                process.join()
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired([module, *arguments], 300)
        output = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess([module, *arguments], status, *output)
