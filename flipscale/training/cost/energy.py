"""The energy that a run has taken, as `energy.jsonl` of its directory has it."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from flipscale.io import json_lines

_log = logging.getLogger(__name__)

ENERGY = "energy.jsonl"
KINDS = ("GPUs", "processors")
_FIELDS = {"start": int, "step": int, "energy_parts": dict, "failed": bool | None}


@dataclass(frozen=True)
class Energy:
    """What was measured of a run, in all its starts: the energy of steps that a kill lost was spent, too.

    Args:
        parts: kWh of each kind of machinery that was measured.
        num_starts: how many starts the run has had.
        num_measured: of them, how many were measured.
        num_failed: of these, how many not to their end.
    """

    parts: dict[str, float] = field(default_factory=dict)
    num_starts: int = 0
    num_measured: int = 0
    num_failed: int = 0

    @property
    def kwh(self) -> float | None:
        """The sum, None where nothing was measured."""
        return sum(self.parts.values()) if self.parts else None

    @property
    def is_whole(self) -> bool:
        """Whether all starts were measured to their end."""
        return self.num_measured == self.num_starts and not self.num_failed

    @property
    def words(self) -> str:
        """What is in the sum."""
        of = "measured: " + " and ".join(self.parts)
        if self.is_whole:
            return of
        cut = f", {self.num_failed} of them not to the end" if self.num_failed else ""
        return f"{of}, in {self.num_measured} of {self.num_starts} starts{cut}"


def read_energy(run_dir: Path, step: int | None = None) -> Energy:
    """Return what a run has taken; of a file that cannot be read, that nothing was measured: no run ends by it.

    Args:
        step: until the last time that it was there; None for all.
    """
    try:
        lines = json_lines.read(run_dir / ENERGY, **_FIELDS)
    except (OSError, ValueError) as error:
        _log.warning("the energy of %s is not known: %s", run_dir, error)
        return Energy()
    num_starts = len(json_lines.read(run_dir / "starts.jsonl"))
    if step is not None:
        lines = lines[: max((number for number, line in enumerate(lines, 1) if line["step"] <= step), default=0)]
        num_starts = max((line["start"] for line in lines), default=num_starts)
    # Each line of a start has what the ones before it have.
    last = {line["start"]: line for line in lines}.values()
    parts = {kind: [line["energy_parts"].get(kind) for line in last] for kind in KINDS}
    known = {kind: [kwh for kwh in values if isinstance(kwh, int | float)] for kind, values in parts.items()}
    sums = {kind: float(sum(values)) for kind, values in known.items() if values}
    return Energy(sums, num_starts, len(last), sum(line.get("failed") is True for line in last))
