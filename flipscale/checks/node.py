"""The outcomes of `flipscale bench gpu` so far, and the processes of a check, one for each GPU.

No process outlives its check. `python -m flipscale.checks.node` is such a process: it calls a function of a check and
writes the rows that it yields.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil
from torch.distributed.elastic.utils.distributed import get_free_port

from flipscale.checks.nodes import Nodes
from flipscale.io.errors import UserError

Row = dict[str, Any]

# Relative difference that fails a check.
OFF = 0.15
_CHARACTERS = 200
# Variables of the launcher of this command, which its processes must not see.
_OF_LAUNCHER = ("ACCELERATE_", "FSDP_", "GROUP_", "PARALLELISM_CONFIG_", "PET_", "ROLE_", "TORCHELASTIC_")
_OF_RANK = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "FLIPSCALE_NUM_PROCESSES",
)
# As training sets them. The recorder names the straggler of a stalled step.
_USUAL = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "TORCH_FR_BUFFER_SIZE": "8192"}
# Longest time of a start. A first start of H/14 compiles for about three minutes, more on a slow file system.
LIMIT_SECONDS = 600.0
# Seconds that the other ranks may take to end after the first, and after the first that fails.
_GRACE_SECONDS, _FAILED_SECONDS = 60.0, 15.0


class NotRun(Exception):
    """A check that cannot run here, with the missing part."""


class CheckError(UserError):
    """A failed check, with the reason and the rows that its ranks had written."""

    def __init__(self, reason: str, rows: list[list[Row]] | None = None):
        super().__init__(reason)
        self.rows = rows or []


class Process(Protocol):
    """A started process, which leads a process group of the system."""

    pid: int

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""


def start_python(module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
    """Start `python -m MODULE ARGUMENTS` with its output in `log`."""
    command = [sys.executable, "-m", module, *arguments]
    with open(log, "ab") as output:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )


@dataclass(frozen=True)
class Finding:
    """The outcome of a check in a line."""

    name: str
    status: Literal["ok", "FAILED", "not run"]
    text: str

    def line(self) -> str:
        """Return the line of the report, which ends with an ellipsis if it is too long."""
        line = f"{self.status:<8}{self.name:<34} {self.text}"
        return line if len(line) <= _CHARACTERS else f"{line[: _CHARACTERS - 1]}…"


@dataclass
class Bench:
    """The settings of the checks, their findings and measurements.

    Args:
        num_gpus: number of the GPUs of all `nodes`.
        folder: folder for logs and runs.
        recipes: names or files of the recipes whose steps are measured.
        batch_size: pairs of a GPU.
        trained: names or files of the recipes that are measured with the trainer's loader.
        shards: shards for the loader; None makes up pictures.
        starts: number of starts of a measurement.
        timed_steps: number of timed steps in a start.
        start: function that starts a process.
        figures: measurements by the name of their check, for `gpu.json`.
        nodes: nodes that share the checks; each starts the processes of its own GPUs. By default, this one alone.
    """

    num_gpus: int
    folder: Path
    recipes: Sequence[str]
    batch_size: int
    trained: Sequence[str] = ()
    shards: str | None = None
    starts: int = 1
    timed_steps: int = 10
    start: Callable[[str, Sequence[str], Mapping[str, str], Path], Process] = start_python
    figures: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    nodes: Nodes = field(default_factory=Nodes)

    @property
    def local_gpus(self) -> int:
        """Number of this node's GPUs."""
        return self.num_gpus // len(self.nodes.hosts)

    def gpu(self, rank: int) -> str:
        """Return the name of a rank's GPU, with its host if there are several."""
        node, number = divmod(rank, self.local_gpus)
        return f"GPU {number}" + (f" of {self.nodes.hosts[node]}" if len(self.nodes.hosts) > 1 else "")

    def gpu_names(self, ranks: Sequence[int]) -> str:
        """Return the names of ranks' GPUs. A node of several is named once if all its GPUs are meant."""
        size, hosts, names = self.local_gpus, self.nodes.hosts, []
        for rank in ranks:
            node = range(rank - rank % size, rank - rank % size + size)
            is_whole = len(hosts) > 1 and set(node) <= set(ranks)
            names.append(f"all GPUs of {hosts[rank // size]}" if is_whole else self.gpu(rank))
        return ", ".join(dict.fromkeys(names))

    def add(self, name: str, text: str, faults: Sequence[str] = ()) -> None:
        """Add a finding, which has failed if there are faults."""
        self.findings.append(Finding(name, "FAILED" if faults else "ok", "; ".join([*faults, *filter(None, [text])])))

    def need_gpus(self, count: int) -> None:
        """Raise NotRun on a node with fewer GPUs."""
        if self.num_gpus < count:
            raise NotRun(f"it needs {count} GPUs")

    def run(
        self,
        function: Callable[..., Iterator[Row]],
        processes: int = 1,
        variables: Mapping[str, str] = {},
        **given: Any,
    ) -> list[list[Row]]:
        """Call a function with `given` in processes of its own, and return the yielded rows of each rank. Raise
        CheckError if a process failed, or the time limit passed."""
        number = self.nodes.gather(len(list(self.folder.iterdir())))[0]
        folder = self.folder / f"{number:02d}-{function.__name__}"
        folder.mkdir(exist_ok=True)
        reason = ""
        arguments = [f"{function.__module__}:{function.__name__}", json.dumps(given), str(folder)]
        with self.group("flipscale.checks.node", arguments, folder, processes, variables) as group:
            try:
                group.wait()
            except CheckError as error:
                reason = str(error)
        files = [folder / f"rank-{rank}.json" for rank in group.ranks]
        own = [json.loads(file.read_text("utf-8")) if file.exists() else [] for file in files]
        rows = [row for of_node in self.nodes.gather(own) for row in of_node]
        if reason := "; ".join(dict.fromkeys(filter(None, (self.nodes.first_failure(), reason)))):
            raise CheckError(reason, rows)
        return rows

    @contextmanager
    def group(
        self, module: str, arguments: Sequence[str], folder: Path, processes: int, variables: Mapping[str, str]
    ) -> Iterator["CheckProcesses"]:
        """Start `python -m MODULE ARGUMENTS` once for each rank of this node, or once, and kill them all at the end of
        the `with` block."""
        here = processes // len(self.nodes.hosts) or 1
        group = CheckProcesses(folder, self.nodes, range(self.nodes.index * here, (self.nodes.index + 1) * here))
        try:
            for rank, environment in zip(group.ranks, _environments(processes, variables, group), strict=True):
                group.processes.append(self.start(module, arguments, environment, folder / f"rank-{rank}.log"))
            yield group
        finally:
            for process in group.processes:
                kill(process)


@dataclass
class CheckProcesses:
    """This node's processes of a check, and their ranks."""

    folder: Path
    nodes: Nodes
    ranks: range
    processes: list[Process] = field(default_factory=list)

    def wait(self, limit_s: float = LIMIT_SECONDS) -> None:
        """Wait for all processes to end with code 0. Raise CheckError if a process failed, or the time limit passed."""
        deadline, first_end = time.monotonic() + limit_s, float("inf")
        ranked = dict(zip(self.ranks, self.processes, strict=True))
        while None in (codes := {rank: one.poll() for rank, one in ranked.items()}).values():
            now = time.monotonic()
            own = next((f"rank {rank} ended with code {code}" for rank, code in codes.items() if code), "")
            has_failed = self.nodes.first_failure(own) != ""
            if has_failed or any(code is not None for code in codes.values()):
                first_end = min(first_end, now)
            if now > min(deadline, first_end + (_FAILED_SECONDS if has_failed else _GRACE_SECONDS)):
                break
            time.sleep(0.05)
        if failed := [rank for rank, code in codes.items() if code]:
            raise CheckError(f"rank {failed[0]} ended with code {codes[failed[0]]}: {self.message(failed[0])}")
        if late := [str(rank) for rank, code in codes.items() if code is None]:
            what = f"ran longer than {limit_s:.0f} s" if now > deadline else "did not end with the others"
            raise CheckError(f"rank {', '.join(late)} {what}; output in {self.folder}")

    def await_true(self, is_so: Callable[[], bool], limit_s: float, what: str) -> None:
        """Wait until something is so while all processes run. Raise CheckError if a process ended, or the time limit
        passed."""
        deadline = time.monotonic() + limit_s
        while not is_so():
            for rank, process in zip(self.ranks, self.processes, strict=True):
                if process.poll() is not None:
                    raise CheckError(f"rank {rank} ended before {what}: {self.message(rank)}")
            if time.monotonic() > deadline:
                raise CheckError(f"{what} did not come in {limit_s:.0f} s")
            time.sleep(0.02)

    def message(self, failed: int) -> str:
        """Return the first error in the ranks' output, else the last line, if possible of the failed rank."""
        files = sorted(self.folder.glob("rank-*.log"), key=lambda file: file.stem == f"rank-{failed}")
        lines = [line for file in files for line in file.read_text("utf-8", errors="replace").strip().splitlines()]
        errors = [line.removeprefix("flipscale: error: ") for line in lines if line.startswith("flipscale: error: ")]
        return [*errors, *lines[-1:], "no output"][0]


def kill(process: Process) -> None:
    """Kill a process, its process group, and all that it has started."""
    started = descendants(process.pid) if process.poll() is None else []
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for one in started:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    while process.poll() is None:
        time.sleep(0.01)


def descendants(pid: int) -> list[psutil.Process]:
    """Return the processes that a process and its children have started."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def _environments(processes: int, variables: Mapping[str, str], group: CheckProcesses) -> Iterator[dict[str, str]]:
    """Yield the environment of each rank here, as torchrun sets it; a single process has no launcher's variables."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHER)}
    here, nodes = len(group.ranks), group.nodes
    threads = str(max(len(os.sched_getaffinity(0)) // here, 1))
    common = {"OMP_NUM_THREADS": threads, **_USUAL, **own, **variables}
    common = {name: value for name, value in common.items() if name not in _OF_RANK}
    meeting = {"MASTER_ADDR": nodes.address, "MASTER_PORT": nodes.gather(get_free_port())[0]}
    world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": here}
    for place, rank in enumerate(group.ranks):
        ours = {"RANK": rank, "LOCAL_RANK": place, **world, **meeting} if processes > 1 else {}
        yield {**common, **{name: str(value) for name, value in ours.items()}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Call a function of a check, and write its rows as they come."""
    from flipscale.io.atomic import write_text
    from flipscale.process.console import report_user_errors
    from flipscale.process.watchdog import close_process_group, exit_now

    function, given, folder = sys.argv[1:] if arguments is None else arguments
    module, _, name = function.partition(":")
    rows = []
    with report_user_errors():
        for row in getattr(import_module(module), name)(**json.loads(given)):
            rows.append(row)
            write_text(Path(folder) / f"rank-{os.environ.get('RANK', '0')}.json", json.dumps(rows))
        close_process_group()
    exit_now()


if __name__ == "__main__":
    main()
