"""Engines: how the weights, gradients and moments of one model lie on many processes.

The launch file chooses one (`flipscale.engines.launch`): data parallel here, sharded in `engine_fsdp2.py` and
`engine_zero.py`. All of them learn the same numbers from the same recipe, and write the same checkpoints.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flipscale.engines.checkpoint import CheckpointReader, Piece
from flipscale.engines.first_weights import Fill, build_weights
from flipscale.engines.optimizers import (
    OptimRecipe,
    build_optimizers,
    empty_state,
    gradient_norm,
    moment_names,
    set_learning_rate,
)
from flipscale.model import FlipConfig, FlipModel

Batch = TypeVar("Batch")
# A part of a tensor seen flat: its numbers, and where in the tensor they begin.
Part = tuple[torch.Tensor, int]


class Engine:
    """Data parallel, or one process: every process holds the whole model. The other engines change what they must.

    `weights` is the model itself, for evaluation and by parameter name; call the engine to train it.
    """

    name = "ddp"

    def __init__(self, accelerator: Accelerator, recipe: OptimRecipe, global_batch_size: int):
        self.accelerator = accelerator
        self.recipe = recipe
        self.batch_size = global_batch_size // accelerator.num_processes
        self.weights: FlipModel
        self.model: nn.Module
        self.optimizers: list[torch.optim.Optimizer] = []
        # Of what this process holds of each parameter, where the recipe asks for averages.
        self._averages: dict[str, torch.Tensor] = {}

    def build(
        self,
        config: FlipConfig,
        configure: Callable[[FlipModel], None],
        fill: Fill,
        kind: type[FlipModel] = FlipModel,
    ) -> None:
        """Collective. The model with its weights, sharded where the engine shards, not yet ready to train."""
        self.weights = build_weights(config, configure, fill, self._keep, kind)
        self._keep_rest()

    def _keep(self, block: nn.Module) -> None:
        block.to(self.accelerator.device)

    def _keep_rest(self) -> None:
        self.weights.to(self.accelerator.device)

    def prepare(self) -> None:
        """Collective. Ready to train: the model is wrapped and has optimisers with no moments yet."""
        self.model = self.weights
        if self.accelerator.num_processes > 1:
            devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else None
            # The only buffers are fixed tables, equal everywhere. The option's new name is not in every torch.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            self.model = DistributedDataParallel(
                self.weights, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self._build_optimizers()

    def _build_optimizers(self) -> None:
        dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32
        self.optimizers = build_optimizers(self.weights.named_parameters(), self.recipe, dtype)

    def __call__(self, **batch: Any) -> Any:
        """Collective. The `FlipOutput` of this process's part of a batch, in the run's precision."""
        with self.accelerator.autocast():
            return self.model(**batch, return_logits=False)

    def backward(self, loss: torch.Tensor) -> None:
        """Collective. Adds the gradients of the mean of all processes' `loss`; all of a step's passes but the last of
        `accumulate` keep theirs to themselves."""
        loss.backward()

    def accumulate(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """The same batches, for a forward and a backward pass each; their gradients are summed, and reduced over the
        processes once, with the last one's."""
        for number, batch in enumerate(batches, 1):
            self._reduce_gradients(number == len(batches))
            yield batch

    def _reduce_gradients(self, enabled: bool) -> None:
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = enabled

    def gradient_norm(self) -> torch.Tensor:
        """Collective. The global norm of the gradients, fp32 `()`, before they are clipped as the recipe says."""
        return gradient_norm(self.weights.parameters(), self.recipe.max_grad_norm)

    def step(self, learning_rate: float, finite: bool) -> None:
        """Collective. Moves the weights and their averages unless the step is not finite, and forgets the gradients."""
        set_learning_rate(self.optimizers, learning_rate)
        self._step(finite)
        if finite and self.recipe.ema_decay is not None:
            for name, values in self._residents().items():
                self._averages[name].lerp_(values, 1.0 - self.recipe.ema_decay)

    def _step(self, finite: bool) -> None:
        for optimizer in self.optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad()

    def start_averages(self, reader: CheckpointReader | None) -> None:
        """Averages from the weights as they are, or as a checkpoint has them, where the recipe asks for them."""
        if self.recipe.ema_decay is None:
            return
        self._averages = {name: values.clone() for name, values in self._residents().items()}
        for name, parameter in self.weights.named_parameters() if reader is not None else ():
            assert reader is not None
            reader.fill("ema", name, self._averages[name], self.resident(parameter)[1])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Collective. `weights` are the averages meanwhile, where the recipe asks for them."""
        self._swap()
        yield
        self._swap()

    def _swap(self) -> None:
        for name, values in self._residents().items() if self._averages else ():
            kept = values.clone()
            values.copy_(self._averages[name])
            self._averages[name].copy_(kept)

    def _residents(self) -> dict[str, torch.Tensor]:
        return {name: self.resident(parameter)[0] for name, parameter in self.weights.named_parameters()}

    def forget_moments(self) -> None:
        """Gives the optimisers a fresh start."""
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """The shape of the whole parameter, of which this process may hold a part."""
        return parameter.shape

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every parameter."""
        return {name: self.shape(parameter) for name, parameter in self.weights.named_parameters()}

    def resident(self, parameter: nn.Parameter) -> Part:
        """What this process holds of a parameter."""
        return parameter.detach().view(-1), 0

    def moments(self, parameter: nn.Parameter) -> dict[str, Part]:
        """What this process holds of a parameter's moments, by name; nothing before the first step."""
        for optimizer in self.optimizers:
            if parameter in optimizer.state:
                state = optimizer.state[parameter]
                return {name: (state[name].view(-1), 0) for name in moment_names(optimizer)}
        return {}

    def share(self) -> dict[str, range]:
        """The elements of each parameter, seen flat, that this process writes to a checkpoint: an equal part of what
        all of them hold."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        sizes = {name: shape.numel() for name, shape in self.shapes().items()}
        total = sum(sizes.values())
        first, last = total * rank // world, total * (rank + 1) // world
        share, start = {}, 0
        for name, size in sizes.items():
            share[name] = range(min(max(first - start, 0), size), min(max(last - start, 0), size))
            start += size
        return share

    def optimizer_steps(self) -> int:
        """How often the optimisers have moved the weights since their last fresh start."""
        steps = [float(state.get("step", 0)) for o in self.optimizers for state in o.state.values()]
        return int(max(steps, default=0))

    def pieces(self) -> list[Piece]:
        """This process's share of the weights, moments and averages."""
        share, found = self.share(), []
        for name, parameter in self.weights.named_parameters():
            mine = share[name]
            values, first = self.resident(parameter)
            held = {"weight": (values, first), **self.moments(parameter)}
            if self._averages:
                held["ema"] = (self._averages[name], first)
            for kind, (values, first) in held.items():
                found.append(Piece(kind, name, mine.start, values[mine.start - first : mine.stop - first]))
        return found

    def load_weights(self, reader: CheckpointReader) -> None:
        """Fills the weights, between `build` and `prepare`."""
        for name, parameter in self.weights.named_parameters():
            reader.fill("weight", name, *self.resident(parameter))

    def load_moments(self, reader: CheckpointReader, steps: int) -> None:
        """Fills the moments as they were after `steps` steps, after `prepare`.

        Raises:
            ValueError: the checkpoint was written with another optimiser.
        """
        if steps == 0:
            return
        self._allocate_moments(steps)
        for name, parameter in self.weights.named_parameters():
            for kind, (values, first) in self.moments(parameter).items():
                reader.fill(kind, name, values, first)

    def _allocate_moments(self, steps: int) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter] = empty_state(optimizer, parameter, steps)
