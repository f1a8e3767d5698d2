"""The base of all engines: an engine holds one model on many processes, trains it, and gives checkpoints their data.

The launch chooses the engine (`flipscale.engines.start.engine_classes`). All engines learn the same numbers from the
same recipe and write the same checkpoints. An engine is one file: a subclass of `Engine` or of another engine.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import nn

from flipscale.engines.checkpoint import CheckpointReader, Piece
from flipscale.engines.first_weights import ParameterInit, build_weights
from flipscale.engines.launch import Launch, shipped
from flipscale.engines.layout import Averages, Layout
from flipscale.engines.optimizers import build_optimizers, gradient_norm, set_learning_rate
from flipscale.engines.recipe import OptimRecipe
from flipscale.engines.stragglers import PhaseLog
from flipscale.model import FlipConfig, FlipModel, FlipPreTrainedModel

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class ModelMemory:
    """Memory of a model on the fullest process, in elements of 4 bytes unless the name says bytes.

    Args:
        weights: weights; averages, if the recipe asks for them, take as much again.
        copies: copies of weights that the optimiser keeps.
        gradients: gradients that are kept until the step.
        moments: number of elements with moments, by parameter.
        communication_bytes: gathered weights, and gradients in transit to other processes.
    """

    weights: int
    copies: int
    gradients: int
    moments: dict[str, int]
    communication_bytes: int


class Engine:
    """One model on the processes of a launch. These calls are made in this order, on all processes:

    1. `build` makes the model with its first weights, sharded where the engine shards.
    2. `layout.load_weights` fills them from a checkpoint, if the run goes on from one.
    3. `prepare` wraps the model for training and makes optimisers without moments.
    4. `layout.load_moments` fills the moments from that checkpoint.
    5. `start_averages` starts the averages of the weights, if the recipe asks for them.
    6. For every step: the engine itself and `backward` for each batch of `accumulate`, `gradient_norm`, `step`.

    `model` is the model itself, for evaluation and parameter names. `wrapped` is its wrapper for training, which a call
    of the engine calls.
    """

    # Name in the run directory's reports.
    name: str
    # Whether fp32 weights are cast to bf16 for each product; otherwise they are gathered in bf16.
    autocasts: ClassVar[bool] = True
    # Supported values of optim.name.
    optimizers_carried: ClassVar[tuple[str, ...]] = ("adamw", "muon")

    def __init__(self, accelerator: "Accelerator", launch: Launch, recipe: OptimRecipe, global_batch_size: int):
        self.accelerator = accelerator
        self.launch = launch
        self.recipe = recipe
        self.batch_size = global_batch_size // accelerator.num_processes
        self.name = launch.engine
        self.model: FlipPreTrainedModel
        self.wrapped: Any = None
        # Kept here, because a walk through the modules takes the host longer than the sum of the norms.
        self._parameters: list[nn.Parameter] = []
        self.layout: Layout
        self.optimizers: list[torch.optim.Optimizer] = []
        self.averages: Averages | None = None
        self.phases = PhaseLog()

    @classmethod
    def refusal(cls, launch: Launch, optimizer: str, compiles: bool = False) -> str | None:
        """Return why this engine cannot train with an `optim.name` or with compiled blocks, and the fix, or None."""
        if optimizer in cls.optimizers_carried:
            return None
        return (
            f"optim.name is {optimizer!r}; the launch file's engine {launch.engine} has {cls.optimizers_carried[0]}. "
            f"Fix: use that, or {shipped('fsdp2')} or ddp.yaml"
        )

    @classmethod
    def memory(cls, model: nn.Module, launch: Launch, accumulates: bool = False) -> ModelMemory:
        """Return the memory of a model, perhaps on the meta device, on the fullest process.

        `accumulates`: whether a step accumulates gradients over several passes.
        """
        raise NotImplementedError

    def build(
        self,
        config: FlipConfig,
        configure: Callable[[FlipPreTrainedModel], None],
        init: ParameterInit,
        kind: type[FlipPreTrainedModel] = FlipModel,
    ) -> None:
        """Collective. Make the model with its first weights, sharded if the engine shards; `prepare` completes it.

        The arguments are those of `flipscale.engines.first_weights.build_weights`.
        """
        self.model = build_weights(config, configure, init, self._place_block, kind)
        self._place_rest()
        self.layout = self._make_layout()

    def _place_block(self, block: nn.Module) -> None:
        """Move a block with weights to the device, sharded if the engine shards."""
        block.to(self.accelerator.device)

    def _place_rest(self) -> None:
        """Move everything outside of blocks to the device."""
        self.model.to(self.accelerator.device)

    def _make_layout(self) -> Layout:
        return Layout(self.model, self.accelerator.process_index, self.accelerator.num_processes)

    def prepare(self) -> None:
        """Collective. Wrap the model for training and make its optimisers, without moments."""
        self.wrapped = self._wrap()
        self._parameters = list(self.model.parameters())
        self.optimizers = self._make_optimizers()
        self.layout.optimizers = self.optimizers

    def _wrap(self) -> Any:
        return self.model

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        dtype = torch.bfloat16 if self.launch.bf16 else torch.float32
        return build_optimizers(self.model, self.recipe, dtype)

    def start_averages(self, reader: CheckpointReader | None) -> None:
        """Start the averages, if the recipe has them, from a checkpoint or else from the current weights."""
        if self.recipe.ema_decay is not None:
            self.averages = Averages(self.layout, self.recipe.ema_decay, reader)

    def __call__(self, **batch: Any) -> Any:
        """Collective. Return the `FlipOutput` of this process's part of a batch, the arguments of `forward`."""
        self.phases.mark("forward")
        output = self.wrapped(**batch, return_logits=False)
        self.phases.mark("loss")
        return output

    def backward(self, loss: torch.Tensor) -> None:
        """Collective. Add the gradients of the mean of all processes' `loss`.

        Gradients stay local in all passes of `accumulate` but the last, which averages them over the processes.
        """
        self.phases.mark("backward")
        self._backward(loss)
        self.phases.mark("update")

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def accumulate(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """Yield the batches of a step, for a forward and a backward pass each.

        Gradients are reduced over the processes once, during the last pass.
        """
        for number, batch in enumerate(batches, 1):
            self._reduce_gradients(number == len(batches))
            yield batch

    def _reduce_gradients(self, enabled: bool) -> None:
        """Let the next backward pass average gradients over the processes, or not."""

    def gradient_norm(self) -> torch.Tensor:
        """Collective. Return the global norm of the gradients, fp32 `()`, then clip them if the recipe says so."""
        return gradient_norm(self._parameters, self.recipe.max_grad_norm)

    def step(self, learning_rate: float, taken: torch.Tensor) -> None:
        """Collective. Update the weights, moments and averages, and drop the gradients.

        Args:
            learning_rate: learning rate before the groups' factors.
            taken: fp32 `()` on the accelerator, the same on every process: 1, or 0 to skip the update. The device reads
                it, so the host need not know it.
        """
        set_learning_rate(self.optimizers, learning_rate)
        self._step(taken)
        if self.averages is not None:
            self.averages.update(taken)

    def _step(self, taken: torch.Tensor) -> None:
        found_inf = 1.0 - taken
        for optimizer in self.optimizers:
            # torch's fused AdamW and our Muon read this name: at 1 nothing is updated.
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()

    def averaged(self) -> AbstractContextManager[None]:
        """Collective. Swap the averages, if the recipe has them, into `model` for the duration of the context."""
        return nullcontext() if self.averages is None else self.averages.in_place_of_weights()

    def pieces(self) -> list[Piece]:
        """Return the data that this process saves: ranges of weights, moments and averages."""
        return self.layout.pieces({} if self.averages is None else self.averages.values)
