"""The clock of the steps: waits for data, stragglers, and the end of a run that hangs."""

import faulthandler
import itertools
import json
import logging
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flipscale.engines.failures import OtherProcesses, claim_failure, end_process, stay_until_others_know
from flipscale.engines.stragglers import Cause, PhaseLog, Window, find_cause
from flipscale.io import atomic, json_lines

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flipscale.training.plan import StepBatch


_log = logging.getLogger(__name__)

# A step is slow at this multiple of the median, but not below a second, because short steps are noisy.
SLOW_FACTOR = 5.0
_MIN_SLOW_SECONDS = 1.0
# The median is over the last 101 steps and needs 10.
_REMEMBERED, _NEEDED = 101, 10
# A slow step is reported when the result of the next step is read, a step later.
_REPORTED = 4
# A record of a slow step has the straggler and the slowest others up to this number, and the median of all.
_RECORDED_RANKS = 16
_HEARTBEAT_SECONDS = 10.0
_STACKS_SECONDS = 10.0
# The watching thread may be stuck in a file system that is gone.
_CLOSING_SECONDS = 1.0
# Other ranks end later, so that the main process's message is the printed one.
_LATER_SECONDS = 15.0
# Reads and writes beside the work, between two looks of the watch, stay below this.
_MIN_BYTES = 1 << 16


class Interval(NamedTuple):
    """Time since the run began, or between two moments.

    Args:
        seconds: training time.
        wait_seconds: part of it spent waiting for data.
        num_slow: number of slow steps.
    """

    seconds: float
    wait_seconds: float
    num_slow: int


class HangWatch:
    """Ends this process after `hang_seconds` without a sign of life in a `with` block, by a thread.

    Signs of life are `begin`, `alive`, and bytes that this process and its children read and write. Outside of steps,
    other processes' signs count too: a rank that has written its part of a checkpoint waits for the others. After half
    of the time, every rank writes its threads' stacks to `stacks/`.
    """

    def __init__(self, run_dir: Path, hang_seconds: float, rank: int):
        self._run_dir, self._hang_seconds, self._rank = run_dir, hang_seconds, rank
        self._work, self._is_step = "", False
        # Time of the last sign of life from the main thread; None while the clock is stopped.
        self._since: float | None = None
        self._finished = threading.Event()
        self._others = OtherProcesses()

    def __enter__(self) -> "HangWatch":
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()
        self._others.watch()
        return self

    def __exit__(self, *error: object) -> None:
        self._finished.set()
        self._thread.join(_CLOSING_SECONDS)
        self._others.stop()

    def begin(self, work: str, is_step: bool = False) -> None:
        """Start the clock for some work, such as `a save after step 8`."""
        self._work, self._is_step = work, is_step
        self.alive()

    def alive(self) -> None:
        """Restart the clock."""
        self._since = time.perf_counter()

    def idle(self) -> None:
        """Stop the clock."""
        self._since = None

    def _watch(self) -> None:
        """Check the clock, in a thread, because the main thread is the one that hangs."""
        written_for = began = None
        stacks: threading.Thread | None = None
        sign, num_bytes, heard = 0.0, 0, 0
        limit = self._hang_seconds + (0.0 if self._rank == 0 else _LATER_SECONDS)
        while not self._finished.wait(min(self._hang_seconds / 20, 5.0)):
            since = self._since
            if since is None:
                continue
            # The bytes of the stacks are not a sign of life.
            moved, is_disturbed = _bytes_moved(), stacks is not None
            if stacks is not None and not stacks.is_alive():
                stacks = None
            has_moved = moved - num_bytes > _MIN_BYTES and not (is_disturbed or self._is_step)
            others_live = self._others.heard != heard and not self._is_step
            num_bytes, heard = moved, self._others.heard
            self._others.signs += since != began or has_moved
            if since != began:
                began = sign = since
            elif has_moved or others_live:
                sign = time.perf_counter()
            seconds = time.perf_counter() - sign
            if seconds > self._hang_seconds / 2 and written_for != sign:
                # In a thread, because it takes seconds on a busy machine.
                written_for, stacks = sign, threading.Thread(target=self._write_stacks, name="stacks", daemon=True)
                stacks.start()
            if seconds > limit:
                if stacks is not None:
                    stacks.join(_STACKS_SECONDS)
                self._end(limit)

    def _write_stacks(self) -> None:
        folder = self._run_dir / "stacks"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"rank-{self._rank:05d}.txt", "a", encoding="utf-8") as file:
                file.write(f"{self._work} on {platform.node()}, {time.strftime('%F %T')}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

    def _end(self, seconds: float) -> None:
        silent = self._others.silent_ranks()
        where = f"; rank {', '.join(map(str, silent))} does not run any more" if silent else ""
        words = (
            f"flipscale: error: {self._work} has not finished on rank {self._rank} after {seconds:.0f} s "
            f"(log.hang_seconds){where}; the stacks of each rank that still runs are in {self._run_dir}/stacks; start "
            "the run again to resume from its last checkpoint"
        )
        if claim_failure(words).rank == self._rank:
            print(words, file=sys.stderr, flush=True)
            stay_until_others_know()
        end_process(1)  # the main thread hangs, so nothing can be unwound


def _bytes_moved() -> int:
    total = 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        with suppress(OSError):  # ended
            counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text("ascii").splitlines())
            # rchar and wchar count system calls; the other two also count page faults.
            total += sum(int(counts[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))
    return total


class StepWatch:
    """Times the steps of this process; in a `with` block, a thread also watches for hangs.

    A step that takes far longer than usual on any rank is written to `slow_steps.jsonl` with the times of all ranks.
    If a step takes `hang_seconds`, or an evaluation or a save shows no sign of life for that long, the run ends, and
    every rank has written its stacks. The run also ends if another process fails. The main process writes
    `heartbeat.json` every ten seconds.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        run_dir: Path,
        hang_seconds: float,
        trained_seconds: float = 0.0,
        phases: PhaseLog | None = None,
    ):
        """Start the clock at `trained_seconds`, the training time of earlier starts. `phases` are the engine's."""
        self.phases = phases or PhaseLog()
        # Whether the last step took far longer than usual. A step lasts from its wait for data to the next one's. A GPU
        # computes a step while the host waits in the next.
        self.was_slow = False
        self._accelerator, self._run_dir = accelerator, run_dir
        self._hangs = HangWatch(run_dir, hang_seconds, accelerator.process_index)
        self._seconds_before = trained_seconds
        # Time at which training began or resumed after a pause; None in a pause.
        self._running_since: float | None = None
        self._wait_seconds = 0.0
        self._num_slow = self._step = 0
        # Iterations that may still be reported, with the current one.
        self._windows: deque[Window] = deque(maxlen=_REPORTED)
        self._last_heartbeat = float("-inf")
        self._recent: deque[float] = deque(maxlen=_REMEMBERED)
        self._usual = float("inf")

    def __enter__(self) -> "StepWatch":
        self._running_since = time.perf_counter()
        self._hangs.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._hangs.__exit__()
        self._write_heartbeat("ended" if error is None else "failed", now=True)

    def timed(self, batches: Iterable["StepBatch"], first_step: int) -> Iterator["StepBatch"]:
        """Yield the batches of the steps from `first_step` on, and time each step and its wait for data."""
        iterator, stage = iter(batches), None
        for self._step in itertools.count(first_step):
            now = time.time_ns()
            if self._windows:
                last = self._windows[-1]
                last.last_ns = now
                self.was_slow = last.seconds > max(SLOW_FACTOR * last.usual_s, _MIN_SLOW_SECONDS)
                self._recent.append(last.seconds)
                if len(self._recent) >= _NEEDED:
                    self._usual = statistics.median(self._recent)
            self._windows.append(Window(self._step, now, self._usual))
            began = time.perf_counter()
            self._hangs.begin(f"step {self._step}", is_step=True)
            self.phases.mark("data")
            batch = next(iterator, None)
            self._wait_seconds += time.perf_counter() - began
            self.phases.mark("update")
            self._write_heartbeat("training")
            if batch is None:
                self._hangs.idle()
                return
            if batch.step.stage is not stage:
                # A stage has steps of its own length, and its first step waits for the workers to start.
                stage, self._usual = batch.step.stage, float("inf")
                self._recent.clear()
            self._windows[-1].usual_s = self._usual
            yield batch

    @property
    def trained_seconds(self) -> float:
        """Training time of the run in all its starts, without evaluations and saves."""
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return self._seconds_before + running

    @contextmanager
    def paused(self, work: str) -> Iterator[None]:
        """Stop the clock of training for other work, such as `a save`. It may take any time with signs of life."""
        self._seconds_before = self.trained_seconds
        self._running_since = None
        self._hangs.begin(f"{work} after step {self._step}")
        self._write_heartbeat("evaluating or saving", now=True)
        first_ns = time.time_ns()
        yield
        if self._windows:
            self._windows[-1].pauses.append((first_ns, time.time_ns()))
        self._running_since = time.perf_counter()
        self._hangs.idle()

    def so_far(self) -> Interval:
        """Return the training time of the run; waits and slow steps are those of this start."""
        return Interval(self.trained_seconds, self._wait_seconds, self._num_slow)

    def report_slow_step(self, step: int) -> None:
        """Collective. Find and write the cause of a slow step; some process noticed it during `step`, one later."""
        window = next((window for window in self._windows if window.step == step - 1), self._windows[0])
        cause = find_cause(self._accelerator, window, self.phases)
        self._num_slow += 1
        if not self._accelerator.is_main_process:
            return
        file = self._run_dir / "slow_steps.jsonl"
        json_lines.append(file, [_slow_step_record(window, cause)])
        _log.warning("%s; see %s", _slow_step_words(window, cause), file)

    def alive(self) -> None:
        """Restart the clock of the hang watch; an evaluation calls this after every batch."""
        self._hangs.alive()
        self._write_heartbeat("evaluating or saving")

    def _write_heartbeat(self, phase: str, now: bool = False) -> None:
        clock = time.monotonic()
        if not self._accelerator.is_main_process or not (now or clock - self._last_heartbeat > _HEARTBEAT_SECONDS):
            return
        self._last_heartbeat = clock
        usual = self._usual if self._usual < float("inf") else None
        content = {"time": time.time(), "step": self._step, "phase": phase, "step_s": usual}
        with suppress(OSError):  # the next checkpoint reports a full disk
            atomic.write_text(self._run_dir / "heartbeat.json", json.dumps(content))


def _slow_step_record(window: Window, cause: Cause) -> dict[str, Any]:
    """Return a record for `slow_steps.jsonl`; its size does not grow with the number of processes."""
    by_time = sorted(cause.ranks, key=lambda rank: (rank["rank"] != cause.rank, -rank["step_s"], rank["rank"]))
    numbers = [name for name in cause.ranks[0] if name.endswith("_s")]
    return {
        "step": window.step,
        "step_s": round(window.seconds, 4),
        "usual_s": round(window.usual_s, 4),
        "late_rank": cause.rank,
        "late_host": cause.host or None,
        "late_s": round(cause.seconds, 4),
        "phase": cause.phase,
        "collective": cause.collective,
        "num_ranks": len(cause.ranks),
        "median": {name: statistics.median(rank[name] for rank in cause.ranks) for name in numbers},
        "ranks": sorted(by_time[:_RECORDED_RANKS], key=lambda rank: rank["rank"]),
    }


def _slow_step_words(window: Window, cause: Cause) -> str:
    took = f"step {window.step} took {window.seconds:.1f} s, usually {window.usual_s:.2f} s"
    if not cause.is_known:
        waiting = max(cause.ranks, key=lambda rank: rank["data_s"])
        return (
            f"{took}; the straggler is unknown, because torch's flight recorder is off or too short "
            f"(TORCH_FR_BUFFER_SIZE); the longest wait for data was {waiting['data_s']:.1f} s, of rank "
            f"{waiting['rank']} on {waiting['host']}"
        )
    place = f" {cause.collective}" if cause.collective else " the first collective"
    if cause.rank is None:
        after = f", in or after{place}" if cause.collective else ""
        return f"{took}; no rank was late: all spent {cause.seconds:.1f} s in {cause.phase}{after}"
    before = f", before{place}" if len(cause.ranks) > 1 else ""
    return f"{took}; rank {cause.rank} on {cause.host} was {cause.seconds:.1f} s late, in {cause.phase}{before}"
