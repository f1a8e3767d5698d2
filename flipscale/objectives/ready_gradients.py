"""A loss whose gradients are computed along with it."""

from typing import Any

import torch


class ReadyGradients(torch.autograd.Function):
    """`forward` sets `ctx.gradients` to the gradients of its inputs, except for the last input, which is no tensor.
    `backward` multiplies them by the upstream gradient in place and returns them, so it can run once."""

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the backward pass of this loss ran before"
        return (*(gradient.mul_(upstream[0]) for gradient in gradients), None)
