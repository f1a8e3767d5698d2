"""What all processes agree on in a step: whether it is finite, whether any of them was asked to stop, whether it is
time to save, and whether the last checkpoint is on disk.

The device learns at once whether the step is taken. The host learns it a step later, when the device has the next step
to compute: it never waits for a device that has nothing to do.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from flipscale.data.faults import Fault
from flipscale.engines.arrivals import begin
from flipscale.engines.checkpoint import CheckpointWriter
from flipscale.engines.device import HostCopy, to_device
from flipscale.training.budget.progress import Progress
from flipscale.training.preemption import StopRequest
from flipscale.training.schedule import Stage
from flipscale.training.step import StepLoss
from flipscale.training.watch import Interval, StepWatch

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_SKIPPED_IN_A_ROW = 5


@dataclass(frozen=True)
class Verdict:
    """What the processes agreed on in a step.

    Args:
        step: its number, from 0.
        position: of it in the schedule.
        stage: that it is in.
        faults: of this process's part of the batch.
        clock: the time when it had been sent to the device.
        loss: of the global batch.
        grad_norm: the norm of the loss's gradients, from before they are clipped.
        metrics: of this process's part of the batch.
        finite: whether the step was taken.
        num_replaced: how many of the batch's samples were bad and replaced.
        stop: whether a process was asked to stop.
        save: whether the clock says that a checkpoint is due.
        written: whether every process's part of the last checkpoint is on disk.
    """

    step: int
    position: float
    stage: Stage
    faults: list[Fault]
    clock: Interval
    loss: float
    grad_norm: float
    metrics: dict[str, float]
    finite: bool
    num_replaced: int
    stop: bool
    save: bool
    written: bool

    @property
    def num_done(self) -> int:
        """How many steps of the run are done with this one."""
        return self.step + 1

    @property
    def learning_rate(self) -> float:
        """Of the step."""
        return self.stage.learning_rate(self.position)


class _Unread(NamedTuple):
    """A step whose numbers are on their way."""

    step: int
    position: float
    stage: Stage
    faults: list[Fault]
    clock: Interval
    metrics: list[str]
    numbers: HostCopy
    progress: Progress


class StepGuard:
    """Leaves out steps whose loss or gradients are not finite, and gives up after a few in a row.

    `stop` and `save` say what the verdicts that were read last ask for.
    """

    def __init__(
        self, accelerator: "Accelerator", request: StopRequest, checkpoints: CheckpointWriter, watch: StepWatch
    ):
        self.accelerator = accelerator
        self.request = request
        self.checkpoints = checkpoints
        self.watch = watch
        self.stop = self.save = False
        self._unread: deque[_Unread] = deque()
        self._in_a_row = 0

    def agree(self, progress: Progress, found: StepLoss, grad_norm: torch.Tensor, faults: list[Fault]) -> torch.Tensor:
        """Collective. Return whether the step that `progress` is at is taken, the same on every process: fp32 `()` on
        the device, 1 or 0."""
        # Clocks differ between machines, so the main process's decides.
        is_main, slow = self.accelerator.is_main_process, self.watch.last_step_was_slow()
        due, pace = self.checkpoints.clock_is_due and is_main, progress.pace(self.watch.trained_seconds, is_main)
        flags = [self.request.reason is not None, due, self.checkpoints.is_writing, len(faults), slow, *pace]
        mine = torch.stack([found.loss.detach().float(), grad_norm.detach().float()])
        sums = self.accelerator.reduce(torch.cat([mine, to_device(flags, mine.device)]), "sum")
        taken = sums[:2].isfinite().all()
        numbers = torch.cat([torch.stack([taken.double(), *found.metrics.values()]), sums.double()])
        self._unread.append(
            _Unread(
                *(progress.step, progress.position, progress.stage, faults),
                *(self.watch.so_far(), list(found.metrics), HostCopy(numbers), progress),
            )
        )
        return taken.float()

    def verdicts(self, settle: bool) -> Iterator[Verdict]:
        """Collective. Yield what has not been read of the steps before the last one, and then of the last one, which
        the device has just begun with, if the run is to pause there: to `settle`, or because a verdict asks for it.

        Raises:
            FloatingPointError: the loss or the gradients were not finite in `MAX_SKIPPED_IN_A_ROW` steps in a row.
        """
        self.stop = self.save = False
        while len(self._unread) > (0 if settle or self.stop or self.save else 1):
            verdict = self._read(self._unread.popleft())
            self.stop, self.save = self.stop or verdict.stop, self.save or verdict.save
            yield verdict

    def _read(self, unread: _Unread) -> Verdict:
        """Return the verdict on a step. Here, and nowhere else in a step, the host waits for the device."""
        step, position, stage, faults, clock, names, numbers, progress = unread
        begin("verdict")
        taken, *rest = numbers.read()
        begin("update")
        metrics = dict(zip(names, rest, strict=False))
        loss_sum, norm_sum, asked, due, writing, replaced, slow, *pace = rest[len(names) :]
        progress.hear(step, pace)
        if slow > 0:
            self.watch.report_slow_step(step)
        loss, grad_norm = (total / self.accelerator.num_processes for total in (loss_sum, norm_sum))
        self._in_a_row = 0 if taken else self._in_a_row + 1
        if self._in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"loss {loss} or gradient norm {grad_norm} was not finite in {self._in_a_row} steps in a row, none of "
                "them taken; lower the learning rate and go on from the last checkpoint"
            )
        # No checkpoint is begun while a step is unread, so the flags are those of the one that is open, if one is.
        written = self.checkpoints.is_open and writing == 0
        return Verdict(
            step, position, stage, faults, clock, loss, grad_norm, metrics,
            taken > 0, int(replaced), asked > 0, due > 0, written,
        )  # fmt: skip
