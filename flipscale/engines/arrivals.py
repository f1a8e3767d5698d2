"""Which process was late in a step, and in what: by when each of them arrived at the step's collectives.

Torch's flight recorder notes when this process came to each collective. All processes come to the same ones in the same
order, so the late one is the last at the first collective where their arrivals part. It names itself and says what it
did before that, by the times at which it began the phases of its steps.
"""

import json
import math
import pickle
import socket
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from accelerate import Accelerator

# What a step's time goes to; `verdict` is the wait for the device, where there is one.
PHASES = ("data", "forward", "loss", "backward", "update", "verdict")

# Arrivals have parted, or all processes were in the same place, if it is for this share of what a step took too long.
_SHARE = 0.5
# The collectives before the step, by which the processes' clocks are compared. They bound the gathered bytes.
_COMPARED = 256
_HOST_BYTES = 64
_DUMP_SECONDS = 5.0

_begun: deque[tuple[int, str]] = deque(maxlen=4096)


def begin(phase: str) -> None:
    """Note that this process begins a phase of its step now."""
    _begun.append((time.time_ns(), phase))


def phase_seconds(first_ns: int, last_ns: int) -> dict[str, float]:
    """Return how long this process was in each phase between two times."""
    seconds = dict.fromkeys(PHASES, 0.0)
    ends = [time_ns for time_ns, _ in list(_begun)[1:]] + [last_ns]
    for (start, phase), end in zip(list(_begun), ends, strict=True):
        seconds[phase] += max(min(end, last_ns) - max(start, first_ns), 0) / 1e9
    return seconds


@dataclass
class Window:
    """An iteration of the training loop as this process saw it, by its own clock.

    Args:
        step: that it began with.
        first_ns: its begin.
        last_ns: its end.
        pauses: evaluations and saves amid it, which are no part of it.
        usual_s: what its like took before.
    """

    step: int
    first_ns: int
    usual_s: float
    last_ns: int = 0
    pauses: list[tuple[int, int]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """How long it took, without its pauses."""
        return (self.last_ns - self.first_ns - sum(last - first for first, last in self.pauses)) / 1e9

    def has(self, time_ns: int) -> bool:
        """Return whether a time is in it."""
        return self.first_ns <= time_ns < self.last_ns and not any(a <= time_ns < b for a, b in self.pauses)


class Collective(NamedTuple):
    """A collective that this process came to.

    Args:
        inside_s: how long the device was in it, NaN where that is not recorded.
    """

    name: str
    arrival_ns: int
    inside_s: float


def recorded_collectives() -> list[Collective] | None:
    """Return the last collectives, oldest first; None where torch has no flight recorder or it is off."""
    if not dist.is_initialized():
        return None
    found: list[dict[str, Any]] = []
    for dump in _dumps("_json"):
        # Point-to-point messages differ between processes.
        found += [entry for entry in json.loads(dump()).get("entries", []) if not entry.get("is_p2p")]
    return [
        Collective(entry["profiling_name"], entry["time_created_ns"], entry.get("duration_ms", np.nan) / 1e3)
        for entry in sorted(found, key=lambda entry: entry["time_created_ns"])
    ] or None


def write_collectives(folder: Path, rank: int) -> None:
    """Write the flight recorder's memory to `rank_N` in a folder, which torch's `torchfrtrace` reads; nothing where
    there is none. Takes five seconds at most, as it is asked for when something hangs."""

    def write() -> None:
        for dump in _dumps(""):
            content = dump()
            if pickle.loads(content).get("entries"):
                folder.mkdir(exist_ok=True)
                (folder / f"rank_{rank}").write_bytes(content)

    if dist.is_initialized():
        writing = threading.Thread(target=write, daemon=True)
        writing.start()
        writing.join(_DUMP_SECONDS)


def _dumps(form: str) -> list[Callable[[], Any]]:
    """Return torch's functions for that, gloo's and, in builds for GPUs, NCCL's; `form` is of what they return."""
    functions = [getattr(torch._C._distributed_c10d, f"_dump_{name}_trace{form}", None) for name in ("fr", "nccl")]
    return [function for function in functions if function is not None]


class Parting(NamedTuple):
    """Where the processes' times parted: at a collective, by its number in the step, for which `rank` was late."""

    number: int
    rank: int
    seconds: float


def find_parting(arrivals: np.ndarray, offsets: np.ndarray, least_seconds: float) -> Parting | None:
    """Return the first collective at which a process was late, None if there is none.

    Args:
        arrivals: seconds, `(processes, collectives)`.
        offsets: of the processes' clocks, `(processes,)`.
        least_seconds: between the first and the last arrival.
    """
    arrivals = arrivals - offsets[:, None]
    spreads = arrivals.max(axis=0) - arrivals.min(axis=0)
    parted = np.flatnonzero(spreads > least_seconds)
    if not len(parted):
        return None
    return Parting(int(parted[0]), int(arrivals[:, parted[0]].argmax()), float(spreads[parted[0]]))


class Cause(NamedTuple):
    """Why a step was slow.

    Args:
        rank: the process that was late; None if all took long, or if no arrivals are known.
        host: of that process, "" if there is none.
        seconds: by which it was late, or which all spent in one place.
        phase: that it, or all, were in; None if it is not known.
        collective: that it came late to, or that all were in or had just left; None if it is not known.
        is_known: whether the arrivals are known.
        ranks: the numbers of every process.
    """

    rank: int | None
    host: str
    seconds: float
    phase: str | None
    collective: str | None
    is_known: bool
    ranks: list[dict[str, Any]]


def find_cause(accelerator: "Accelerator", window: Window) -> Cause:
    """Collective. Return why an iteration was slow, the same on every process."""
    least = _SHARE * max(window.seconds - window.usual_s, 0.0)
    collectives = recorded_collectives()
    within = [one for one in collectives or [] if window.has(one.arrival_ns)]
    earlier = [one.arrival_ns for one in collectives or [] if one.arrival_ns < window.first_ns][-_COMPARED:]
    names = zlib.crc32(" ".join(one.name for one in within).encode())
    is_timed = not any(math.isnan(one.inside_s) for one in within)
    known = _gathered(accelerator, [len(within), names, len(earlier), is_timed])
    if not within or (known[:, :2] != known[0, :2]).any():
        return _cause(accelerator, window, None, [window.first_ns, window.last_ns])
    times = [one.arrival_ns for one in within]
    # Their differences are small, which float64 has; their values are not.
    compared = int(known[:, 2].min())
    stamps = [*earlier[len(earlier) - compared :], window.first_ns, *times, window.last_ns]
    seconds = _gathered(accelerator, stamps).astype(np.int64)
    seconds = (seconds - seconds[0, compared]) / 1e9
    clocks, edges = seconds[:, :compared], seconds[:, compared:]
    offsets = np.median(clocks - clocks[0], axis=1) if compared else np.zeros(len(clocks))
    arrivals = edges[:, 1:-1]
    if known[:, 3].all():
        # A device waits in a collective for the late one, which waits the least.
        arrivals = -_gathered(accelerator, [int(one.inside_s * 1e9) for one in within]).cumsum(axis=1) / 1e9
        offsets = np.zeros(len(arrivals))
    parting = find_parting(arrivals, offsets, least)
    mine = [window.first_ns, *times, window.last_ns]
    if parting is not None:
        place = mine[parting.number : parting.number + 2]
        return _cause(accelerator, window, parting, place, within[parting.number].name)
    # All were in one place: after the same collective, or before the first.
    shared = np.diff(edges, axis=1).min(axis=0)
    longest = int(shared.argmax())
    name = within[longest - 1].name if longest else None
    together = Parting(longest, -1, float(shared[longest]))
    return _cause(accelerator, window, together, mine[longest : longest + 2], name)


def _cause(
    accelerator: "Accelerator", window: Window, parting: Parting | None, place: list[int], collective: str | None = None
) -> Cause:
    """Collective. Return the cause, and for it what each process says of itself; `place` is where this one was."""
    here, whole = phase_seconds(*place), phase_seconds(window.first_ns, window.last_ns)
    for first, last in window.pauses:
        whole = {phase: spent - phase_seconds(first, last)[phase] for phase, spent in whole.items()}
    phase = PHASES.index(max(here, key=lambda name: here[name]))
    host = socket.gethostname().encode()[:_HOST_BYTES].ljust(_HOST_BYTES)
    numbers = [phase, round(window.seconds * 1e6), *(round(whole[name] * 1e6) for name in PHASES), *host]
    table = _gathered(accelerator, numbers).astype(np.int64)
    ranks: list[dict[str, Any]] = []
    for rank, row in enumerate(table):
        seconds = (row[1 : 2 + len(PHASES)] / 1e6).round(4).tolist()
        named = dict(zip(("step_s", *(f"{name}_s" for name in PHASES)), seconds, strict=True))
        ranks.append({"rank": rank, "host": bytes(row[-_HOST_BYTES:].tolist()).decode("utf-8", "replace").strip()})
        ranks[-1] |= named
    if len(ranks) == 1:
        return Cause(0, ranks[0]["host"], window.seconds - window.usual_s, PHASES[table[0, 0]], collective, True, ranks)
    if parting is None:
        return Cause(None, "", 0.0, None, None, False, ranks)
    if parting.rank < 0:
        most = int(np.bincount(table[:, 0]).argmax())
        return Cause(None, "", parting.seconds, PHASES[most], collective, True, ranks)
    late = PHASES[table[parting.rank, 0]]
    return Cause(parting.rank, ranks[parting.rank]["host"], parting.seconds, late, collective, True, ranks)


def _gathered(accelerator: "Accelerator", numbers: list[int]) -> np.ndarray:
    """Collective. Return every process's numbers, int64 `(processes, numbers)`."""
    mine = torch.tensor([numbers], dtype=torch.int64, device=accelerator.device)
    return accelerator.gather(mine).cpu().numpy()
