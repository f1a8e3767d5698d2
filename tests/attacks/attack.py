"""An attack: a bad input or a fault, the command that meets it, and the expected end."""

import importlib
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import huggingface_hub.constants
import processes
import psutil
import pytest
from accelerate.state import AcceleratorState

from flipscale import cli

# No command may print these, whatever its user types or downloads.
FORBIDDEN = ("Traceback (most recent call last)", "Segmentation fault", "core dumped")
LOOK_SECONDS = 0.1
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Each attack ends within half a minute on a free machine.
MOST_SECONDS = 240.0

Make = Callable[[Path], Sequence[str | Path]]
Change = Callable[[Path], object]


class Ended(NamedTuple):
    """The end of an attack's command: the exit code of each process, and its output."""

    codes: tuple[int, ...]
    stdout: str
    stderr: str


Check = Callable[[Path, Ended], None]


def later(function: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    """Return a function of all but the places, which come later: `pipe("a")(folder)` calls `pipe(folder, "a")`."""
    return lambda *arguments, **options: lambda *places: function(*places, *arguments, **options)


@dataclass(frozen=True)
class Attack:
    """A row of the table.

    A command runs in the process of the tests unless it trains to its end, or needs signals, several ranks or a limit
    of memory.

    Args:
        name: description of the fault: "a PNG of 1 x 20,000 pixels".
        make: function that writes the bad input into an empty folder, in which the command runs, and returns the
            arguments after `flipscale`. `ground.py` has data, recipes and trained runs.
        code: expected exit code: 0 if the command goes on, 2 for a user's mistake, 1 for a fault of the world.
        says: expected words on stdout or stderr: fields and values, no sentences.
        check: further assertions on the folder and the end.
        during: function called once with the folder and the process numbers, as soon as the processes have started.
        world: number of processes, as under torchrun.
        environment: additional environment variables.
        alone: whether the command needs its own process in any case.
        megabytes: largest memory of its own processes beyond that of the imported trainer. Shared memory counts once.
        long: whether `make test` leaves it out.
    """

    name: str
    make: Make
    code: int = 0
    says: tuple[str, ...] = ()
    check: Check | None = None
    during: Callable[[Path, list[int]], None] | None = None
    world: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    alone: bool = False
    megabytes: int = 1000
    long: bool = False

    def __str__(self) -> str:
        return self.name


def refused(name: str, make: Make, *says: str, code: int = 2, **more: Any) -> Attack:
    """Return an attack that asks for a change by the user."""
    return Attack(name, make, code, says, **more)


def survived(name: str, make: Make, *says: str, **more: Any) -> Attack:
    """Return an attack after which the command goes on."""
    return Attack(name, make, 0, says, **more)


def test_of(attacks: list[Attack]) -> Callable[..., None]:
    """Return the test of a table."""

    rows = [pytest.param(attack, id=attack.name, marks=[pytest.mark.long] * attack.long) for attack in attacks]

    @pytest.mark.parametrize("attack", rows)
    def test_attack(attack: Attack, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = tmp_path / "here"
        folder.mkdir()
        arguments = [str(argument) for argument in attack.make(folder)]
        trains = attack.code == 0 and arguments[0] in ("pretrain", "study")
        if trains or attack.alone or attack.during is not None or attack.world > 1:
            ended = run_alone(attack, folder, arguments)
        else:
            ended = run_here(attack, folder, arguments, capsys)
        judge(attack, folder, ended)

    return test_attack


test_of.__test__ = False  # type: ignore[attr-defined]


def run_here(attack: Attack, folder: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Ended:
    """Run a command in this process and folder, and restore this process's state."""
    before, handlers, code = os.getcwd(), {number: signal.getsignal(number) for number in HANDLED}, 0
    capsys.readouterr()
    with (
        mock.patch.dict(os.environ, {**processes.QUIET, **attack.environment}),
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        mock.patch.object(sys, "path", [str(folder), *sys.path]),
    ):
        os.chdir(folder)
        try:
            cli.main(arguments)
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            os.chdir(before)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            AcceleratorState._reset_state(reset_partial_state=True)
    return Ended((code,), *capsys.readouterr())


def run_alone(attack: Attack, folder: Path, arguments: list[str]) -> Ended:
    """Run a command in processes of its own.

    Raises:
        AssertionError: the command takes too much time or memory.
    """
    output = folder.with_name(f"{folder.name}-output")
    output.mkdir()
    places = processes.rank_environments(attack.world) if attack.world > 1 else [{}]
    ranks = [
        processes.start(_call, arguments, str(folder), str(output), environment={**place, **attack.environment})
        for place in places
    ]
    started = time.monotonic()
    try:
        pids = [rank.pid for rank in ranks if rank.pid is not None]
        before = megabytes(pids)
        if attack.during is not None:
            attack.during(folder, pids)
        while any(rank.is_alive() for rank in ranks):
            multiprocessing.connection.wait([r.sentinel for r in ranks if r.is_alive()], timeout=LOOK_SECONDS)
            taken = megabytes(pids) - before
            if taken > attack.megabytes:
                taken = megabytes(pids, exactly=True) - before
            assert taken <= attack.megabytes, f"{taken:.0f} MB, more than {attack.megabytes}"
            assert time.monotonic() - started <= MOST_SECONDS, f"still running after {MOST_SECONDS} s"
    finally:
        for rank in ranks:
            if rank.is_alive() and rank.pid is not None:
                try:
                    os.killpg(rank.pid, signal.SIGKILL)
                except ProcessLookupError:  # it has no group yet
                    rank.kill()
            rank.join()
    texts = [(output / name).read_text(errors="replace") for name in ("stdout", "stderr")]
    return Ended(tuple(rank.exitcode or 0 for rank in ranks), *texts)


def judge(attack: Attack, folder: Path, ended: Ended) -> None:
    """Assert that an attack ended as expected."""
    printed = ended.stdout + ended.stderr
    assert set(ended.codes) == {attack.code}, f"exit codes {ended.codes}, expected {attack.code}: {printed}"
    assert not [words for words in FORBIDDEN if words in printed], printed
    missing = [words for words in attack.says if words not in printed]
    assert not missing, f"{missing} is missing: {printed}"
    if attack.code:
        assert sum(line.startswith("flipscale: error: ") for line in ended.stderr.splitlines()) == 1, printed
    if attack.check is not None:
        attack.check(folder, ended)


def _call(arguments: list[str], folder: str, output: str) -> None:
    os.chdir(folder)
    os.setpgid(0, 0)  # for a kill of all its processes
    if "HF_ENDPOINT" in os.environ:
        importlib.reload(huggingface_hub.constants)  # because it was imported in another environment
    processes.call_main("flipscale.cli", arguments, output)


def megabytes(pids: Sequence[int], exactly: bool = False) -> float:
    """Return the memory of processes and their children.

    Args:
        exactly: whether shared memory counts once, which takes a hundred times as long.
    """
    total = 0
    for pid in pids:
        with suppress(psutil.Error):
            for process in (psutil.Process(pid), *children(pid)):
                is_exact = exactly and process.pid != pid
                total += process.memory_full_info().uss if is_exact else process.memory_info().rss
    return total / 1e6


def children(pid: int) -> list[psutil.Process]:
    """Return a process's children and their children."""
    with suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []
