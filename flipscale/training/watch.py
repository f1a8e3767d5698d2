"""Watching the steps: what each waits for, which ranks are late, and the end of a run in which none finishes."""

import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

Batch = TypeVar("Batch")

# A step is slow at this multiple of the median, but not below a second: short steps are noisy.
SLOW_FACTOR = 5.0
_LEAST_SLOW_SECONDS = 1.0
# No step finished for this multiple of the median, a minute at least: the ranks write their stacks.
STACKS_FACTOR = 20.0
_LEAST_STACKS_SECONDS = 60.0
# How many steps the median is of, and how many it needs.
_REMEMBERED, _NEEDED = 101, 10
_HEARTBEAT_SECONDS = 10.0
# The other ranks end later, so that the main process's sentence is the one that is read.
_LATER_SECONDS = 15.0


class StepWatch:
    """The clock of the steps of this process.

    A step that takes far longer than usual on any rank is written to `slow_steps.jsonl` with the times of all ranks.
    When no step finishes for a while, every rank writes its threads' stacks to `stacks/`; when none does for
    `hang_seconds`, the run ends. The main process leaves a sign of life in `heartbeat.json`.
    """

    def __init__(self, accelerator: Accelerator, run_dir: Path, hang_seconds: float):
        if hang_seconds <= 0:
            raise ValueError(f"log.hang_seconds is {hang_seconds}; it must be above 0")
        self.wait_seconds = 0.0
        self.num_slow = 0
        self.accelerator = accelerator
        self.run_dir = run_dir
        self._hang_seconds = hang_seconds
        self._step = 0
        self._begin = self._wait = self._seconds = 0.0
        self._beaten = float("-inf")
        self._recent: deque[float] = deque(maxlen=_REMEMBERED)
        self._usual = float("inf")
        # When the step in progress began; None while there is none, as in an evaluation.
        self._since: float | None = None
        self._finished = threading.Event()
        threading.Thread(target=self._watch_for_hangs, name="watch", daemon=True).start()

    def timed(self, batches: Iterable[Batch], first_step: int) -> Iterator[Batch]:
        """The batches of the steps from `first_step` on, the time spent waiting for each counted."""
        self._recent.clear()
        self._usual = float("inf")
        iterator = iter(batches)
        for self._step in range(first_step, sys.maxsize):
            self._begin = self._since = time.perf_counter()
            batch = next(iterator, None)
            self._wait = time.perf_counter() - self._begin
            self.wait_seconds += self._wait
            self._beat("training")
            if batch is None:
                self._since = None
                return
            yield batch

    def step_is_slow(self) -> bool:
        """Whether the step has taken far longer than usual, data and gradients included."""
        self._seconds = time.perf_counter() - self._begin
        usual = self._usual
        self._recent.append(self._seconds)
        if len(self._recent) >= _NEEDED:
            self._usual = statistics.median(self._recent)
        return self._seconds > max(SLOW_FACTOR * usual, _LEAST_SLOW_SECONDS)

    def report_slow_step(self) -> None:
        """Collective. Writes what this step took on every rank."""
        mine = {
            "rank": self.accelerator.process_index,
            "host": socket.gethostname(),
            "step_s": round(self._seconds, 4),
            "data_wait_s": round(self._wait, 4),
        }
        ranks = gather_object([mine])
        self.num_slow += 1
        if not self.accelerator.is_main_process:
            return
        with open(self.run_dir / "slow_steps.jsonl", "a") as file:
            file.write(json.dumps({"step": self._step, "usual_s": round(self._usual, 4), "ranks": ranks}) + "\n")
        late = max(ranks, key=lambda rank: rank["data_wait_s"])
        print(
            f"step {self._step} took {self._seconds:.1f} s, usually {self._usual:.2f} s; the longest wait for data was "
            f"{late['data_wait_s']:.1f} s, of rank {late['rank']} on {late['host']}; all ranks: slow_steps.jsonl",
            file=sys.stderr,
        )

    def pause(self) -> None:
        """Stops the clock until the next step: an evaluation or a save takes as long as it takes."""
        self._since = None
        self._beat("evaluating or saving", now=True)

    def alive(self) -> None:
        """Start the clock anew in an evaluation, which calls this after every batch."""
        self._since = time.perf_counter()
        self._beat("evaluating or saving")

    def finish(self) -> None:
        """Stops the clock for good, and says so."""
        self.close()
        self._beat("ended", now=True)

    def close(self) -> None:
        """Stops the clock for good: a run that failed must not be ended once more by its watch, a caller with it."""
        self._finished.set()

    def _beat(self, phase: str, now: bool = False) -> None:
        clock = time.monotonic()
        if not self.accelerator.is_main_process or not (now or clock - self._beaten > _HEARTBEAT_SECONDS):
            return
        self._beaten = clock
        usual = self._usual if self._usual < float("inf") else None
        partial = self.run_dir / "heartbeat.partial"
        with suppress(OSError):  # a full disk is for the next checkpoint to tell
            partial.write_text(json.dumps({"time": time.time(), "step": self._step, "phase": phase, "step_s": usual}))
            partial.replace(self.run_dir / "heartbeat.json")

    def _watch_for_hangs(self) -> None:
        """Looks at the clock now and then, in a thread: the main one is the one that hangs."""
        written_for: float | None = None
        limit = self._hang_seconds + (0.0 if self.accelerator.is_main_process else _LATER_SECONDS)
        while not self._finished.wait(min(self._hang_seconds / 20, 5.0)):
            since = self._since
            if since is None:
                continue
            seconds = time.perf_counter() - since
            unusual = max(STACKS_FACTOR * self._usual, _LEAST_STACKS_SECONDS)
            if seconds > min(unusual, self._hang_seconds / 2) and written_for != since:
                written_for = since
                with suppress(OSError):
                    self._write_stacks()
            if seconds > limit:
                self._end(seconds)

    def _write_stacks(self) -> None:
        folder = self.run_dir / "stacks"
        folder.mkdir(exist_ok=True)
        with open(folder / f"rank-{self.accelerator.process_index:05d}.txt", "a") as file:
            file.write(f"step {self._step} on {socket.gethostname()}, {time.strftime('%F %T')}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _end(self, seconds: float) -> None:
        print(
            f"flipscale: error: step {self._step} has not finished on rank {self.accelerator.process_index} after "
            f"{seconds:.0f} s (log.hang_seconds); what each rank was doing is in {self.run_dir}/stacks; start the run "
            "again to go on from its last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        # Only this thread still runs: nothing can be unwound.
        os._exit(1)
