"""The agreement of all processes in a step: to take it, to stop, to save, and to commit a checkpoint.

The device learns at once whether the step is taken. The host reads the numbers a step later, when the device already
has the next step to compute, so the device never idles.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from flipscale.io.paths import quoted
from flipscale.recipe.schedule import BudgetProgress, Stage, Step, has_passed
from flipscale.records.tracking import StepResult

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flipscale.data.samples import Fault
    from flipscale.engines.checkpoint import CheckpointWriter
    from flipscale.loop.step import StepLoss
    from flipscale.process.preemption import StopRequest
    from flipscale.process.slow_steps import Interval, StepWatch

MAX_SKIPPED_IN_A_ROW = 5
# A record of a long run comes this often.
_TICK_SECONDS = 30.0
# The median over the last steps of a stage estimates the duration of the next.
_REMEMBERED = 9


@dataclass
class StepOutcomes:
    """Results that became known, and the requests in them.

    Args:
        results: results in the order of steps.
        stop: whether a process was asked to stop.
        save: whether a checkpoint is due by the clock.
        written: whether every process's part of the last checkpoint is on disk.
        failure: error for the caller to raise, if `MAX_SKIPPED_IN_A_ROW` steps in a row were not finite.
    """

    results: list[StepResult] = field(default_factory=list)
    stop: bool = False
    save: bool = False
    written: bool = False
    failure: FloatingPointError | None = None


def host_copy(numbers: torch.Tensor) -> Callable[[], list[float]]:
    """Copy `numbers` `(count,)` to the host asynchronously. They must not change before a call of the returned
    function, which waits for the copy."""
    if not numbers.is_cuda:
        return numbers.tolist
    copy = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
    # `blocking` lets the process sleep while it waits, which leaves its core to the loader's workers.
    arrived = torch.cuda.Event(blocking=True)
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        return copy.tolist()

    return read


class _Unread(NamedTuple):
    """A step whose numbers are on their way to the host."""

    step: Step
    faults: list[Fault]
    clock: Interval
    metrics: list[str]
    read: Callable[[], list[float]]


class StepSync:
    """Leaves out steps whose loss or gradients are not finite, and passes requests on to all processes.

    Attributes:
        progress: last agreed progress in the time budget; None without a budget.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        checkpoints: CheckpointWriter,
        watch: StepWatch,
        request: StopRequest,
        first_step: int = 0,
        budget_seconds: float | None = None,
        seconds_before: float = 0.0,
    ):
        """`seconds_before` is the training time of earlier starts. All processes have the same, and so begin alike."""
        self.progress: BudgetProgress | None = None
        if budget_seconds is not None:
            self.progress = BudgetProgress(first_step - 1, seconds_before / budget_seconds, 0.0)
        self._accelerator, self._checkpoints, self._watch = accelerator, checkpoints, watch
        self._request = request
        self._unread: deque[_Unread] = deque()
        self._skipped_in_a_row = 0
        self._budget_seconds = budget_seconds
        self._stage: Stage | None = None
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self._last_seconds = self._step_seconds = 0.0
        self._ticked_seconds = watch.trained_seconds

    def start(self, step: Step, loss: StepLoss, grad_norm: torch.Tensor, faults: list[Fault]) -> torch.Tensor:
        """Collective. Return whether the step is taken, fp32 `()` on the device: 1 or 0, the same on every process."""
        # Clocks differ between machines, so only the main process's counts.
        is_main, seconds = self._accelerator.is_main_process, self._watch.trained_seconds
        due, ticks = self._checkpoints.clock_is_due, has_passed(self._ticked_seconds, seconds, _TICK_SECONDS)
        self._ticked_seconds = seconds
        flags = [self._request.reason is not None, due and is_main, self._checkpoints.is_writing, len(faults)]
        flags += [self._watch.was_slow, ticks and is_main, *self._own_progress(step)]
        mine = torch.stack([loss.loss.detach().float(), grad_norm.detach().float()])
        sums = self._accelerator.reduce(torch.cat([mine, _to_device(flags, mine.device)]), "sum")
        should_step = sums[:2].isfinite().all()
        numbers = torch.cat([torch.stack([should_step.double(), *loss.metrics.values()]), sums.double()])
        self._unread.append(_Unread(step, faults, self._watch.so_far(), list(loss.metrics), host_copy(numbers)))
        return should_step.float()

    def drain(self, wait: bool) -> StepOutcomes:
        """Collective. Return the results of all steps but the newest, which the device has just begun.

        With `wait`, or if a result asks for a stop or a save, the newest is included, because the run pauses then.
        """
        outcomes = StepOutcomes()
        while len(self._unread) > (0 if wait or outcomes.stop or outcomes.save else 1) and outcomes.failure is None:
            self._read(self._unread.popleft(), outcomes)
        return outcomes

    def stops(self) -> bool:
        """Collective. Return whether a process was asked to stop."""
        asked = torch.tensor([float(self._request.reason is not None)], device=self._accelerator.device)
        return self._accelerator.reduce(asked, "sum").item() > 0

    def _own_progress(self, step: Step) -> list[float]:
        """Return the budget's used share and that of a step, 0 except on the main process; empty without a budget."""
        if self._budget_seconds is None:
            return []
        seconds = self._watch.trained_seconds
        if step.stage is self._stage:
            self._durations.append(seconds - self._last_seconds)
        else:  # steps of another length follow, and the first of them waits for its data
            self._stage = step.stage
            self._durations.clear()
        self._last_seconds = seconds
        if not self._accelerator.is_main_process:
            return [0.0, 0.0]
        if self._durations:
            self._step_seconds = statistics.median_low(self._durations)
        return [seconds / self._budget_seconds, self._step_seconds / self._budget_seconds]

    def _read(self, unread: _Unread, outcomes: StepOutcomes) -> None:
        """Collective. Add the result of a step and its requests. Only here does the host wait for the device."""
        self._watch.phases.mark("device_wait")
        should_step, *rest = unread.read()
        self._watch.phases.mark("update")
        names, step = unread.metrics, unread.step
        metrics = dict(zip(names, rest, strict=False))
        loss_sum, norm_sum, asked, due, writing, replaced, slow, ticks, *progress = rest[len(names) :]
        if progress:
            self.progress = BudgetProgress(step.number, *progress)
        if slow > 0:
            self._watch.report_slow_step(step.number)
        loss, grad_norm = (total / self._accelerator.num_processes for total in (loss_sum, norm_sum))
        self._skipped_in_a_row = 0 if should_step else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            folder, start = quoted(self._checkpoints.run_dir / "export"), ""
            if self._checkpoints.newest is not None:
                export = f"flipscale export {quoted(self._checkpoints.run_dir)} --out {folder}"
                start = f", with --model.init_from {folder}, which `{export}` writes of the last checkpoint"
            outcomes.failure = FloatingPointError(
                f"loss {loss} or gradient norm {grad_norm} was not finite in {self._skipped_in_a_row} steps in a row, "
                f"and none of them was taken; lower base_lr and train in another output_dir{start}"
            )
            return
        # No checkpoint is begun while a step is unread, so `writing` is about the open checkpoint, if any.
        outcomes.written |= self._checkpoints.is_open and writing == 0
        outcomes.stop |= asked > 0
        outcomes.save |= due > 0
        outcome = (loss, grad_norm, metrics, should_step > 0, int(replaced), ticks > 0)
        result = StepResult(step, unread.faults, unread.clock, *outcome)
        outcomes.results.append(result)


def _to_device(numbers: Sequence[float], device: torch.device) -> torch.Tensor:
    """Return numbers as fp32 on the device, without waiting for the copy."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.float32, device=device)
    # torch does not reuse the pinned memory before the copy is complete.
    return torch.tensor(numbers, dtype=torch.float32).pin_memory().to(device, non_blocking=True)
