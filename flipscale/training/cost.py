"""Cost of a run: the recipe's prices, the measured energy, and the hours of its devices."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flipscale.io import json_lines
from flipscale.io.options import NonNegative, Overhead

_log = logging.getLogger(__name__)

ENERGY_FILE = "energy.jsonl"
KINDS = ("GPUs", "processors")
_ENERGY_FIELDS = ("start", "step", "energy_parts")
_START_FIELDS = ("num_processes", "time", "last_sign_before")


@dataclass(frozen=True)
class CostRecipe:
    """The recipe's section `cost`: prices for the model card, the page and `flipscale plan`. They leave out a cost
    whose price is null.

    Args:
        device_hour_dollars: The price of a device for an hour, in dollars.
        kwh_co2_grams: The grid's CO2 emissions in grams per kWh.
        pue: Power usage effectiveness: total power of the data centre divided by its machines' power. 1 leaves out
            cooling and the like.
    """

    device_hour_dollars: NonNegative | None = None
    kwh_co2_grams: NonNegative | None = None
    pue: Overhead = 1.0

    def dollars(self, device_hours: float | None) -> float | None:
        """Return the price of device hours, or None if the hours or the price are unknown."""
        if device_hours is None or self.device_hour_dollars is None:
            return None
        return device_hours * self.device_hour_dollars

    def co2_kg(self, kwh: float | None) -> float | None:
        """Return the grid's emissions for the machines' kWh, or None if either is unknown.

        The emissions of making the machines are left out.
        """
        return None if kwh is None or self.kwh_co2_grams is None else kwh * self.pue * self.kwh_co2_grams / 1000


@dataclass(frozen=True)
class Energy:
    """Measured energy of a run, summed over its starts. Steps that a kill lost count too.

    Args:
        parts: kWh of each measured kind of machinery.
        num_starts: number of starts.
        num_measured: number of starts with a measurement.
        num_failed: number of measurements that ended early.
    """

    parts: dict[str, float] = field(default_factory=dict)
    num_starts: int = 0
    num_measured: int = 0
    num_failed: int = 0

    @property
    def kwh(self) -> float | None:
        """Sum of the parts; None without a measurement."""
        return sum(self.parts.values()) if self.parts else None

    @property
    def is_whole(self) -> bool:
        """Whether all starts were measured to their end."""
        return self.num_measured == self.num_starts and not self.num_failed

    @property
    def words(self) -> str:
        """Description of the sum."""
        measured = "measured: " + " and ".join(self.parts)
        if self.is_whole:
            return measured
        failed = f", {self.num_failed} of them not to the end" if self.num_failed else ""
        return f"{measured}, in {self.num_measured} of {self.num_starts} starts{failed}"


def read_energy(run_dir: Path, step: int | None = None) -> Energy:
    """Return the energy of a run up to `step`; None for the whole run. An unreadable file counts as no measurement."""
    try:
        lines = json_lines.read(run_dir / ENERGY_FILE, *_ENERGY_FIELDS)
    except (OSError, ValueError) as error:
        _log.warning("the energy of %s is unknown: %s", run_dir, error)
        return Energy()
    num_starts = len(json_lines.read(run_dir / "starts.jsonl"))
    if step is not None:
        lines = lines[: max((number for number, line in enumerate(lines, 1) if line["step"] <= step), default=0)]
        num_starts = max((line["start"] for line in lines), default=num_starts)
    # A line holds the energy since the begin of its start, so the last line of each start counts.
    last = {line["start"]: line for line in lines}.values()
    parts = {kind: [line["energy_parts"].get(kind) for line in last] for kind in KINDS}
    known = {kind: [kwh for kwh in values if isinstance(kwh, int | float)] for kind, values in parts.items()}
    sums = {kind: float(sum(values)) for kind, values in known.items() if values}
    return Energy(sums, num_starts, len(last), sum(line.get("failed") is True for line in last))


def occupied_device_hours(run_dir: Path) -> float | None:
    """Return hours times devices, each start from its begin to its last sign of life, as a cloud bills them.

    None if no start was recorded.
    """
    starts = json_lines.read(run_dir / "starts.jsonl", *_START_FIELDS)
    if not starts:
        return None
    ends = [start["last_sign_before"] for start in starts[1:]] + [last_sign(run_dir)]
    # A start that died before its first sign has an earlier start's sign, or none.
    spans = [max((end or 0.0) - start["time"], 0.0) for start, end in zip(starts, ends, strict=True)]
    return sum(span * start["num_processes"] for span, start in zip(spans, starts, strict=True)) / 3600


def training_device_hours(starts: Sequence[Mapping[str, Any]], trained_seconds: float) -> float | None:
    """Return hours of training times devices, without evaluations, saves and lost steps; None without a start.

    Args:
        starts: result of `read_starts`.
        trained_seconds: training time of the run.
    """
    if not starts:
        return None
    ends = [start["trained_seconds"] for start in starts[1:]] + [trained_seconds]
    spans = zip(starts, ends, strict=True)
    return sum((end - start["trained_seconds"]) * start["num_processes"] for start, end in spans) / 3600


def last_sign(run_dir: Path) -> float | None:
    """Return the time of a run's last heartbeat, in seconds since 1970; None without one."""
    return next((sign["time"] for sign in json_lines.read(run_dir / "heartbeat.json", "time")), None)
