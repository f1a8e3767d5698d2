"""Facts of a run, read from its directory: for `flipscale status`, the model card and the page."""

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from flipscale.io import json_lines
from flipscale.io.errors import UserError
from flipscale.io.paths import read_text
from flipscale.io.yaml_text import read_saved_recipe
from flipscale.recipe.optim import StageRecipe
from flipscale.recipe.outputs import CHECKPOINT, CostRecipe
from flipscale.recipe.schedule import schedule_stages

ENERGY_FILE = "energy.jsonl"
_START = {"step": int, "num_processes": int, "time": int | float, "set_aside": list | None}
_HEARTBEAT = {"time": int | float, "step": int, "phase": str, "step_s": int | float | None}


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
        return sum(self.parts.values()) if self.parts else None

    @property
    def is_whole(self) -> bool:
        """Whether all starts were measured to their end."""
        return self.num_measured == self.num_starts and not self.num_failed

    @property
    def words(self) -> str:
        measured = "measured: " + " and ".join(self.parts)
        if self.is_whole:
            return measured
        failed = f", {self.num_failed} of them not to the end" if self.num_failed else ""
        return f"{measured}, in {self.num_measured} of {self.num_starts} starts{failed}"


class RunSummary:
    """Facts of a run, up to a step or, without one, to its end. A property reads its files at its first use."""

    def __init__(self, run_dir: Path, step: int | None = None):
        self.run_dir = run_dir
        self.step = step

    @cached_property
    def recipe(self) -> dict[str, Any]:
        file = self.run_dir / "recipe.yaml"
        if not file.exists():
            raise UserError(f"{self.run_dir} is not a run directory: it has no recipe.yaml, which a start writes")
        return read_saved_recipe(file)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Content of `environment.json`: versions, command and machine."""
        file = self.run_dir / "environment.json"
        try:
            return dict(json.loads(read_text(file)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}); start the run again, which writes it anew") from error

    @property
    def command(self) -> str | None:
        """Command line of the last start; None if it is unknown."""
        return self.environment.get("command") if (self.run_dir / "environment.json").exists() else None

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        return json_lines.read(self.run_dir / "starts.jsonl", **_START)

    @cached_property
    def kept_starts(self) -> list[dict[str, Any]]:
        """Records of the starts whose steps the run kept: a start replaces the earlier ones from its step on."""
        kept: list[dict[str, Any]] = []
        for start in self.starts:
            kept = [*(earlier for earlier in kept if earlier["step"] < start["step"]), start]
        return kept

    @cached_property
    def heartbeat(self) -> dict[str, Any]:
        """The last heartbeat: `time`, `step`, `phase`, `step_s`. Empty before the first."""
        return (json_lines.read(self.run_dir / "heartbeat.json", **_HEARTBEAT) or [{}])[-1]

    @property
    def is_done(self) -> bool:
        return (self.run_dir / "DONE").exists()

    @cached_property
    def checkpoint(self) -> Path | None:
        """Path of the newest checkpoint, None before the first."""
        checkpoints = [one for one in (self.run_dir / "checkpoints").glob("step-*") if CHECKPOINT.fullmatch(one.name)]
        return max(checkpoints, key=lambda path: int(path.name[5:]), default=None)

    @property
    def checkpoint_samples(self) -> int | None:
        """Pairs seen at the newest checkpoint, None before the first."""
        return None if self.checkpoint is None else int(self.checkpoint.name[5:]) * self.batch_size

    @property
    def batch_size(self) -> int:
        return self._lengths[0]

    @property
    def total_samples(self) -> int | None:
        """Pairs of the whole run; None with a time budget."""
        return self._lengths[1]

    @property
    def budget_minutes(self) -> float | None:
        """Time budget in minutes; None if the run counts samples."""
        return self._lengths[2]

    @cached_property
    def _lengths(self) -> tuple[int, int | None, float | None]:
        try:
            batch, budget = self.recipe["data"]["global_batch_size"], self.recipe.get("budget_minutes")
            stages = schedule_stages([StageRecipe(**stage) for stage in self.recipe["stages"]], batch, budget)
            return batch, int(stages[-1].last) * batch if budget is None else None, budget
        except (KeyError, TypeError, ZeroDivisionError, AttributeError) as error:
            raise UserError(
                f"{self.run_dir}/recipe.yaml is damaged ({error!r}); copy the one of a checkpoint there"
            ) from error

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        records = json_lines.read_metrics(self.run_dir)
        return records if self.step is None else [record for record in records if record["step"] <= self.step]

    @property
    def intervals(self) -> list[dict[str, Any]]:
        """Records of training intervals, which have a speed; the others are of evaluations."""
        return [record for record in self.records if "images_per_s" in record]

    def latest(self, name: str) -> Any:
        """Return a number of the last interval, such as `mfu` or `data_wait_share`; None if it is unknown."""
        return self.intervals[-1].get(name) if self.intervals else None

    def total(self, name: str) -> int:
        """Return the sum of a count over all intervals: `num_replaced`, `num_skipped` or `num_slow`."""
        return sum(record.get(name) or 0 for record in self.intervals)

    @property
    def peak_memory_bytes(self) -> int:
        """Peak memory of the main process; 0 if it is unknown."""
        return max((record.get("peak_memory_bytes") or 0 for record in self.intervals), default=0)

    @property
    def samples_seen(self) -> int:
        """Pairs seen so far, by the records, the newest checkpoint and the heartbeat."""
        if self.is_done and self.step is None and self.total_samples is not None:
            return self.total_samples
        recorded = self.records[-1]["samples_seen"] if self.records else 0
        if self.step is not None:
            return recorded
        return max(self.checkpoint_samples or 0, self.heartbeat.get("step", 0) * self.batch_size, recorded)

    @property
    def trained_seconds(self) -> float:
        """Training time in seconds, without evaluations and saves."""
        return self.records[-1]["trained_seconds"] if self.records else 0.0

    @property
    def hardware(self) -> list[str]:
        """Devices of the kept starts, such as `2 x NVIDIA H100`, each once."""
        return list(dict.fromkeys(f"{start['num_processes']} x {start['device']}" for start in self.kept_starts))

    @cached_property
    def energy(self) -> Energy:
        lines = json_lines.read(self.run_dir / ENERGY_FILE, "start", "step", "energy_parts")
        num_starts = len(self.starts)
        if self.step is not None:
            count = max((number for number, line in enumerate(lines, 1) if line["step"] <= self.step), default=0)
            lines = lines[:count]
            num_starts = max((line["start"] for line in lines), default=num_starts)
        # A line holds the energy since the begin of its start, so the last line of each start counts.
        last = {line["start"]: line for line in lines}.values()
        parts: Counter[str] = Counter()
        for line in last:
            parts.update(line["energy_parts"])
        return Energy(dict(parts), num_starts, len(last), sum(line.get("failed") is True for line in last))

    @property
    def cost(self) -> CostRecipe:
        return CostRecipe(**self.recipe.get("cost", {}))

    @property
    def device_hours(self) -> float | None:
        """Hours times devices; None without a start. Up to a step, only training counts, without lost steps.

        For the whole run, a start counts from its begin to its last sign of life, as a cloud bills it.
        """
        starts = self.kept_starts if self.step is not None else self.starts or self.kept_starts
        if not starts:
            return None
        if self.step is None and self.starts:
            ends = [start.get("last_sign_before") for start in starts[1:]] + [self.heartbeat.get("time")]
            # A start that died before its first sign has an earlier start's sign, or none.
            spans = [max((end or 0.0) - start["time"], 0.0) for start, end in zip(starts, ends, strict=True)]
        else:
            ends = [start["trained_seconds"] for start in starts[1:]] + [self.trained_seconds]
            spans = [end - start["trained_seconds"] for start, end in zip(starts, ends, strict=True)]
        return sum(span * start["num_processes"] for span, start in zip(spans, starts, strict=True)) / 3600

    @property
    def co2_kg(self) -> float | None:
        """Emissions of the measured energy; None unless all starts were measured and the grid is known."""
        return self.cost.co2_kg(self.energy.kwh if self.energy.is_whole else None)

    @property
    def dollars(self) -> float | None:
        """Price of the device hours, None if it is unknown."""
        return self.cost.dollars(self.device_hours)
