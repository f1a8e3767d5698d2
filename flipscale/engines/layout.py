"""The elements of weights, moments and averages that a process holds, saves and loads."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from flipscale.engines.checkpoint import CheckpointReader, Piece
from flipscale.engines.optimizers import empty_state, moment_names


class Shard(NamedTuple):
    """A process's range of a flat tensor: `values` are the elements from `first` on."""

    values: torch.Tensor
    first: int


class Layout:
    """The layout of a model's parameters over the processes, for checkpoints and averages.

    In this class every process holds every parameter whole. Engines that shard have subclasses.
    """

    def __init__(self, model: nn.Module, rank: int, world: int):
        self.model = model
        self.rank, self.world = rank, world
        # Set by `Engine.prepare`.
        self.optimizers: Sequence[torch.optim.Optimizer] = ()

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of every whole parameter."""
        return {name: self.shape(parameter) for name, parameter in self.model.named_parameters()}

    def shape(self, parameter: Any) -> torch.Size:
        """Return the shape of a whole parameter."""
        return parameter.shape

    def weights(self, parameter: Any) -> Shard:
        """Return this process's range of a parameter. The values are a view, so writing changes the weights."""
        return Shard(parameter.detach().view(-1), 0)

    def all_weights(self) -> dict[str, torch.Tensor]:
        """Return this process's elements of every parameter."""
        return {name: self.weights(parameter).values for name, parameter in self.model.named_parameters()}

    def weights_changed(self) -> None:
        """Collective. Update the engine's own copies of weights after they were written through `weights`."""

    def moments(self, parameter: Any) -> dict[str, Shard]:
        """Return this process's ranges of a parameter's moments, by name; empty before the first step."""
        for optimizer in self.optimizers:
            if parameter in optimizer.state:
                state = optimizer.state[parameter]
                return {name: self._shard(parameter, state[name]) for name in moment_names(optimizer)}
        return {}

    def _shard(self, parameter: Any, moment: torch.Tensor) -> Shard:
        return Shard(moment.view(-1), 0)

    def optimizer_steps(self) -> int:
        """Return the number of optimiser steps since the last reset."""
        steps = [state["step"] for o in self.optimizers for state in o.state.values() if "step" in state]
        return int(torch.stack(steps).max()) if steps else 0

    def allocate_moments(self, steps: int) -> None:
        """Give the optimisers zero moments and the step count `steps`."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter] = empty_state(optimizer, parameter, steps)

    def forget_moments(self) -> None:
        """Reset the optimisers' moments and step counts."""
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def saved_ranges(self) -> dict[str, range]:
        """Return the elements of each parameter that this process saves.

        All processes hold every parameter here, and each saves an equal part.
        """
        sizes = {name: shape.numel() for name, shape in self.shapes().items()}
        total = sum(sizes.values())
        first, last = total * self.rank // self.world, total * (self.rank + 1) // self.world
        ranges, start = {}, 0
        for name, size in sizes.items():
            ranges[name] = range(min(max(first - start, 0), size), min(max(last - start, 0), size))
            start += size
        return ranges

    def pieces(self, averages: Mapping[str, torch.Tensor]) -> list[Piece]:
        """Return the data that this process saves, with the averages of `all_weights` if the run has them."""
        ranges, pieces = self.saved_ranges(), []
        for name, parameter in self.model.named_parameters():
            mine, weights = ranges[name], self.weights(parameter)
            held = {"weight": weights, **self.moments(parameter)}
            if averages:
                held["ema"] = Shard(averages[name], weights.first)
            for kind, (values, first) in held.items():
                pieces.append(Piece(kind, name, mine.start, values[mine.start - first : mine.stop - first]))
        return pieces

    def load_weights(self, reader: CheckpointReader) -> None:
        """Fill the weights from a checkpoint."""
        for name, parameter in self.model.named_parameters():
            reader.fill("weight", name, *self.weights(parameter))

    def load_moments(self, reader: CheckpointReader, steps: int) -> None:
        """Fill the moments from a checkpoint after `steps` optimiser steps.

        Raises:
            UserError: another optimiser wrote the checkpoint.
        """
        if steps == 0:
            return
        self.allocate_moments(steps)
        for name, parameter in self.model.named_parameters():
            for kind, shard in self.moments(parameter).items():
                reader.fill(kind, name, *shard)


class Averages:
    """Exponential moving averages of this process's elements of each parameter.

    They start from the checkpoint of `reader`, or else from the current weights. Each step's weights are mixed in with
    1 - decay.
    """

    def __init__(self, layout: Layout, decay: float, reader: CheckpointReader | None):
        self.layout = layout
        self.decay = decay
        self.values: dict[str, torch.Tensor] = {name: held.clone() for name, held in layout.all_weights().items()}
        if reader is not None:
            for name, parameter in layout.model.named_parameters():
                reader.fill("ema", name, self.values[name], layout.weights(parameter).first)

    def update(self, taken: torch.Tensor) -> None:
        """Mix in the weights after a step, unless `taken`, fp32 `()` on their device, is 0."""
        share = (1.0 - self.decay) * taken
        for name, values in self.layout.all_weights().items():
            self.values[name].lerp_(values, share)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Collective. Swap the averages into the model, and the weights back at the end."""
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
