"""An attack: a bad input or a fault, the command line that meets it, and the end that is wanted."""

import importlib
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.constants
import processes
import psutil

# What no command may print, whatever is typed or downloaded.
FORBIDDEN = ("Traceback (most recent call last)", "Segmentation fault", "core dumped")
_LOOK_SECONDS = 0.05
# None takes half a minute on a free machine. A command that takes longer is killed, and the attack got through.
_MOST_SECONDS = 240.0
_KERNEL_LISTS_CHILDREN = os.path.exists(f"/proc/self/task/{os.getpid()}/children")


class Ended(NamedTuple):
    """How the command of an attack ended: the exit code of each process, and what they printed."""

    codes: tuple[int, ...]
    stdout: str
    stderr: str
    seconds: float
    megabytes: float


@dataclass(frozen=True)
class Attack:
    """A row of the table.

    Args:
        name: what is wrong, as the table of the README would say it: "a PNG of 1 x 20,000 pixels".
        make: writes what the attack needs into the folder that it is given, which is empty and in which the command
            runs, and returns the arguments after `flipscale`. The file `ground.py` has data, recipes and trained runs.
        code: the exit code wanted: 0 where the command goes on, 2 for what its user must change, 1 for what the world
            did.
        says: each is found in what is printed, on either stream.
        check: looks at the folder and the end, and asserts.
        during: called once with the folder and the processes' numbers, as soon as they have started.
        world: how many processes, as under torchrun.
        environment: added to theirs.
        megabytes: its processes may take, beyond what importing the trainer takes; what they share counts once.
    """

    name: str
    make: Callable[[Path], Sequence[str | Path]]
    code: int = 0
    says: tuple[str, ...] = ()
    check: Callable[[Path, Ended], None] | None = None
    during: Callable[[Path, list[int]], None] | None = None
    world: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    megabytes: int = 1000

    def __str__(self) -> str:
        return self.name


def hold(attack: Attack, tmp_path: Path) -> None:
    """Run an attack, and assert that it ends as it should."""
    folder = tmp_path / "here"
    folder.mkdir()
    judge(attack, folder, run(attack, folder))


def run(attack: Attack, folder: Path) -> Ended:
    """Run the command of an attack in `folder`, which is empty, and return how it ended.

    Raises:
        AssertionError: it took more time or memory than it may.
    """
    output = folder.with_name(f"{folder.name}-output")
    output.mkdir()
    arguments = [str(argument) for argument in attack.make(folder)]
    places = processes.rank_environments(attack.world) if attack.world > 1 else [{}]
    ranks = [
        processes.start(_call, arguments, str(folder), str(output), environment={**place, **attack.environment})
        for place in places
    ]
    started = time.monotonic()  # the first of all attacks has waited for the server of the processes to import
    try:
        pids = [rank.pid for rank in ranks if rank.pid is not None]
        before = _megabytes(pids)
        if attack.during is not None:
            attack.during(folder, pids)
        most = 0.0
        while any(rank.is_alive() for rank in ranks):
            multiprocessing.connection.wait([r.sentinel for r in ranks if r.is_alive()], timeout=_LOOK_SECONDS)
            taken = _megabytes(pids) - before
            if taken > attack.megabytes:
                taken = _megabytes(pids, exactly=True) - before
            most = max(most, taken)
            assert most <= attack.megabytes, f"{most:.0f} MB, more than {attack.megabytes}"
            assert time.monotonic() - started <= _MOST_SECONDS, f"still running after {_MOST_SECONDS} s"
    finally:
        for rank in ranks:
            if rank.is_alive():
                _kill_all(rank.pid)
            rank.join()
    texts = [(output / name).read_text(errors="replace") for name in ("stdout", "stderr")]
    return Ended(tuple(rank.exitcode for rank in ranks), *texts, time.monotonic() - started, most)


def judge(attack: Attack, folder: Path, ended: Ended) -> None:
    """Assert that an attack ended as it should."""
    printed = ended.stdout + ended.stderr
    assert all(code == attack.code for code in ended.codes), f"exit codes {ended.codes}, not {attack.code}: {printed}"
    for words in FORBIDDEN:
        assert words not in printed, printed
    for words in attack.says:
        assert words in printed, f"{words!r} was not said: {printed}"
    if attack.code:
        complaints = [line for line in ended.stderr.splitlines() if line.startswith("flipscale: error: ")]
        assert len(complaints) == 1, printed
    if attack.check is not None:
        attack.check(folder, ended)


def _call(arguments: list[str], folder: str, output: str) -> None:
    os.chdir(folder)
    # A group of its own, for those that end it to find all of it.
    os.setpgid(0, 0)
    if "HF_ENDPOINT" in os.environ:
        importlib.reload(huggingface_hub.constants)  # it was imported in another environment
    processes.call_main("flipscale.cli", arguments, output)


def _megabytes(pids: Sequence[int], exactly: bool = False) -> float:
    """Return what these processes and their children have in memory.

    Args:
        exactly: what children share with their parents counts once. To tell that takes a hundred times as long.
    """
    total = 0
    for pid in pids:
        with suppress(psutil.Error):
            total += psutil.Process(pid).memory_info().rss
        for child in children(pid):
            with suppress(psutil.Error):
                process = psutil.Process(child)
                total += process.memory_full_info().uss if exactly else process.memory_info().rss
    return total / 1e6


def children(pid: int) -> list[int]:
    """Return the numbers of the processes that a process has started, and of those that they have.

    The kernel's lists are read where it has them: psutil asks every process of the machine who started it.
    """
    found: list[int] = []
    if not _KERNEL_LISTS_CHILDREN:
        with suppress(psutil.Error):
            found = [child.pid for child in psutil.Process(pid).children(recursive=True)]
        return found
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
                found += [int(child), *children(int(child))]
    return found


def _kill_all(group: int | None) -> None:
    try:
        os.killpg(group or 0, signal.SIGKILL)
    except ProcessLookupError:
        if group is not None:
            os.kill(group, signal.SIGKILL)
