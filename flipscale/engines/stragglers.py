"""The rank that made a step slow, and the phase it was in.

Torch's flight recorder notes when a process arrives at each collective. All processes run the same collectives in one
order, so the straggler is the last to arrive at the first collective where the arrivals part. The times at which it
entered the phases of its step tell where it spent its time.
"""

import json
import platform
import time
import zlib
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from accelerate import Accelerator

# Phases of a step; `verdict` is the wait for the device.
PHASES = ("data", "forward", "loss", "backward", "update", "verdict")

# Arrivals part if they differ by this share of the step's excess time.
_SHARE = 0.5
# Number of collectives before the step by which the clocks are compared. It bounds the gathered bytes.
_COMPARED = 256


class PhaseLog:
    """The times at which this process entered the phases of its last steps."""

    def __init__(self) -> None:
        self.entries: deque[tuple[int, str]] = deque(maxlen=4096)

    def mark(self, phase: str) -> None:
        """Note that this process enters a phase now."""
        self.entries.append((time.time_ns(), phase))

    def seconds(self, first_ns: int, last_ns: int) -> dict[str, float]:
        """Return the time in each phase between two moments."""
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
        """Return whether a time lies inside, outside of pauses."""
        return self.first_ns <= time_ns < self.last_ns and not any(a <= time_ns < b for a, b in self.pauses)


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


class Cause(NamedTuple):
    """The cause of a slow step.

    Args:
        rank, host: the straggler; None and empty if all ranks were slow, or if the arrivals are unknown.
        seconds: delay of the straggler, or time that all spent in one place.
        phase: phase of the straggler, or of all ranks; None if it is unknown.
        collective: collective that the straggler reached late, or that all ranks were in or just left; None if unknown.
        is_known: whether the arrivals are known.
        ranks: times of every rank.
    """

    rank: int | None
    host: str
    seconds: float
    phase: str | None
    collective: str | None
    is_known: bool
    ranks: list[dict[str, Any]]


def find_cause(accelerator: "Accelerator", window: Window, phases: PhaseLog) -> Cause:
    """Collective. Return the cause of a slow iteration, the same on every process."""
    from accelerate.utils import gather_object

    min_seconds = _SHARE * max(window.seconds - window.usual_s, 0.0)
    collectives = recorded_collectives()
    times = [time_ns for time_ns, _ in collectives if window.has(time_ns)]
    names = [name for time_ns, name in collectives if window.has(time_ns)]
    earlier = [time_ns for time_ns, _ in collectives if time_ns < window.first_ns][-_COMPARED:]
    known = gather_object([(zlib.crc32(" ".join(names).encode()), len(names), len(earlier))])
    slowest: Parting | None = None
    place, collective = [window.first_ns, window.last_ns], None
    if names and all(others[:2] == known[0][:2] for others in known):
        compared = min(number for *_, number in known)
        stamps = [*earlier[len(earlier) - compared :], window.first_ns, *times, window.last_ns]
        # float64 holds differences of times, but not times since 1970 in nanoseconds.
        everyones = np.array(gather_object([stamps]), dtype=np.int64)
        seconds = (everyones - everyones[0, compared]) / 1e9
        clocks, edges = seconds[:, :compared], seconds[:, compared:]
        offsets = np.median(clocks - clocks[0], axis=1) if compared else np.zeros(len(clocks))
        slowest = find_parting(edges[:, 1:-1], offsets, min_seconds)
        if slowest is not None:
            collective = names[slowest.number]
        else:
            # All were slow in one place: after the same collective, or before the first.
            shared = np.diff(edges, axis=1).min(axis=0)
            slowest = Parting(int(shared.argmax()), None, float(shared.max()))
            collective = names[slowest.number - 1] if slowest.number else None
        place = stamps[compared + slowest.number :][:2]
    here, whole = phases.seconds(*place), phases.seconds(window.first_ns, window.last_ns)
    for first, last in window.pauses:
        paused = phases.seconds(first, last)
        whole = {phase: spent - paused[phase] for phase, spent in whole.items()}
    spent = {f"{name}_s": round(seconds, 4) for name, seconds in {"step": window.seconds, **whole}.items()}
    mine = {"rank": accelerator.process_index, "host": platform.node(), **spent}
    phase = max(here, key=lambda name: here[name])
    ranks, phase_of = map(list, zip(*gather_object([(mine, phase)]), strict=True))
    if len(ranks) == 1:
        return Cause(0, mine["host"], window.seconds - window.usual_s, phase, collective, True, ranks)
    if slowest is None:
        return Cause(None, "", 0.0, None, None, False, ranks)
    if slowest.rank is None:
        most = max(PHASES, key=phase_of.count)
        return Cause(None, "", slowest.seconds, most, collective, True, ranks)
    late = slowest.rank
    return Cause(late, ranks[late]["host"], slowest.seconds, phase_of[late], collective, True, ranks)
