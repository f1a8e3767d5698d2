"""What two losses ask of the image tower: the norm of each one's gradient with respect to the tower's tokens.

Both are found in the one backward pass, from what it hands to tensors that only one of the losses has. The norms of the
two gradients of the tower's weights would take a backward pass more.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def given_to(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the first input of each call of a module."""
    found: list[torch.Tensor] = []

    def collect(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        found.append(inputs[0])

    handle = module.register_forward_pre_hook(collect)
    try:
        yield found
    finally:
        handle.remove()


def watched(tokens: torch.Tensor, means: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens for a loss that takes each of them, beside one that takes their means; and the squared norms of
    the two losses' gradients with respect to the tokens, fp32 `(2,)`, the means' first: 0 until the backward pass.

    Args:
        tokens: of the image tower, `(batch, tokens, width)`.
        means: over the tokens, `(batch, width)`, as the first loss got them.
    """
    squares = torch.zeros(2, device=tokens.device)
    # Beside it, the tokens themselves have the gradients of both.
    own = tokens.view_as(tokens)
    _note_gradient(own, squares[1])
    # A mean hands an equal part of its gradient to each token.
    _note_gradient(means, squares[0], 1 / tokens.shape[1])
    return own, squares


def _note_gradient(tensor: torch.Tensor, square: torch.Tensor, factor: float = 1.0) -> None:
    """Have the backward pass write the squared norm of a tensor's gradient, times a factor, to `square`, `()`."""

    def note(gradient: torch.Tensor) -> None:
        square.copy_(factor * torch.linalg.vector_norm(gradient, dtype=torch.float32).square())

    if tensor.requires_grad:
        tensor.register_hook(note)
