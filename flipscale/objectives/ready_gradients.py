"""A loss whose gradients are made along with it."""

from typing import Any

import torch


class ReadyGradients(torch.autograd.Function):
    """`forward` leaves in `ctx.gradients` those of its inputs but the last, which is no tensor; `backward` hands them
    out, multiplied in place by the upstream number, so once."""

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradients of this loss were handed out before"
        return (*(gradient.mul_(upstream[0]) for gradient in gradients), None)
