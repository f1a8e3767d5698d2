"""Requests to stop: signals before and in a run, and the file that a batch script writes."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import processes
import pytest
from conftest import metrics, trained

from flipscale import pretrain as trainer
from flipscale.evaluation.results import read_results
from flipscale.loop import loop
from flipscale.loop.sync import StepSync
from flipscale.pretrain import pretrain
from flipscale.process import preemption
from flipscale.process.preemption import STOP_FILE, EndRequest, Stopped, StopRequest
from flipscale.start.complete_recipe import parse_recipe


def test_a_forked_process_has_the_signals_to_itself() -> None:
    with EndRequest():
        pid = os.fork()
        if pid == 0:
            is_left = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1
            os._exit(0 if is_left else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_handler_that_is_set_later_takes_its_signal() -> None:
    # So often that a listener would at some time hear of a signal that came to the handler before it.
    for _ in range(100):
        taken = threading.Event()
        with EndRequest():
            signal.signal(signal.SIGUSR1, lambda *about, taken=taken: taken.set())
            os.kill(os.getpid(), signal.SIGUSR1)
            assert taken.wait(10)
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with EndRequest():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def be_stopped(numbers: list[int], echo_seconds: float) -> None:
    """Send signals to this process, each after the answer to the one before, as to a run that does not save yet."""
    handled = []

    class Counted(StopRequest):
        def _handle(self, number: signal.Signals) -> None:
            super()._handle(number)
            handled.append(number)

    preemption._ECHO_SECONDS = echo_seconds
    with Counted(watches_file=False) as request:
        for place, number in enumerate(numbers):
            os.kill(os.getpid(), number)
            while len(handled) <= place:
                time.sleep(0.01)
        sys.exit(0 if request.reason else 1)


@pytest.mark.parametrize(
    ("numbers", "echo_seconds", "code"),
    [
        ([signal.SIGINT, signal.SIGINT], 600.0, 128 + signal.SIGINT),
        ([signal.SIGTERM, signal.SIGTERM], 0.0, 128 + signal.SIGTERM),
        ([signal.SIGTERM, signal.SIGHUP], 600.0, 0),
        ([signal.SIGTERM, signal.SIGUSR1], 0.0, 0),
    ],
)
def test_a_second_signal_ends_a_run_unless_it_is_an_echo(numbers: list[int], echo_seconds: float, code: int) -> None:
    process = processes.start(be_stopped, numbers, echo_seconds)
    process.join(300)
    assert process.exitcode == code


@pytest.mark.parametrize("stop", ["stop", "run/checkpoints/step-00000004"], ids=["first step", "last evaluation"])
def test_a_stop_file_lets_a_run_save_and_go_on_later(
    write_recipe, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    stage = {"name": "one", "samples": 64, "mask_ratio": 0.75, "base_lr": 0.01}
    file = write_recipe(tmp_path / "run", stages=[stage], eval={"zero_shot": str(shards)})
    (tmp_path / "stop").touch()
    monkeypatch.setenv(STOP_FILE, str(tmp_path / stop))
    trained(file)
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 1
    assert not (tmp_path / "run/DONE").exists()
    monkeypatch.delenv(STOP_FILE)
    trained(file)
    assert (tmp_path / "run/DONE").exists()
    assert [record["step"] for record in metrics(tmp_path / "run") if "zero_shot/top1" in record] == [4]


@pytest.mark.parametrize("is_during", [False, True])
def test_a_stop_leaves_its_step_s_evaluations_to_the_next_start(
    write_recipe, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_during: bool
) -> None:
    stage = {"name": "one", "samples": 64, "mask_ratio": 0.75, "base_lr": 0.01}
    file = write_recipe(tmp_path / "run", stages=[stage], eval={"zero_shot": str(shards), "every_samples": 16})

    def evaluated() -> list[int]:
        steps = [record["step"] for record in metrics(tmp_path / "run") if "zero_shot/top1" in record]
        results = [one.step for one in read_results(tmp_path / "run") if one.result.metric == "top1"]
        assert results == steps
        return steps

    with monkeypatch.context() as patch:
        if is_during:
            patch.setattr(StepSync, "stops", lambda self: True)
        else:
            (tmp_path / "stop").touch()
            patch.setenv(STOP_FILE, str(tmp_path / "stop"))
        with pytest.raises(Stopped):
            pretrain(parse_recipe(["--config", str(file)]))
    (saved,) = (tmp_path / "run/checkpoints").glob("step-*")
    last = int(saved.name.removeprefix("step-"))
    assert last < 4
    assert evaluated() == list(range(1, last))

    # Two starts end like a kill: after the evaluations that were left, and after the last ones.
    for module, name, end in ((loop, "step_batches", last), (trainer, "finish", 4)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *of: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                pretrain(parse_recipe(["--config", str(file)]))
        assert evaluated() == list(range(1, end + 1))
    trained(file)
    assert evaluated() == [1, 2, 3, 4]


def test_a_run_in_another_thread_leaves_the_signals_as_they_are() -> None:
    seen = []

    def work() -> None:
        with StopRequest(watches_file=False):
            seen.extend(signal.getsignal(number) for number in preemption._SIGNALS)

    before = [signal.getsignal(number) for number in preemption._SIGNALS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before
