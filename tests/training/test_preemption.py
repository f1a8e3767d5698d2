"""Signals to a command that does not train yet."""

import os
import signal
import threading

from flipscale.training.preemption import EndRequest


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
