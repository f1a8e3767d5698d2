"""Engines: how the weights, gradients and moments of one model lie on many processes.

The launch file chooses one (`flipscale.training.launch`): data parallel here, sharded in `engine_fsdp2.py` and
`engine_zero.py`. All of them learn the same numbers from the same recipe.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flipscale.model import FlipConfig, FlipModel
from flipscale.training.initialization import Fill, build_weights
from flipscale.training.optimizer import OptimRecipe, build_optimizers, gradient_norm, set_learning_rate

Batch = TypeVar("Batch")


class Engine:
    """Data parallel, or one process: every process holds the whole model. The other engines change what they must.

    `weights` is the model itself, for evaluation and by parameter name; call the engine to train it.
    """

    name = "ddp"

    def __init__(self, accelerator: Accelerator, recipe: OptimRecipe):
        self.accelerator = accelerator
        self.recipe = recipe
        self.weights: FlipModel
        self.model: nn.Module
        self.optimizers: list[torch.optim.Optimizer] = []

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
            # The only buffers are fixed tables, equal everywhere.
            devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else None
            self.model = DistributedDataParallel(
                self.weights, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.optimizers = build_optimizers(self.weights.named_parameters(), self.recipe)

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
        """Collective. The global norm of the gradients, fp32 `()`; they are clipped as the recipe says."""
        return gradient_norm(self.weights.parameters(), self.recipe.max_grad_norm)

    def step(self, learning_rate: float, finite: bool) -> None:
        """Collective. Moves the weights, unless the step is not finite, and forgets the gradients."""
        set_learning_rate(self.optimizers, learning_rate)
        for optimizer in self.optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad()

    def forget_moments(self) -> None:
        """Gives the optimisers a fresh start."""
        for optimizer in self.optimizers:
            optimizer.state.clear()
