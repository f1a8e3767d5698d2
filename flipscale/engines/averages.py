"""Exponential moving averages of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flipscale.engines.checkpoint import CheckpointReader
from flipscale.engines.layout import Layout


class Averages:
    """Averages of what this process holds of each parameter.

    Args:
        decay: each step's new weights are mixed in with 1 - decay.
        reader: of the checkpoint that has the averages; None to start from the weights as they are.
    """

    def __init__(self, layout: Layout, decay: float, reader: CheckpointReader | None):
        self.layout = layout
        self.decay = decay
        self.values: dict[str, torch.Tensor] = {name: held.clone() for name, held in layout.all_weights().items()}
        if reader is not None:
            for name, parameter in layout.model.named_parameters():
                reader.fill("ema", name, self.values[name], layout.weights(parameter).first)

    def update(self, taken: torch.Tensor) -> None:
        """Mix in the weights as they are after a step; with `taken`, fp32 `()` on their device, 0 instead of 1: none of
        them."""
        share = (1.0 - self.decay) * taken
        for name, values in self.layout.all_weights().items():
            self.values[name].lerp_(values, share)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Collective. Let the model have the averages for its weights, and give it its own back at the end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, values in self.layout.all_weights().items():
            kept = values.clone()
            values.copy_(self.values[name])
            self.values[name].copy_(kept)
        self.layout.weights_changed()
