"""What all processes agree on before a step is taken: whether it is finite, whether any of them was asked to stop,
whether it is time to save, and whether the last checkpoint is on disk."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flipscale.engines.checkpoint import CheckpointWriter
from flipscale.training.preemption import StopRequest
from flipscale.training.watch import StepWatch

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_SKIPPED_IN_A_ROW = 5


@dataclass(frozen=True)
class Verdict:
    """What the processes agreed on.

    Args:
        loss: the loss of the global batch.
        grad_norm: the norm of its gradients, from before they are clipped.
        finite: whether the step is taken.
        stop: whether it is the last step.
        save: whether the clock says that a checkpoint is due.
        num_replaced: how many of the batch's samples were bad and replaced.
        written: whether every process's part of the last checkpoint is on disk.
    """

    loss: float
    grad_norm: float
    finite: bool
    stop: bool
    num_replaced: int
    save: bool
    written: bool


class StepGuard:
    """Skips steps whose loss or gradients are not finite, and gives up after a few in a row."""

    def __init__(
        self, accelerator: "Accelerator", request: StopRequest, checkpoints: CheckpointWriter, watch: StepWatch
    ):
        self.accelerator = accelerator
        self.request = request
        self.checkpoints = checkpoints
        self.watch = watch
        self._in_a_row = 0

    def agree(self, loss: torch.Tensor, grad_norm: torch.Tensor, num_replaced: int) -> Verdict:
        """Collective. Return the same verdict on every process.

        Raises:
            FloatingPointError: the loss or the gradients were not finite in `MAX_SKIPPED_IN_A_ROW` steps in a row.
        """
        # Clocks differ between machines, so the main process's decides.
        due = self.checkpoints.clock_is_due and self.accelerator.is_main_process
        slow = self.watch.step_is_slow()
        flags = [self.request.reason is not None, due, self.checkpoints.is_writing, num_replaced, slow]
        mine = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        mine = torch.cat([mine, torch.tensor(flags, device=loss.device)])
        loss_sum, norm_sum, asked, due_sum, writing, replaced, slow_sum = self.accelerator.reduce(mine, "sum").tolist()
        if slow_sum > 0:
            self.watch.report_slow_step()
        count = self.accelerator.num_processes
        finite = math.isfinite(loss_sum) and math.isfinite(norm_sum)
        self._in_a_row = 0 if finite else self._in_a_row + 1
        if self._in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"loss {loss_sum / count} or gradient norm {norm_sum / count} was not finite in {self._in_a_row} "
                "steps in a row, none of them taken; lower the learning rate and go on from the last checkpoint"
            )
        written = self.checkpoints.is_open and writing == 0
        return Verdict(loss_sum / count, norm_sum / count, finite, asked > 0, int(replaced), due_sum > 0, written)
