"""Which elements of a model's weights, moments and averages a process holds, saves and loads."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from flipscale.engines.checkpoint import CheckpointReader, Piece
from flipscale.engines.optimizers import empty_state, moment_names


class Shard(NamedTuple):
    """The elements of a tensor that this process holds: `values` are those from `first` on, the tensor seen flat."""

    values: torch.Tensor
    first: int


class Layout:
    """Where the elements of a model's parameters lie, for checkpoints and averages.

    In this class every process holds all of every parameter. An engine that shards has a subclass.

    Args:
        model: with weights, already sharded where the engine shards.
        rank: of this process among `world`.
    """

    def __init__(self, model: nn.Module, rank: int, world: int):
        self.model = model
        self.rank, self.world = rank, world
        # Filled once the engine has optimisers.
        self.optimizers: Sequence[torch.optim.Optimizer] = ()

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of every whole parameter."""
        return {name: self.shape(parameter) for name, parameter in self.model.named_parameters()}

    def shape(self, parameter: Any) -> torch.Size:
        """Return the shape of a whole parameter."""
        return parameter.shape

    def weights(self, parameter: Any) -> Shard:
        """Return what this process holds of a parameter; writing to its values changes the weights."""
        return Shard(parameter.detach().view(-1), 0)

    def all_weights(self) -> dict[str, torch.Tensor]:
        """Return what this process holds of every parameter."""
        return {name: self.weights(parameter).values for name, parameter in self.model.named_parameters()}

    def weights_changed(self) -> None:
        """Collective. Bring up to date what the engine keeps of weights that were written through `weights`."""

    def moments(self, parameter: Any) -> dict[str, Shard]:
        """Return what this process holds of a parameter's moments, by name; nothing before the first step."""
        for optimizer in self.optimizers:
            if parameter in optimizer.state:
                state = optimizer.state[parameter]
                return {name: self._shard(parameter, state[name]) for name in moment_names(optimizer)}
        return {}

    def _shard(self, parameter: Any, moment: torch.Tensor) -> Shard:
        return Shard(moment.view(-1), 0)

    def optimizer_steps(self) -> int:
        """Return how often the optimisers have moved the weights since their last fresh start."""
        steps = [state["step"] for o in self.optimizers for state in o.state.values() if "step" in state]
        return int(torch.stack(steps).max()) if steps else 0

    def allocate_moments(self, steps: int) -> None:
        """Give the optimisers zero moments, as if after `steps` steps."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter] = empty_state(optimizer, parameter, steps)

    def forget_moments(self) -> None:
        """Give the optimisers a fresh start."""
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def saved_ranges(self) -> dict[str, range]:
        """Return the elements of each parameter that this process writes to a checkpoint: every process writes an equal
        part of what all of them hold."""
        sizes = {name: shape.numel() for name, shape in self.shapes().items()}
        total = sum(sizes.values())
        first, last = total * self.rank // self.world, total * (self.rank + 1) // self.world
        ranges, start = {}, 0
        for name, size in sizes.items():
            ranges[name] = range(min(max(first - start, 0), size), min(max(last - start, 0), size))
            start += size
        return ranges

    def pieces(self, averages: Mapping[str, torch.Tensor]) -> list[Piece]:
        """Return what this process writes to a checkpoint.

        Args:
            averages: of what `all_weights` returns; empty for a run without them.
        """
        ranges, found = self.saved_ranges(), []
        for name, parameter in self.model.named_parameters():
            mine, weights = ranges[name], self.weights(parameter)
            held = {"weight": weights, **self.moments(parameter)}
            if averages:
                held["ema"] = Shard(averages[name], weights.first)
            for kind, (values, first) in held.items():
                found.append(Piece(kind, name, mine.start, values[mine.start - first : mine.stop - first]))
        return found

    def load_weights(self, reader: CheckpointReader) -> None:
        """Fill the weights from a checkpoint."""
        for name, parameter in self.model.named_parameters():
            reader.fill("weight", name, *self.weights(parameter))

    def load_moments(self, reader: CheckpointReader, steps: int) -> None:
        """Fill the moments from a checkpoint, as they were after `steps` steps.

        Raises:
            ValueError: the checkpoint was written with another optimiser.
        """
        if steps == 0:
            return
        self.allocate_moments(steps)
        for name, parameter in self.model.named_parameters():
            for kind, shard in self.moments(parameter).items():
                reader.fill(kind, name, *shard)


class Averages:
    """Exponential moving averages of what this process holds of each parameter.

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
