"""What all processes must agree on before a step is taken: is it finite, and was any of us asked to stop."""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from flipscale.training.preemption import StopRequest
from flipscale.training.watch import StepWatch

MAX_SKIPPED_IN_A_ROW = 5


@dataclass(frozen=True)
class Verdict:
    """The global batch's loss, the gradient norm, whether the step is to be taken, whether it is the last, and how many
    of the batch's samples were bad and replaced."""

    loss: float
    grad_norm: float
    finite: bool
    stop: bool
    num_replaced: int


class StepGuard:
    """Skips steps whose loss or gradients are not finite, and gives up after a few in a row."""

    def __init__(self, accelerator: Accelerator, request: StopRequest, watch: StepWatch):
        self.accelerator = accelerator
        self.request = request
        self.watch = watch
        self._in_a_row = 0

    def agree(self, loss: torch.Tensor, grad_norm: torch.Tensor, num_replaced: int) -> Verdict:
        """Collective. The same verdict on every process.

        Raises:
            FloatingPointError: the loss or the gradients were not finite in `MAX_SKIPPED_IN_A_ROW` steps in a row.
        """
        counts = [self.request.reason is not None, num_replaced, self.watch.step_is_slow()]
        flags = torch.tensor(counts, dtype=torch.float32, device=loss.device)
        mine = torch.cat([torch.stack([loss.detach().float(), grad_norm.detach().float()]), flags])
        loss_sum, norm_sum, asked_sum, replaced, slow_sum = self.accelerator.reduce(mine, "sum").tolist()
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
        return Verdict(loss_sum / count, norm_sum / count, finite, asked_sum > 0, int(replaced))
