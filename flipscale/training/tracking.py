"""What a run writes while it trains: `metrics.jsonl` always, trackers on request, a progress bar on a terminal."""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from flipscale.engines.device import peak_flops, peak_memory_bytes
from flipscale.evaluation.results import Result, append_results, as_metrics, drop_results_after
from flipscale.training.bad_samples import BadSamples
from flipscale.training.watch import StepWatch


@dataclass(frozen=True)
class LogRecipe:
    """What is reported.

    Args:
        every_samples: interval of the training metrics.
        report_to: accelerate trackers besides `metrics.jsonl`, e.g. tensorboard, wandb.
        hang_seconds: a step that takes longer ends the run, after every rank has written what it was doing. Below the
            ten minutes after which NCCL ends it without a word.
    """

    every_samples: int = 1_000_000
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    hang_seconds: float = 540.0


def is_due(samples_seen: int, step_samples: int, every_samples: int) -> bool:
    """Whether a multiple of `every_samples` was reached by the last step."""
    return every_samples > 0 and samples_seen // every_samples > (samples_seen - step_samples) // every_samples


class Tracker:
    """Collects the steps of an interval and writes one record for it, on the main process.

    A record has the step's loss, lr, grad_norm, logit_scale, and the interval's images_per_s, mfu (those images'
    operations, the mask counted, over what all devices could do; absent where that is unknown), data_wait_share,
    peak_memory_bytes of the main process, num_replaced (bad samples, of all processes; `replaced/CAUSE` for each
    cause), num_skipped (steps with a non-finite loss or gradient) and num_slow (steps that took far longer than usual).
    """

    def __init__(
        self,
        watch: StepWatch,
        bad_samples: BadSamples,
        recipe: LogRecipe,
        step_samples: int,
        total_steps: int,
        pair_flops: Mapping[str, int],
    ):
        """`pair_flops`: operations of a pair in each stage, forward and backward."""
        self.accelerator = watch.accelerator
        self.watch = watch
        self.bad_samples = bad_samples
        self.pair_flops = pair_flops
        self._peak_flops: float | None = None
        self.every_samples = recipe.every_samples
        self.step_samples = step_samples
        self.path = watch.run_dir / "metrics.jsonl"
        self._seconds_before = 0.0
        self._running_since: float | None = None
        self._total_steps = total_steps
        self._bar: tqdm | None = None
        self._reset()

    def start(self, step: int, trained_seconds: float) -> None:
        """Begins at `step`, after an earlier run's `trained_seconds`; records past it are of steps taken back."""
        if self.accelerator.is_main_process:
            one = peak_flops(self.accelerator.device, self.accelerator.mixed_precision)
            self._peak_flops = one and one * self.accelerator.num_processes
        self._seconds_before = trained_seconds
        self.resume()
        self._reset()
        if not self.accelerator.is_main_process:
            return
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in lines))
            partial.replace(self.path)
        drop_results_after(self.path.parent, step)
        self._bar = tqdm(
            total=self._total_steps * self.step_samples,
            initial=step * self.step_samples,
            unit="pair",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def after_step(self, step: int, metrics: dict[str, Any], skipped: bool) -> None:
        """Collective. Counts a step, now `step` in all, and writes the interval's record when it is due."""
        self._steps += 1
        self._skipped += skipped
        if self._bar is not None:
            self._bar.update(self.step_samples)
        samples_seen = step * self.step_samples
        if not (is_due(samples_seen, self.step_samples, self.every_samples) or step == self._total_steps):
            return
        self.write(step, {**metrics, **self._interval(metrics["stage"])})
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {metrics['stage']}", refresh=False)
        self._reset()

    def _interval(self, stage: str) -> dict[str, float]:
        """Collective. What the steps since the last record come to."""
        seconds = self.trained_seconds - self._interval_start
        images_per_s = self._steps * self.step_samples / seconds
        replaced = self.bad_samples.take_counts()
        mfu = {} if self._peak_flops is None else {"mfu": images_per_s * self.pair_flops[stage] / self._peak_flops}
        return {
            "images_per_s": images_per_s,
            **mfu,
            "data_wait_share": (self.watch.wait_seconds - self._wait_start) / seconds,
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
            "num_replaced": replaced.total(),
            **{f"replaced/{cause}": count for cause, count in sorted(replaced.items())},
            "num_skipped": self._skipped,
            "num_slow": self.watch.num_slow - self._slow_start,
        }

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends one record; a number that is not finite is null in it."""
        if not self.accelerator.is_main_process:
            return
        record: dict[str, Any] = {
            "step": step,
            "samples_seen": step * self.step_samples,
            "trained_seconds": self.trained_seconds,
        }
        record.update({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()})
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=step)

    def write_results(self, step: int, results: Sequence[Result]) -> None:
        """Append the results of evaluations to `results.jsonl`, a line each, and to `metrics.jsonl`, one record."""
        if not results:
            return
        if self.accelerator.is_main_process:
            append_results(self.path.parent, results, step, step * self.step_samples, self.trained_seconds)
        self.write(step, as_metrics(results))

    @property
    def trained_seconds(self) -> float:
        """Time spent training since the run began, resumes counted, evaluations and saves not."""
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return self._seconds_before + running

    def pause(self) -> None:
        """Stops the clock: what follows (an evaluation, a save) is not training."""
        self._seconds_before = self.trained_seconds
        self._running_since = None
        self.watch.pause()

    def resume(self) -> None:
        """Starts the clock again."""
        self._running_since = time.perf_counter()

    def finish(self) -> None:
        """Closes the progress bar and stops the watch."""
        self.watch.finish()
        if self._bar is not None:
            self._bar.close()

    def _reset(self) -> None:
        self._interval_start = self.trained_seconds
        self._wait_start, self._slow_start = self.watch.wait_seconds, self.watch.num_slow
        self._steps = self._skipped = 0


def _step_of(line: str) -> float:
    """The step of a record; never, of one that a kill or a full disk cut off."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf
