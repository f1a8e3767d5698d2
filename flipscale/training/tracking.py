"""What a run reports while it trains: `metrics.jsonl` always, trackers on request; a progress bar on a terminal, lines
elsewhere."""

import logging
import math
import sys
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from flipscale.engines.device import peak_flops, peak_memory_bytes
from flipscale.evaluation.reports.curves import read_curve
from flipscale.evaluation.reports.figures import can_draw, draw_run
from flipscale.evaluation.results import Result, append_results, as_metrics, drop_results_after
from flipscale.io import json_lines
from flipscale.io.atomic import write_text
from flipscale.io.files import read_text
from flipscale.training.budget.progress import Progress
from flipscale.training.energy_meter import EnergyMeter
from flipscale.training.health import Verdict
from flipscale.training.recipe import LogRecipe
from flipscale.training.report import duration, interval_line, results_line
from flipscale.training.schedule import has_passed
from flipscale.training.schedule import is_due as is_due_at
from flipscale.training.watch import StepWatch

if TYPE_CHECKING:
    from accelerate import Accelerator

PROJECT = "flipscale"
# Drawing takes a second or two, so an evaluation redraws only older figures.
_FRESH_SECONDS = 300.0
_log = logging.getLogger(__name__)


def draw_figures(run_dir: Path) -> dict[str, str]:
    """Draw the figures of a run into `figures/`, and return their captions by name; empty without matplotlib.

    A run does not end for its figures: an error of matplotlib is logged.
    """
    if not can_draw():
        return {}
    try:
        return draw_run(read_curve(run_dir), run_dir / "figures")
    except (ValueError, KeyError, TypeError, RuntimeError, OSError, MemoryError) as error:
        _log.warning("the figures could not be drawn (%s: %s); the run goes on", type(error).__name__, error)
        return {}


def open_trackers(accelerator: "Accelerator", run_dir: Path, config: Mapping[str, bool | int | float | str]) -> None:
    """Start accelerate's trackers, of the project `flipscale`.

    Args:
        config: the fields of the recipe, for trackers that compare runs by them.
    """
    if not accelerator.log_with:
        return
    from accelerate.tracking import TensorBoardTracker

    # TensorBoard names its folder after the project; a run directory has it under the tool's name.
    accelerator.log_with = [
        TensorBoardTracker("tensorboard", run_dir) if str(one) == "tensorboard" else one for one in accelerator.log_with
    ]
    options = _options(run_dir) if accelerator.is_main_process else None
    accelerator.init_trackers(PROJECT, config=dict(config), init_kwargs=options)


def _options(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Return what makes each tracker go on with the run that it began in an earlier start of this run directory."""
    file = run_dir / "tracker_run_id"
    if not file.exists():
        write_text(file, uuid.uuid4().hex)
    run_id = read_text(file)
    return {
        # W&B would make a folder `wandb` where the command was typed.
        "wandb": {"id": run_id, "name": run_dir.name, "resume": "allow", "dir": str(run_dir)},
        "trackio": {"name": f"{run_dir.name}-{run_id[:8]}", "resume": "allow"},
        "comet_ml": {"experiment_key": run_id},
    }


class Tracker:
    """Writes a record for every interval and every evaluation, on the main process; used in a `with` block.

    An interval's record has the last step's loss, lr, grad_norm and logit_scale, and for the whole interval
    images_per_s, mfu (the operations of those images, the mask counted, over what all devices could do; absent where
    that is unknown), data_wait_share, peak_memory_bytes of the main process, num_replaced (bad samples of all
    processes; `replaced/CAUSE` for each cause), num_skipped (steps with a non-finite loss or gradient), num_slow
    (steps that took far longer than usual), and energy_kwh of the whole run so far where it is measured.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        run_dir: Path,
        recipe: LogRecipe,
        watch: StepWatch,
        step_samples: int,
        progress: Progress,
        pair_flops: Mapping[str, int],
    ):
        """`pair_flops` are the operations of a pair in each stage, forward and backward."""
        self._accelerator = accelerator
        self._recipe = recipe
        self._watch = watch
        self._step_samples = step_samples
        self._progress = progress
        self._last_position = progress.position
        self._pair_flops = pair_flops
        self.energy = EnergyMeter(accelerator, run_dir)
        self._path = run_dir / "metrics.jsonl"
        self._schedule_path = run_dir / "schedule.jsonl"
        self._peak_flops: float | None = None
        self._begin = watch.so_far()
        self._steps = self._skipped = self._done = 0
        self._bar: tqdm | None = None
        self._drawn = time.monotonic()
        # Whether a line has said how long the run takes.
        self._has_told = False

    def start(self, step: int) -> None:
        """Drop the records of what will be done again, all of them at step 0, and show a progress bar on a terminal."""
        self._done = step
        if not self._accelerator.is_main_process:
            return
        one = peak_flops(self._accelerator.device, self._accelerator.mixed_precision)
        self._peak_flops = one and one * self._accelerator.num_processes
        last = step or -1  # what weights achieved before the first step will be found again
        for path in (self._path, self._schedule_path):
            if path.exists():
                json_lines.rewrite(path, [one for one in json_lines.read(path, step=int) if one["step"] <= last])
        drop_results_after(self._path.parent, last)
        if sys.stderr.isatty():
            total = self._progress.total_steps
            self._bar = tqdm(
                total=total and total * self._step_samples,
                initial=step * self._step_samples,
                unit="pair",
                unit_scale=True,
                dynamic_ncols=True,
            )

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if error is None:
            for tracker in self._accelerator.trackers:
                tracker.finish()

    def count_step(self, verdict: Verdict) -> bool:
        """Count a step, which is skipped if it was not finite; return whether an interval ends with it."""
        self._steps += 1
        self._done += 1
        self._skipped += not verdict.finite
        self.energy.read()
        if self._accelerator.is_main_process:
            place = self._progress.record(verdict.num_done, verdict.position, verdict.learning_rate)
            json_lines.append(self._schedule_path, place)
        before, self._last_position = self._last_position, verdict.position
        every_share = self._recipe.every_share
        is_due = self._is_last(verdict) or (
            has_passed(before, verdict.position, every_share)
            if every_share
            else is_due_at(verdict.num_done, self._step_samples, self._recipe.every_samples)
        )
        usual = self._watch.usual_seconds
        if self._bar is not None:
            self._bar.update(self._step_samples)
        elif usual is not None and not self._has_told and not is_due:
            left = duration(self._seconds_left(self._done, usual))
            _log.info("about %s to go at %.2g s a step, evaluations and saves left out", left, usual)
            self._has_told = True
        return is_due

    def _is_last(self, verdict: Verdict) -> bool:
        return self._progress.is_over and verdict.num_done == self._progress.step

    def write_interval(self, verdict: Verdict, replaced: Counter[str]) -> None:
        """Write the record of the interval that ends with a step.

        Args:
            verdict: on that step.
            replaced: how many samples were replaced in the interval, by cause.
        """
        stage = verdict.stage.name
        seconds, wait_seconds, num_slow = verdict.clock.since(self._begin)
        self._begin = verdict.clock
        images_per_s = self._steps * self._step_samples / seconds
        mfu = {} if self._peak_flops is None else {"mfu": images_per_s * self._pair_flops[stage] / self._peak_flops}
        interval = {
            "images_per_s": images_per_s,
            **mfu,
            "data_wait_share": wait_seconds / seconds,
            "peak_memory_bytes": peak_memory_bytes(self._accelerator.device),
            "num_replaced": replaced.total(),
            **{f"replaced/{cause}": count for cause, count in sorted(replaced.items())},
            "num_skipped": self._skipped,
            "num_slow": num_slow,
            **self.energy.update(verdict.num_done),
        }
        learned = {"loss": verdict.loss, "lr": verdict.learning_rate, "grad_norm": verdict.grad_norm, **verdict.metrics}
        metrics = {**learned, "stage": stage, **interval}
        self.write(verdict.num_done, verdict.clock.seconds, metrics)
        if self._bar is not None:
            done = "" if self._progress.total_steps else f", {self._progress.words(verdict.num_done)}"
            self._bar.set_postfix_str(f"loss {verdict.loss:.3f}, {stage}{done}", refresh=False)
            if self._is_last(verdict):
                self._bar.close()  # what is said from now on stands below it
        else:
            left = None if self._is_last(verdict) else self._seconds_left(verdict.num_done, seconds / self._steps)
            _log.info("%s", interval_line(self._progress.words(verdict.num_done), metrics, left))
            self._has_told = True
        self._steps = self._skipped = 0

    def _seconds_left(self, step: int, step_seconds: float) -> float:
        """Return what the run takes from `step` on, if the step before it took `step_seconds`."""
        return self._progress.seconds_left(step, step_seconds, self._pair_flops)

    def write(self, step: int, trained_seconds: float, metrics: Mapping[str, Any]) -> None:
        """Append one record, and hand its numbers to the trackers; a number that is not finite becomes null."""
        if not self._accelerator.is_main_process:
            return
        record: dict[str, Any] = {
            "step": step,
            "samples_seen": step * self._step_samples,
            "trained_seconds": trained_seconds,
        }
        record.update({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()})
        json_lines.append(self._path, [record])
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        self._accelerator.log(numbers, step=step)

    def write_results(self, step: int, results: Sequence[Result]) -> None:
        """Append the results of evaluations to `results.jsonl`, a line each, and to `metrics.jsonl`, one record."""
        if not results:
            return
        seconds = self._watch.trained_seconds
        if self._accelerator.is_main_process:
            append_results(self._path.parent, results, step, step * self._step_samples, seconds)
            if time.monotonic() - self._drawn > _FRESH_SECONDS:
                draw_figures(self._path.parent)
                self._drawn = time.monotonic()
        _log.info("%s", results_line(step, results))
        self.write(step, seconds, as_metrics(results))
