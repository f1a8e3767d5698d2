"""Steps timed one by one, with the GPU's energy and clock rate meanwhile, and the figures of several starts."""

import time
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch

from flipscale.checks.node import Row
from flipscale.engines.device import wait_for
from flipscale.io.surroundings import known
from flipscale.records.energy_meter import open_gpu


def timed_steps(step: Callable[[], object], count: int, device: torch.device) -> Row:
    """Return the `times` of steps in seconds, and the `joules` and the clock rate `mhz` of a GPU meanwhile. Both are
    None if NVML does not know them.

    A GPU's own clock times its steps, because it would be idle if the host waited for each."""

    def mark() -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    wait_for(device)
    counters = known(lambda: open_gpu(device))
    marks = [mark()]
    for _ in range(count):
        step()
        marks.append(mark())
    # The GPU still computes the last step.
    mhz = known(lambda: torch.cuda.clock_rate(device)) if device.type == "cuda" else None
    wait_for(device)
    joules = known(lambda: counters[0].joules())  # type: ignore[index]
    spans = [a.elapsed_time(b) / 1e3 if device.type == "cuda" else b - a for a, b in pairwise(marks)]
    return {"times": spans, "joules": joules, "mhz": mhz}


def over_starts(starts: Sequence[Sequence[Row]]) -> Row:
    """Return one row for the rows of all ranks in each start.

    A start counts as its slowest rank, because the others wait for it. `seconds` is the median of all steps,
    `quartiles` are theirs, and `medians` has the median of each start. `watts` and `mhz` are means over GPUs, and
    `pairs_per_s` and `pairs_per_joule` are for one GPU. `mfu` needs `peak_s`, a step's operations at the GPU's peak.
    """
    if lost := [row for ranks in starts for row in ranks if "out_of_memory" in row]:
        return lost[0]
    slowest = [max(ranks, key=lambda row: sum(row["times"])) for ranks in starts]
    times, rows = [row["times"] for row in slowest], list(chain(*starts))
    first, median, third = np.percentile(list(chain(*times)), [25, 50, 75]).tolist()
    watts, mhz = None, [row["mhz"] for row in rows if row["mhz"]]
    if all(row["joules"] for row in rows):
        watts = sum(row["joules"] for row in rows) / sum(sum(row["times"]) for row in rows)
    rate, peak_s = slowest[0]["pairs"] / median, slowest[0]["peak_s"]
    medians = [float(np.median(of_start)) for of_start in times]
    found = {"times": times, "seconds": median, "quartiles": [first, third], "medians": medians, "pairs_per_s": rate}
    loads = {"watts": watts, "mhz": float(np.mean(mhz)) if mhz else None, "pairs_per_joule": watts and rate / watts}
    peaks = {"peak_bytes": max(row["peak_bytes"] for row in rows)} if "peak_bytes" in rows[0] else {}
    return {**slowest[0], **peaks, **found, **loads, "mfu": peak_s and peak_s / median}
