"""Processes for tests, forked from a server with the imported trainer, because the import takes seconds."""

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

# Set before torch is imported: one thread, and no requests to the Hub.
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}

# Modules that the trainer imports in functions, because they take seconds.
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
    "flipscale.pages.run_page",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "torch.utils.tensorboard",
)
# Environment of the server, because torch reads some variables once, and a test's must not reach other tests.
_AT_FIRST = {**os.environ, **QUIET}
_context = multiprocessing.get_context("forkserver")


def preload(*modules: str) -> None:
    """Let the server import other modules too, before the first process starts."""
    _context.set_forkserver_preload(["pytest", "flipscale.pretrain", *_IMPORTED_LATER, *modules])


preload()


def free_port() -> int:
    """Return a TCP port without a listener, which the system gives to no other process.

    This process keeps it bound until 64 later ports, because the port of a closed socket is soon used again. A listener
    must set SO_REUSEADDR, as torch does.
    """
    kept = socket.socket()
    kept.bind(("127.0.0.1", 0))
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _kept_ports.append(kept)
    return kept.getsockname()[1]


_kept_ports: deque[socket.socket] = deque(maxlen=64)


def exit_codes(started: list[BaseProcess]) -> list[int | None]:
    """Wait for processes to end; None for one that has not after five minutes."""
    for process in started:
        process.join(300)
    return [process.exitcode for process in started]


def wait_for(seen: Callable[[], bool], seconds: float = 200.0) -> None:
    end = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def rank_environments(world: int) -> list[dict[str, str]]:
    """Return the variables that torchrun adds to the environment of each of `world` processes."""
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        for rank in range(world)
    ]


def start(function: Callable[..., None], *arguments: object, environment: dict[str, str] | None = None) -> BaseProcess:
    """Start a process with the imported trainer that calls `function`.

    Args:
        function: picklable function of a module on `sys.path`.
        arguments: picklable arguments of the function.
        environment: variables beside those of this process.
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
    from matplotlib.figure import Figure

    from flipscale.records import energy_meter

    # A test must not depend on the counters of this machine.
    energy_meter.POWERCAP = Path("/nowhere")
    # Drawing takes half the time of a short run.
    Figure.savefig = save_pixel  # type: ignore[method-assign,assignment]
    # A daemon of multiprocessing may have no children, but a trainer has its loader's workers.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    # Its workers start like those of a command.
    multiprocessing.set_start_method("fork", force=True)
    function(*arguments)


def save_pixel(figure: Any, file: Any, **options: object) -> None:
    """Write a picture of one pixel."""
    from PIL import Image

    Image.new("RGB", (1, 1)).save(file, "PNG")


def call_main(module: str, arguments: list[str], folder: str) -> None:
    """Call `main` of a module as the command line does, with output to files in `folder`."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = [module, *arguments]
    __import__(module)
    sys.modules[module].main(arguments)


def run(module: str, arguments: list[str], world: int = 1) -> subprocess.CompletedProcess:
    """Run `python -m MODULE ARGUMENTS` in `world` processes as under torchrun, and return the end.

    The first failure ends the other processes and is the exit status.
    """
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
