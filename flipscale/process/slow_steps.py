"""The times of a run's steps, and the rank that made a step slow, with its phase.

Torch's flight recorder notes when a process arrives at each collective. All processes run the same collectives in one
order, so the straggler is the last to arrive at the first collective where arrival times diverge. The times at which it
entered the phases of its step tell where it spent its time.
"""

import itertools
import json
import logging
import platform
import statistics
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from flipscale.io import atomic, json_lines
from flipscale.process.watchdog import Watchdog
from flipscale.process.world import gather_objects

if TYPE_CHECKING:
    from accelerate import Accelerator

_log = logging.getLogger(__name__)

# A batch of the loader, whose `step` has the stage of the schedule.
StepBatch = TypeVar("StepBatch", bound=Any)
# Phases of a step; `device_wait` is the wait for the device.
PHASES = ("data", "forward", "loss", "backward", "update", "device_wait")

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
# Arrivals part if they differ by this share of the step's excess time.
_SHARE = 0.5
# Number of collectives before the step by which the clocks are compared. It bounds the gathered bytes.
_COMPARED = 256


class PhaseLog:
    """The times at which this process entered the phases of its last steps."""

    def __init__(self) -> None:
        self.entries: deque[tuple[int, str]] = deque(maxlen=4096)

    def mark(self, phase: str) -> None:
        self.entries.append((time.time_ns(), phase))

    def seconds(self, first_ns: int, last_ns: int) -> dict[str, float]:
        entries, seconds = list(self.entries), dict.fromkeys(PHASES, 0.0)
        ends = [time_ns for time_ns, _ in entries[1:]] + [last_ns]
        for (start, phase), end in zip(entries, ends, strict=True):
            seconds[phase] += max(min(end, last_ns) - max(start, first_ns), 0) / 1e9
        return seconds


@dataclass
class Window:
    """An iteration of the training loop, by this process's clock.

    Args:
        step: step index at its begin.
        first_ns, last_ns: begin and end.
        usual_s: usual duration.
        pauses: evaluations and saves inside, which do not count.
    """

    step: int
    first_ns: int
    usual_s: float
    last_ns: int = 0
    pauses: list[tuple[int, int]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Duration without pauses."""
        return (self.last_ns - self.first_ns - sum(last - first for first, last in self.pauses)) / 1e9

    def has(self, time_ns: int) -> bool:
        return self.first_ns <= time_ns < self.last_ns and not any(a <= time_ns < b for a, b in self.pauses)


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


class StepWatch(Watchdog):
    """A watchdog that times the steps of this process.

    A step that takes far longer than usual on any rank is written to `slow_steps.jsonl` with the times of all ranks.
    The main process writes `heartbeat.json` every ten seconds.

    Attributes:
        phases: the engine's times.
        was_slow: whether the last step took far longer than usual. A step lasts from its wait for data to the next
            one's. A GPU computes a step while the host waits in the next.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        run_dir: Path,
        hang_seconds: float,
        trained_seconds: float = 0.0,
        phases: PhaseLog | None = None,
    ):
        """Start the clock at `trained_seconds`, the training time of earlier starts."""
        super().__init__(run_dir, hang_seconds, accelerator.process_index)
        self.phases = phases or PhaseLog()
        self.was_slow = False
        self._accelerator = accelerator
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
        self._running_since = self.awake_seconds()
        super().__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        super().__exit__(kind, error, traceback)
        self._write_heartbeat("ended" if error is None else "failed", now=True)

    def timed(self, batches: Iterable[StepBatch], first_step: int) -> Iterator[StepBatch]:
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
            began = self.awake_seconds()
            self.begin(f"step {self._step}", is_step=True)
            self.phases.mark("data")
            batch = next(iterator, None)
            self._wait_seconds += self.awake_seconds() - began
            self.phases.mark("update")
            self._write_heartbeat("training")
            if batch is None:
                self.idle()
                return
            if batch.step.stage is not stage:
                # A stage has steps of its own length, and its first step waits for the workers to start.
                stage, self._usual = batch.step.stage, float("inf")
                self._recent.clear()
            self._windows[-1].usual_s = self._usual
            yield batch

    @property
    def trained_seconds(self) -> float:
        """Training time of the run in all its starts, without evaluations, saves and suspensions."""
        running = 0.0 if self._running_since is None else self.awake_seconds() - self._running_since
        return self._seconds_before + running

    @contextmanager
    def paused(self, work: str) -> Iterator[None]:
        """Stop the clock of training for other work, such as `a save`. It may take any time with signs of life."""
        self._seconds_before = self.trained_seconds
        self._running_since = None
        self.begin(f"{work} after step {self._step}")
        self._write_heartbeat("evaluating or saving", now=True)
        first_ns = time.time_ns()
        yield
        if self._windows:
            self._windows[-1].pauses.append((first_ns, time.time_ns()))
        self._running_since = self.awake_seconds()
        self.idle()

    def so_far(self) -> Interval:
        """Return the training time of the run; waits and slow steps are those of this start."""
        return Interval(self.trained_seconds, self._wait_seconds, self._num_slow)

    def report_slow_step(self, step: int) -> None:
        """Collective. Find and write the cause of a slow step; some process noticed it during `step`, one later."""
        window = next((window for window in self._windows if window.step == step - 1), self._windows[0])
        record = slow_step_record(self._accelerator, window, self.phases)
        self._num_slow += 1
        if self._accelerator.is_main_process:
            file = self._run_dir / "slow_steps.jsonl"
            json_lines.append(file, [{**record, "ranks": slowest_ranks(record)}])
            _log.warning("%s; see %s", _message(record), file)

    def alive(self) -> None:
        """Restart the clock of the watchdog; an evaluation calls this after every batch."""
        super().alive()
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


def recorded_collectives() -> list[tuple[int, str]]:
    """Return arrival time and name of the last collectives, oldest first; empty if torch's flight recorder is off."""
    entries: list[dict[str, Any]] = []
    for backend in ("fr", "nccl") if dist.is_initialized() else ():
        dump = getattr(torch._C._distributed_c10d, f"_dump_{backend}_trace_json", None)
        entries += json.loads(dump()).get("entries", []) if dump else []
    # Point-to-point messages differ between processes.
    return sorted((e["time_created_ns"], e["profiling_name"]) for e in entries if not e.get("is_p2p"))


class Parting(NamedTuple):
    """The collective at which a step was slow, by its number in the step, and its straggler; None if all were slow."""

    number: int
    rank: int | None
    seconds: float


def find_parting(arrivals: np.ndarray, offsets: np.ndarray, min_seconds: float) -> Parting | None:
    """Return the first collective with a straggler, None without one.

    Args:
        arrivals: seconds, `(processes, collectives)`.
        offsets: offsets of the processes' clocks in seconds, `(processes,)`.
        min_seconds: least time between the first and the last arrival.
    """
    arrivals = arrivals - offsets[:, None]
    spreads = arrivals.max(axis=0) - arrivals.min(axis=0)
    parted = np.flatnonzero(spreads > min_seconds)
    if not len(parted):
        return None
    return Parting(int(parted[0]), int(arrivals[:, parted[0]].argmax()), float(spreads[parted[0]]))


def slow_step_record(accelerator: "Accelerator", window: Window, phases: PhaseLog) -> dict[str, Any]:
    """Collective. Return the record of a slow iteration for `slow_steps.jsonl`, with the times of all ranks.

    `late_rank` is None if all ranks were slow, or if the arrivals are unknown; then `phase` is None too. `late_s` is
    the straggler's delay, or the time that all spent in one place. `collective` is the one that the straggler reached
    late, or that all ranks were in or just left.
    """
    slowest, place, collective = _find_slowest(window)
    here, whole = phases.seconds(*place), phases.seconds(window.first_ns, window.last_ns)
    for first, last in window.pauses:
        paused = phases.seconds(first, last)
        whole = {phase: spent - paused[phase] for phase, spent in whole.items()}
    spent = {f"{name}_s": round(seconds, 4) for name, seconds in {"step": window.seconds, **whole}.items()}
    mine = {"rank": accelerator.process_index, "host": platform.node(), **spent}
    ranks, phase_of = map(list, zip(*gather_objects([(mine, max(here, key=here.__getitem__))]), strict=True))
    if len(ranks) == 1:
        slowest = Parting(0, 0, window.seconds - window.usual_s)
    late, phase = None if slowest is None else slowest.rank, None
    if slowest is not None:
        phase = max(PHASES, key=phase_of.count) if late is None else phase_of[late]
    return {
        "step": window.step,
        "step_s": round(window.seconds, 4),
        "usual_s": round(window.usual_s, 4),
        "late_rank": late,
        "late_host": None if late is None else ranks[late]["host"],
        "late_s": round(slowest.seconds if slowest else 0.0, 4),
        "phase": phase,
        "collective": collective,
        "num_ranks": len(ranks),
        "median": {name: statistics.median(rank[name] for rank in ranks) for name in spent},
        "ranks": ranks,
    }


def _find_slowest(window: Window) -> tuple[Parting | None, tuple[int, int], str | None]:
    """Collective. Return where an iteration was slow, its begin and end by this process's clock, and its collective.

    Without equal records of collectives on all processes, this is None and the whole iteration.
    """
    collectives = recorded_collectives()
    times = [time_ns for time_ns, _ in collectives if window.has(time_ns)]
    names = [name for time_ns, name in collectives if window.has(time_ns)]
    earlier = [time_ns for time_ns, _ in collectives if time_ns < window.first_ns][-_COMPARED:]
    known = gather_objects([(zlib.crc32(" ".join(names).encode()), len(names), len(earlier))])
    if not names or any(others[:2] != known[0][:2] for others in known):
        return None, (window.first_ns, window.last_ns), None
    compared = min(number for *_, number in known)
    stamps = [*earlier[len(earlier) - compared :], window.first_ns, *times, window.last_ns]
    # float64 holds differences of times, but not times since 1970 in nanoseconds.
    everyones = np.array(gather_objects([stamps]), dtype=np.int64)
    seconds = (everyones - everyones[0, compared]) / 1e9
    clocks, edges = seconds[:, :compared], seconds[:, compared:]
    offsets = np.median(clocks - clocks[0], axis=1) if compared else np.zeros(len(clocks))
    slowest = find_parting(edges[:, 1:-1], offsets, _SHARE * max(window.seconds - window.usual_s, 0.0))
    if slowest is not None:
        collective: str | None = names[slowest.number]
    else:
        # All were slow in one place: after the same collective, or before the first.
        shared = np.diff(edges, axis=1).min(axis=0)
        slowest = Parting(int(shared.argmax()), None, float(shared.max()))
        collective = names[slowest.number - 1] if slowest.number else None
    first, last = stamps[compared + slowest.number :][:2]
    return slowest, (first, last), collective


def slowest_ranks(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the times of the straggler and of the slowest other ranks, in the order of ranks."""
    late = record["late_rank"]
    by_time = sorted(record["ranks"], key=lambda rank: (rank["rank"] != late, -rank["step_s"], rank["rank"]))
    return sorted(by_time[:_RECORDED_RANKS], key=lambda rank: rank["rank"])


def _message(record: dict[str, Any]) -> str:
    took = f"step {record['step']} took {record['step_s']:.1f} s, usually {record['usual_s']:.2f} s"
    if record["phase"] is None:
        waiting = max(record["ranks"], key=lambda rank: rank["data_s"])
        return (
            f"{took}; the straggler is unknown, because torch's flight recorder is off or too short "
            f"(TORCH_FR_BUFFER_SIZE); the longest wait for data was {waiting['data_s']:.1f} s, of rank "
            f"{waiting['rank']} on {waiting['host']}"
        )
    late, seconds, phase, collective = (record[name] for name in ("late_rank", "late_s", "phase", "collective"))
    if late is None:
        after = f", in or after {collective}" if collective else ""
        return f"{took}; no rank was late: all spent {seconds:.1f} s in {phase}{after}"
    before = f", before {collective or 'the first collective'}" if record["num_ranks"] > 1 else ""
    return f"{took}; rank {late} on {record['late_host']} was {seconds:.1f} s late, in {phase}{before}"
