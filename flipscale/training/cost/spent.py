"""What a run has taken so far, by its files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flipscale.io import json_lines
from flipscale.training.cost.energy import Energy
from flipscale.training.cost.recipe import CostRecipe


class Spent(NamedTuple):
    """What a run has taken, each None where it is unknown.

    Args:
        device_hours: hours times devices, evaluations, saves and what a kill undid included where they are known.
        co2_kg: of all starts, at what the recipe's `cost` says of the grid.
        dollars: at what it says of a device's hour.
    """

    device_hours: float | None
    co2_kg: float | None
    dollars: float | None


def spent(
    starts: Sequence[Mapping[str, Any]],
    last: Mapping[str, Any],
    energy: Energy,
    recipe: CostRecipe,
    occupied: float | None = None,
) -> Spent:
    """Return what a run has taken.

    Args:
        starts: of `read_starts`.
        last: the last record of its metrics.
        energy: that was measured.
        recipe: its `cost`.
        occupied: of `occupied_device_hours`; None takes the hours of training that were kept.
    """
    hours = _device_hours(starts, last["trained_seconds"]) if occupied is None else occupied
    return Spent(hours, recipe.co2_kg(energy.kwh if energy.is_whole else None), recipe.dollars(hours))


def occupied_device_hours(run_dir: Path) -> float | None:
    """Return the hours that a run has had its devices, times their number: each start from its begin to its last sign
    of life, as a cloud bills them. None where one was recorded without these times."""
    fields = {"num_processes": int, "time": int | float, "last_sign_before": int | float | None}
    starts = json_lines.read(run_dir / "starts.jsonl", **fields)
    if not starts:
        return None
    ends = [start.get("last_sign_before") for start in starts[1:]] + [last_sign(run_dir)]
    seconds = 0.0
    for start, end in zip(starts, ends, strict=True):
        if end is None:
            return None
        # One that was killed before its first sign has left that of an earlier one.
        seconds += max(end - start["time"], 0.0) * start["num_processes"]
    return seconds / 3600


def last_sign(run_dir: Path) -> float | None:
    """Return when a run gave its last sign of life, in seconds since 1970; None where it has given none."""
    return next((sign["time"] for sign in json_lines.read(run_dir / "heartbeat.json", time=int | float)), None)


def _device_hours(starts: Sequence[Mapping[str, Any]], seconds: float) -> float | None:
    """Return hours times devices, summed over the starts of a run: a resumed one may have had other devices. None where
    no start was recorded.

    Args:
        starts: of `read_starts`.
        seconds: that the run has trained.
    """
    if not starts:
        return None
    ends = [start["trained_seconds"] for start in starts[1:]] + [seconds]
    spent = zip(starts, ends, strict=True)
    return sum((end - start["trained_seconds"]) * start["num_processes"] for start, end in spent) / 3600
