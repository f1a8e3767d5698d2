"""The processes of a check: one for each GPU, with a time limit. None outlives its check.

`python -m flipscale.checks.group` is such a process: it calls a function of a check and writes the yielded rows.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]
# A row for each result, of each rank.
Rows = list[list[Row]]

# Variables of the launcher of this command.
_OF_LAUNCHER = ("ACCELERATE_", "FSDP_", "GROUP_", "PARALLELISM_CONFIG_", "PET_", "ROLE_", "TORCHELASTIC_")
_OF_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Seconds that the other ranks may take to end after the first.
_GRACE_SECONDS = 60.0


class CheckError(Exception):
    """A failed check, with the reason and the rows that its ranks had written."""

    def __init__(self, reason: str, rows: Rows | None = None):
        super().__init__(reason)
        self.rows = rows or []


class Process(Protocol):
    """A started process, which leads a process group of the system."""

    pid: int

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""


Start = Callable[[str, Sequence[str], Mapping[str, str], Path], Process]


def start_python(module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
    """Start `python -m MODULE ARGUMENTS` with its output in `log`."""
    command = [sys.executable, "-m", module, *arguments]
    with open(log, "ab") as output:
        return subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip


@dataclass(frozen=True)
class Node:
    """The GPUs of this machine.

    Args:
        num_gpus: number of GPUs to use.
        folder: folder for logs, results and runs.
        start: function that starts a process.
    """

    num_gpus: int
    folder: Path
    start: Start = start_python

    def run(
        self, function: str, limit_s: float, processes: int = 1, engine: Mapping[str, str] | None = None, **given: Any
    ) -> Rows:
        """Call `MODULE:FUNCTION` with `given` in processes of its own, and return the yielded rows of each rank.

        Raises:
            CheckError: a process failed, or the time limit passed.
        """
        number = len(list(self.folder.iterdir()))
        folder = self.folder / f"{number:02d}-{function.partition(':')[2]}"
        folder.mkdir()
        arguments = [function, json.dumps(given), str(folder)]
        try:
            with self.group("flipscale.checks.group", arguments, folder, processes, engine) as group:
                group.wait(limit_s)
        except CheckError as error:
            raise CheckError(str(error), read_rows(folder, processes)) from error
        return read_rows(folder, processes)

    @contextmanager
    def group(
        self,
        module: str,
        arguments: Sequence[str],
        folder: Path,
        processes: int,
        engine: Mapping[str, str] | None = None,
    ) -> Iterator["Group"]:
        """Start `python -m MODULE ARGUMENTS` once for each rank, and kill them all at the end of the `with` block."""
        group = Group(folder, processes)
        try:
            for rank, variables in enumerate(_environments(processes, engine or {})):
                group.processes.append(self.start(module, arguments, variables, group.log(rank)))
            yield group
        finally:
            for process in group.processes:
                kill(process)


@dataclass
class Group:
    """The processes of a check, by rank."""

    folder: Path
    world: int
    processes: list[Process] = field(default_factory=list)

    def log(self, rank: int) -> Path:
        """Return the file with the output of a rank."""
        return self.folder / f"rank-{rank}.log"

    def wait(self, limit_s: float) -> None:
        """Wait for all processes to end with code 0.

        Raises:
            CheckError: a process failed, or the time limit passed.
        """
        deadline, first_end = time.monotonic() + limit_s, 0.0
        while None in (codes := [process.poll() for process in self.processes]):
            now = time.monotonic()
            if codes.count(None) < len(codes):
                first_end = first_end or now
            if now > deadline or (first_end and now > first_end + _GRACE_SECONDS):
                break
            time.sleep(0.05)
        if any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            raise CheckError(f"rank {failed} ended with code {codes[failed]}: {self.message(failed)}")
        if None in codes:
            ranks = ", ".join(str(rank) for rank, code in enumerate(codes) if code is None)
            what = f"ran longer than {limit_s:.0f} s" if time.monotonic() > deadline else "did not end with the others"
            raise CheckError(f"rank {ranks} {what}; output in {self.log(0)}")

    def message(self, failed: int) -> str:
        """Return the first error in the ranks' output, else the last line of the failed rank."""
        texts = [self.log(rank).read_text("utf-8", errors="replace") for rank in range(self.world)]
        lines = [line for text in texts for line in text.splitlines() if line.startswith("flipscale: error: ")]
        if lines:
            return lines[0].removeprefix("flipscale: error: ")
        return ("".join([*texts, texts[failed]]).strip().splitlines() or ["no output"])[-1]


def kill(process: Process) -> None:
    """Kill a process and all that it has started."""
    for pid in [process.pid, *descendants(process.pid)]:
        for end in (os.killpg, os.kill):
            # The number of a process that has ended may be another's.
            if end is os.killpg or pid != process.pid or process.poll() is None:
                with suppress(ProcessLookupError):
                    end(pid, signal.SIGKILL)
    while process.poll() is None:
        time.sleep(0.01)


def descendants(pid: int) -> list[int]:
    """Return the processes that a process and its children have started."""
    found: list[int] = []
    with suppress(OSError):  # the process has ended
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, children.read_text("ascii").split()):
                found += [child, *descendants(child)]
    return found


def read_rows(folder: Path, processes: int) -> Rows:
    """Return the rows that each rank has written so far."""
    files = [folder / f"rank-{rank}.json" for rank in range(processes)]
    return [json.loads(file.read_text("utf-8")) if file.exists() else [] for file in files]


def _environments(processes: int, engine: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield the variables of each rank, as torchrun sets them; a single process has none."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_OF_LAUNCHER) and name not in (*_OF_RANK, "FLIPSCALE_NUM_PROCESSES")
    }
    threads = str(max(len(os.sched_getaffinity(0)) // processes, 1))
    # As the batch scripts set them. The recorder names the straggler of a stalled step.
    usual = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "TORCH_FR_BUFFER_SIZE": "8192"}
    kept = {"OMP_NUM_THREADS": threads, **usual, **kept, **engine}
    for name in _OF_RANK:
        kept.pop(name, None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(processes):
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        meeting = {**here, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
        yield {**kept, **{name: str(value) for name, value in meeting.items()}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Call a function of a check, and write its rows as they come."""
    from flipscale.engines.failures import close_process_group, exit_now
    from flipscale.io.atomic import write_text
    from flipscale.training.console import report_user_errors

    function, given, folder = sys.argv[1:] if arguments is None else arguments
    rank, rows = os.environ.get("RANK", "0"), []
    module, _, name = function.partition(":")
    with report_user_errors():
        for row in getattr(import_module(module), name)(**json.loads(given)):
            rows.append(row)
            write_text(Path(folder) / f"rank-{rank}.json", json.dumps(rows))
        close_process_group()
    exit_now()


if __name__ == "__main__":
    main()
