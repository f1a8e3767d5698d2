"""Records of a run: `metrics.jsonl`, `bad_samples.jsonl`, trackers on request, and a progress bar or log lines."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import uuid
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from flipscale.engines.device import peak_flops, peak_memory_bytes
from flipscale.io import json_lines
from flipscale.io.atomic import write_text
from flipscale.io.paths import read_text
from flipscale.io.text_table import duration
from flipscale.process.world import gather_objects
from flipscale.recipe.recipe import as_fields
from flipscale.recipe.schedule import Schedule, Step, has_passed, is_due
from flipscale.records.diagnosis import Diagnosis
from flipscale.records.energy_meter import EnergyMeter

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flipscale.data.samples import Fault
    from flipscale.process.slow_steps import Interval, StepWatch
    from flipscale.recipe.outputs import LogRecipe
    from flipscale.recipe.recipe import Recipe

# The limit counts the last million samples: one bad shard does not end a run, but a broken store does. Fewer than a
# thousand samples count as a thousand.
_WINDOW_SAMPLES = 1_000_000
_MIN_SAMPLES = 1_000
_log = logging.getLogger(__name__)


def open_trackers(accelerator: Accelerator, run_dir: Path, config: Mapping[str, bool | int | float | str]) -> None:
    """Start accelerate's trackers; `config` has the fields of the recipe, by which trackers compare runs."""
    if not accelerator.log_with:
        return
    from accelerate.tracking import TensorBoardTracker, on_main_process

    class OneFolder(TensorBoardTracker):
        """TensorBoard's tracker with the recipe next to the metrics; accelerate's makes two more folders a start."""

        @on_main_process
        def store_init_configuration(self, values: dict[str, Any]) -> None:
            from torch.utils.tensorboard.summary import hparams

            for summary in hparams(values, {}):
                self.writer.file_writer.add_summary(summary)

    # TensorBoard names its folder after the project; a run directory has it under the tool's name.
    accelerator.log_with = [
        OneFolder("tensorboard", run_dir) if str(one) == "tensorboard" else one for one in accelerator.log_with
    ]
    options = None
    if accelerator.is_main_process:
        file = run_dir / "tracker_run_id"
        if not file.exists():
            write_text(file, uuid.uuid4().hex)
        run_id = read_text(file)
        # Each tracker goes on with the run of earlier starts. W&B would make a folder `wandb` in the current folder.
        options = {
            "wandb": {"id": run_id, "name": run_dir.resolve().name, "resume": "allow", "dir": str(run_dir)},
            "trackio": {"name": f"{run_dir.resolve().name}-{run_id[:8]}", "resume": "allow"},
            "comet_ml": {"experiment_key": run_id},
        }
    accelerator.init_trackers("flipscale", config=dict(config), init_kwargs=options)


class BadSamples:
    """Gathers the faults of all processes, and writes each once on the main process."""

    def __init__(self, run_dir: Path, is_main: bool, max_fraction: float):
        self.path = run_dir / "bad_samples.jsonl"
        self.is_main = is_main
        self.max_fraction = max_fraction
        self._mine: list[Fault] = []
        # Faults of all processes since the last write.
        self._unwritten = 0
        # Written faults since the last record, by cause.
        self.counts: Counter[str] = Counter()
        self._named: set[tuple[str, int | None]] = set()
        self._window: deque[tuple[int, int]] = deque()
        self._samples = self._bad = 0

    def start(self, position: int, shard_faults: Sequence[Fault]) -> None:
        """Write the names of unreadable shards, and drop samples from `position` on, which are read again."""
        if not self.is_main:
            return
        records = json_lines.read(self.path, "shard", position=int | None)
        kept = [record for record in records if (at := record.get("position")) is not None and at < position]
        records = [dataclasses.asdict(fault) for fault in shard_faults] + kept
        self._named = {(record["shard"], record.get("number")) for record in records}
        if records or self.path.exists():
            json_lines.rewrite(self.path, records)
        for fault in shard_faults:
            _log.warning("%s: %s: %s", fault.cause, fault.shard, fault.detail)

    def count(self, faults: list[Fault], num_bad: int, num_samples: int) -> OSError | None:
        """Count a step of `num_samples`, of which `num_bad` were replaced; `faults` are this process's. Return an error
        on all processes if more than `max_fraction` of the samples in the window were replaced; then collective."""
        self._mine += faults
        self._unwritten += num_bad
        self._window.append((num_bad, num_samples))
        self._bad, self._samples = self._bad + num_bad, self._samples + num_samples
        while len(self._window) > 1 and self._samples - self._window[0][1] >= _WINDOW_SAMPLES:
            old_bad, old_samples = self._window.popleft()
            self._bad, self._samples = self._bad - old_bad, self._samples - old_samples
        if self._bad > self.max_fraction * max(self._samples, _MIN_SAMPLES):
            causes = ", ".join(f"{number} {cause}" for cause, number in self.take_counts().most_common(3))
            return OSError(
                f"{self._bad} of the last {self._samples} samples could not be used, more than data.max_bad_fraction "
                f"{self.max_fraction} (lately: {causes}); {self.path} names them; mend the data or raise the "
                "fraction, and start the run again"
            )
        return None

    def take_counts(self) -> Counter[str]:
        """Collective. Return the number of replaced samples in all processes since the last call, by cause."""
        self.flush()
        counts, self.counts = self.counts, Counter()
        return counts

    def flush(self) -> None:
        """Collective. Write the faults of all processes; without faults, the processes exchange nothing."""
        if self._unwritten == 0:
            return
        faults = sorted(gather_objects(self._mine), key=lambda fault: fault.position or 0)
        self._mine, self._unwritten = [], 0
        self.counts.update(fault.cause for fault in faults)
        if self.is_main:
            new = []
            for fault in faults:
                if (fault.shard, fault.number) not in self._named:
                    self._named.add((fault.shard, fault.number))
                    new.append(dataclasses.asdict(fault))
            json_lines.append(self.path, new)


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The outcome of a step, agreed by all processes.

    Args:
        faults: unusable samples in this process's part of the batch.
        clock: times when the step was sent to the device.
        loss: loss of the global batch.
        grad_norm: norm of the gradients before clipping.
        metrics: the objective's metrics of this process's part of the batch.
        finite: whether the step was taken; a step with a non-finite loss or norm is left out.
        num_replaced: number of unusable samples in the global batch.
        ticked: whether half a minute of training ended with this step, by the main process's clock.
    """

    step: Step
    faults: list[Fault]
    clock: Interval
    loss: float
    grad_norm: float
    metrics: dict[str, float]
    finite: bool
    num_replaced: int
    ticked: bool

    @property
    def num_done(self) -> int:
        """Number of steps of the run up to this one."""
        return self.step.number + 1


class Intervals:
    """Decides which steps end an interval of the log, equally on all processes."""

    def __init__(self, recipe: LogRecipe, schedule: Schedule, step_samples: int):
        self._recipe, self._schedule, self._step_samples = recipe, schedule, step_samples
        self._ended = False

    def ends(self, step: Step, ticked: bool) -> bool:
        """Return whether the next step ends an interval. By default, each hundredth of the run does, and each half
        minute (`ticked`) in which no hundredth ended."""
        if self._recipe.every_share:
            return has_passed(step.before, step.position, self._recipe.every_share)
        if self._recipe.every_samples is not None:
            return is_due(step.number + 1, self._step_samples, self._recipe.every_samples)
        ends = self._schedule.ends_hundredth(step) or (ticked and not self._ended)
        self._ended = (ends or self._ended) and not ticked
        return ends


class Tracker:
    """Writes a record for every interval and every evaluation on the main process; used in a `with` block.

    An interval's record has loss, lr, grad_norm and metrics of its last step, see `Objective.metrics`. Of the whole
    interval it has: images_per_s; mfu (operations of these images without masked patches, as a share of the devices'
    peak; GPUs with a known peak only); data_wait_share; peak_memory_bytes of the main process; num_replaced (bad
    samples of all processes; `replaced/CAUSE` for each cause); num_skipped (steps with a non-finite loss or gradient);
    num_slow (steps far longer than usual); energy_kwh of the run so far, if it is measured.
    """

    def __init__(
        self,
        recipe: Recipe,
        schedule: Schedule,
        accelerator: Accelerator,
        watch: StepWatch,
        pair_flops: Mapping[str, int],
        row_flops: Mapping[str, int] | None = None,
        chance_loss: float | None = None,
    ):
        """Collective. Open the energy counters.

        Args:
            pair_flops: operations of a pair, forward and backward, by the stage's name.
            row_flops: part of them in the text tower, if captions are packed; it counts a row for each caption.
            chance_loss: see `Objective.chance_loss`.
        """
        self.watch = watch
        self._recipe, self._accelerator, self._run_dir = recipe, accelerator, Path(recipe.output_dir)
        self.bad_samples = BadSamples(self._run_dir, accelerator.is_main_process, recipe.data.max_bad_fraction)
        self._intervals = Intervals(recipe.log, schedule, recipe.data.global_batch_size)
        self._schedule, self._step_samples = schedule, recipe.data.global_batch_size
        self._pair_flops, self._row_flops = pair_flops, row_flops
        self._rows = self._captions = 0
        self._diagnosis = Diagnosis(recipe, chance_loss)
        self._energy = EnergyMeter(accelerator, self._run_dir)
        self._peak_flops: float | None = None
        self._begin = watch.so_far()
        self._steps = self._skipped = 0
        self._bar: tqdm[Any] | None = None

    def start(self, state: Mapping[str, Any], faults: Sequence[Fault] = ()) -> None:
        """Start the trackers after a checkpoint with this state, drop the records that will be written again, and show
        a bar on a terminal."""
        step, counts = state.get("step", 0), state.get("interval", {"skipped": 0, "slow": 0, "replaced": {}})
        self._skipped, self.bad_samples.counts = counts["skipped"], Counter(counts["replaced"])
        self._begin = self._begin._replace(num_slow=self._begin.num_slow - counts["slow"])
        open_trackers(self._accelerator, self._run_dir, as_fields(self._recipe))
        self.bad_samples.start(step * self._step_samples, faults)
        if not self._accelerator.is_main_process:
            return
        if self._accelerator.device.type == "cuda":
            peak = peak_flops(self._accelerator.device, self._accelerator.mixed_precision)
            self._peak_flops = peak and peak * self._accelerator.num_processes
        evaluated = self._schedule.last_evaluated(state)
        for path in (self._run_dir / "metrics.jsonl", self._run_dir / "schedule.jsonl"):
            if path.exists():
                records = json_lines.read(path, step=int)
                # Evaluations have no learning rate.
                kept = [one for one in records if one["step"] <= (step if "lr" in one else evaluated)]
                json_lines.rewrite(path, kept)
        if sys.stderr.isatty():
            total = self._bar_place(self._schedule.total_steps or 0, 1.0)
            initial = self._bar_place(step, self._schedule.first(state).position)
            shape = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}" if self._schedule.budget_seconds else None
            options: dict[str, Any] = {"unit": "pair", "unit_scale": True, "dynamic_ncols": True, "bar_format": shape}
            self._bar = tqdm(total=total, initial=initial, **options)

    def _bar_place(self, num_done: int, position: float) -> float:
        """Return how far the bar is after `num_done` steps: in seconds of the time budget, or else in pairs."""
        budget = self._schedule.budget_seconds
        return num_done * self._step_samples if budget is None else min(position, 1.0) * budget

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if error is None:
            for tracker in self._accelerator.trackers:
                tracker.finish()

    def write(self, results: Sequence[StepResult], upcoming: Step) -> OSError | None:
        """Collective. Count steps, and write the record of each interval that ends with one of them. Return an error on
        all processes if more than `data.max_bad_fraction` of the samples are bad.

        Args:
            results: results in the order of steps.
            upcoming: step after the last one sent to the device.
        """
        for result in results:
            step = result.step
            if failure := self.bad_samples.count(result.faults, result.num_replaced, self._step_samples):
                return failure
            self._steps += 1
            self._skipped += not result.finite
            self._energy.read()
            if self._accelerator.is_main_process and self._schedule.budget_seconds is not None:
                place = {"step": result.num_done, "budget_used": step.position, "lr": step.learning_rate}
                json_lines.append(self._run_dir / "schedule.jsonl", [place])
            if self._bar is not None:
                self._bar.update(self._bar_place(result.num_done, upcoming.position) - self._bar.n)
            is_last = upcoming.is_over and result.num_done == upcoming.number
            if self._intervals.ends(step, result.ticked) or is_last:
                self._write_interval(result, upcoming, is_last)
        return None

    def look(self, micro_batches: Sequence[Mapping[str, Any]]) -> None:
        """Count the rows of the text tower that the packed captions of a step take, for `mfu`."""
        self._diagnosis.look(micro_batches)
        for batch in micro_batches if self._row_flops else ():
            self._rows += len(batch["input_ids"])
            self._captions += len(batch["caption_ends"])

    def _flops(self, stage: str) -> float:
        """Return the operations of a pair, with the rows that its captions took since the last call."""
        if self._row_flops is None or not self._captions:
            return self._pair_flops[stage]
        saved, self._rows, self._captions = 1 - self._rows / self._captions, 0, 0
        return self._pair_flops[stage] - saved * self._row_flops[stage]

    def interval(self) -> dict[str, Any]:
        """Collective. Return the counts since the last record, for the state of a checkpoint."""
        self.bad_samples.flush()
        slow = self.watch.so_far().num_slow - self._begin.num_slow
        return {"skipped": self._skipped, "slow": slow, "replaced": self.bad_samples.counts}

    def _write_interval(self, result: StepResult, upcoming: Step, is_last: bool) -> None:
        """Collective. Write the record of the interval that ends with a step."""
        stage, replaced = result.step.stage.name, self.bad_samples.take_counts()
        seconds, wait_seconds, num_slow = (now - before for now, before in zip(result.clock, self._begin, strict=True))
        self._begin = result.clock
        images_per_s = self._steps * self._step_samples / seconds
        mfu = {} if self._peak_flops is None else {"mfu": images_per_s * self._flops(stage) / self._peak_flops}
        metrics = {
            "loss": result.loss,
            "lr": result.step.learning_rate,
            "grad_norm": result.grad_norm,
            **result.metrics,
            "stage": stage,
            "images_per_s": images_per_s,
            **mfu,
            "data_wait_share": wait_seconds / seconds,
            "peak_memory_bytes": peak_memory_bytes(self._accelerator.device),
            "num_replaced": replaced.total(),
            **{f"replaced/{cause}": count for cause, count in sorted(replaced.items())},
            "num_skipped": self._skipped,
            "num_slow": num_slow,
            **self._energy.update(result.num_done),
        }
        record = self._append(result.num_done, result.clock.seconds, metrics)
        for words in self._diagnosis.add(record, is_last) if record else ():
            _log.warning("%s", words)
        place = self._schedule.words(result.num_done, upcoming.position)
        if self._bar is not None:
            done = "" if self._schedule.total_steps else f", {place}, {images_per_s:,.0f} images/s"
            self._bar.set_postfix_str(f"loss {result.loss:.3f}, {stage}{done}", refresh=False)
            if is_last:
                self._bar.close()  # later lines stand below it
        else:
            left = None
            if not is_last and self._accelerator.is_main_process:
                step_seconds = seconds / self._steps
                left = self._schedule.seconds_left(result.num_done, upcoming.position, step_seconds, self._pair_flops)
            _log.info("%s", interval_line(place, metrics, left))
        self._steps = self._skipped = 0

    def _append(self, step: int, trained_seconds: float, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
        """Append a record, pass its numbers to the trackers, and return it; a number that is not finite becomes null.

        Nothing except on the main process.
        """
        if not self._accelerator.is_main_process:
            return None
        place = {"step": step, "samples_seen": step * self._step_samples, "trained_seconds": trained_seconds}
        record = {**place, **metrics}
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        json_lines.append(self._run_dir / "metrics.jsonl", [record])
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        self._accelerator.log(numbers, step=step)
        return record

    def write_measurements(self, step: int, metrics: Mapping[str, float], line: str) -> None:
        """Log the line of evaluations, and append their numbers to `metrics.jsonl` as one record."""
        _log.info("%s", line)
        self._append(step, self.watch.trained_seconds, metrics)

    def record_energy(self, step: int) -> None:
        self._energy.update(step)


def interval_line(place: str, record: Mapping[str, Any], seconds_left: float | None) -> str:
    """Return the loss, rate and speed of an interval by its record in `metrics.jsonl`.

    Args:
        place: position in the run, see `Schedule.words`.
        seconds_left: expected time to the end of the run; None at the end.
    """
    loss = f"{record['loss']:.3f}" if math.isfinite(record["loss"]) else "not finite"
    parts = [
        f"{place}, {record['stage']}: loss {loss}",
        f"learning rate {record['lr']:.2g}",
        f"{record['images_per_s']:,.0f} images/s",
        f"{record['data_wait_share']:.0%} waiting for data",
    ]
    replaced, skipped = record["num_replaced"], record["num_skipped"]
    if replaced:
        parts.append(f"{replaced:,} bad sample{'s' * (replaced != 1)} replaced")
    if skipped:
        parts.append(f"{skipped:,} step{'s' * (skipped != 1)} skipped as not finite")
    return ", ".join(parts if seconds_left is None else [*parts, f"{duration(seconds_left)} left"])
