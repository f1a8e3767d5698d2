"""The lines of a run between its first and its last: how it goes, what it found, where it saved."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flipscale.training.report.command import how_to_go_on

if TYPE_CHECKING:
    from flipscale.evaluation.results import Result


def stopped_line(place: str) -> str:
    """Return that a run has saved and ends, and how it goes on.

    Args:
        place: where it ends, as `Progress.place` says.
    """
    return f"stopped and saved at {place}; {how_to_go_on()}"


def saved_line(step: int, checkpoint: Path) -> str:
    """Return that a checkpoint is on disk."""
    return f"step {step:,}: saved {checkpoint}"


def interval_line(done: str, record: Mapping[str, Any], left: float | None) -> str:
    """Return how a run goes.

    Args:
        done: how far it is, as `Progress.words` says.
        record: of the interval, as `metrics.jsonl` has it.
        left: the seconds that it still takes, None at its end.
    """
    loss = f"{record['loss']:.3f}" if math.isfinite(record["loss"]) else "not finite"
    parts = [
        f"{done}, {record['stage']}: loss {loss}",
        f"learning rate {record['lr']:.2g}",
        f"{record['images_per_s']:,.0f} images/s",
        f"{record['data_wait_share']:.0%} waiting for data",
    ]
    replaced, skipped = record["num_replaced"], record["num_skipped"]
    if replaced:
        parts.append(f"{replaced:,} bad sample{'s' * (replaced != 1)} replaced")
    if skipped:
        parts.append(f"{skipped:,} step{'s' * (skipped != 1)} skipped as not finite")
    return ", ".join(parts if left is None else [*parts, f"{duration(left)} left"])


def results_line(step: int, results: Sequence["Result"]) -> str:
    """Return what evaluations found: the headlines with their 95 % intervals."""
    shown = [result for result in results if result.headline] or results
    return f"step {step:,}: " + ", ".join(f"{one.task} {one.shown} {one.estimate_text}" for one in shown)


def expected_line(seconds: float, step_seconds: float) -> str:
    """Return how long a run takes from now on."""
    return f"about {duration(seconds)} to go at {step_seconds:.2g} s a step, evaluations and saves left out"


def duration(seconds: float) -> str:
    """Return a time span in its two largest units: `3 d 4 h`, `12 min 5 s`, `8 s`."""
    left = round(seconds)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"
