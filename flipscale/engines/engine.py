"""What every engine does: hold one model on many processes, train it, and hand out what a checkpoint saves.

The launch chooses the engine (`flipscale.engines.start.engine_classes`). All engines learn the same numbers from the
same recipe and write the same checkpoints. An engine is one file: a subclass of `Engine` or of another engine.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import nn

from flipscale.engines.arrivals import begin
from flipscale.engines.checkpoint import CheckpointReader, Piece
from flipscale.engines.first_weights import ParameterInit, build_weights
from flipscale.engines.launch import Launch, shipped
from flipscale.engines.layout import Averages, Layout
from flipscale.engines.optimizers import OptimRecipe, build_optimizers, gradient_norm, set_learning_rate
from flipscale.model import FlipConfig, FlipModel, FlipPreTrainedModel

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class ModelMemory:
    """What the fullest process keeps of a model, in elements of 4 bytes unless it says bytes.

    Args:
        weights: and as many again where the recipe asks for averages.
        copies: of weights, kept by the optimiser.
        gradients: kept until the step.
        moments: elements of each parameter whose moments this process has.
        communication_bytes: weights that were gathered and gradients on their way to other processes.
    """

    weights: int
    copies: int
    gradients: int
    moments: dict[str, int]
    communication_bytes: int


class Engine:
    """One model on the processes of a launch. These calls are made in this order, on all processes:

    1. `build` makes the model with its first weights, sharded where the engine shards.
    2. `load_weights` fills them from a checkpoint, if the run goes on from one.
    3. `prepare` wraps the model for training and makes optimisers without moments.
    4. `load_moments` fills the moments from that checkpoint.
    5. `start_averages` starts the averages of the weights, if the recipe asks for them.
    6. For every step: the engine itself and `backward` for each batch of `accumulate`, `gradient_norm`, `step`.

    `model` is the model itself, to evaluate and to find parameters by name. `wrapped` is what trains it, and calling
    the engine calls that.
    """

    # As the run directory reports it.
    name: str
    # Whether fp32 weights are cast to bf16 for each product; otherwise they are gathered in bf16 already.
    autocasts: ClassVar[bool] = True
    # Values of optim.name.
    optimizers_carried: ClassVar[tuple[str, ...]] = ("adamw", "muon")

    def __init__(self, accelerator: "Accelerator", launch: Launch, recipe: OptimRecipe, global_batch_size: int):
        self.accelerator = accelerator
        self.launch = launch
        self.recipe = recipe
        self.batch_size = global_batch_size // accelerator.num_processes
        self.name = launch.engine
        self.model: FlipPreTrainedModel
        self.wrapped: Any = None
        # To walk through the modules for them takes the host longer than to add up their norms.
        self._parameters: list[nn.Parameter] = []
        self.layout: Layout
        self.optimizers: list[torch.optim.Optimizer] = []
        self.averages: Averages | None = None

    @classmethod
    def refusal(cls, launch: Launch, optimizer: str, compiles: bool = False) -> str | None:
        """Return why this engine cannot train with an optimiser (an `optim.name`) or with compiled blocks, and what to
        do; None if it can."""
        if optimizer in cls.optimizers_carried:
            return None
        return (
            f"optim.name is {optimizer!r}, which the launch file's engine {launch.engine} does not have; use "
            f"{shipped('fsdp2')} or ddp.yaml, or optim.name {cls.optimizers_carried[0]}"
        )

    @classmethod
    def memory(cls, model: nn.Module, launch: Launch, accumulates: bool = False) -> ModelMemory:
        """Return what the fullest process would keep of a model, which may be on the meta device.

        Args:
            accumulates: whether a step has several passes of `accumulate`.
        """
        raise NotImplementedError

    def build(
        self,
        config: FlipConfig,
        configure: Callable[[FlipPreTrainedModel], None],
        init: ParameterInit,
        kind: type[FlipPreTrainedModel] = FlipModel,
    ) -> None:
        """Collective. Make the model with its first weights, sharded where the engine shards, not yet ready to train.

        Args:
            configure: changes the model before it has weights (attention kernel, recomputation, compilation).
            init: sets the weights of a module; see `flipscale.engines.first_weights`.
            kind: the class of the model.
        """
        self.model = build_weights(config, configure, init, self._place_block, kind)
        self._place_rest()
        self.layout = self._make_layout()

    def _place_block(self, block: nn.Module) -> None:
        """Move a block to the device as soon as it has weights, sharded where the engine shards."""
        block.to(self.accelerator.device)

    def _place_rest(self) -> None:
        """Move what is not in a block."""
        self.model.to(self.accelerator.device)

    def _make_layout(self) -> Layout:
        return Layout(self.model, self.accelerator.process_index, self.accelerator.num_processes)

    def load_weights(self, reader: CheckpointReader) -> None:
        """Fill the weights from a checkpoint."""
        assert self.wrapped is None, "load_weights goes before prepare"
        self.layout.load_weights(reader)

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

    def load_moments(self, reader: CheckpointReader, steps: int) -> None:
        """Fill the moments from a checkpoint, as they were after `steps` steps.

        Raises:
            ValueError: the checkpoint was written with another optimiser.
        """
        assert self.wrapped is not None, "load_moments goes after prepare"
        self.layout.load_moments(reader, steps)

    def start_averages(self, reader: CheckpointReader | None) -> None:
        """Start the averages that the recipe may ask for, from the weights as they are or from a checkpoint."""
        assert self.wrapped is not None, "start_averages goes after prepare"
        if self.recipe.ema_decay is not None:
            self.averages = Averages(self.layout, self.recipe.ema_decay, reader)

    def __call__(self, **batch: Any) -> Any:
        """Collective. Return the `FlipOutput` of this process's part of a batch, in the run's precision.

        Args:
            batch: the arguments of the model's `forward` by name, such as `patches`, `patch_index`, `input_ids` and
                `attention_mask`.
        """
        begin("forward")
        output = self.wrapped(**batch, return_logits=False)
        begin("loss")
        return output

    def backward(self, loss: torch.Tensor) -> None:
        """Collective. Add the gradients of the mean of all processes' `loss`. In all of a step's passes but the last of
        `accumulate`, gradients stay local; then they are averaged over the processes."""
        begin("backward")
        self._backward(loss)
        begin("update")

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def accumulate(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """Yield the same batches, for a forward and a backward pass each: gradient accumulation, with one reduction
        over the processes during the last pass."""
        for number, batch in enumerate(batches, 1):
            self._reduce_gradients(number == len(batches))
            yield batch

    def _reduce_gradients(self, enabled: bool) -> None:
        """Set whether the next backward pass averages gradients over the processes."""

    def gradient_norm(self) -> torch.Tensor:
        """Collective. Return the global norm of the gradients, fp32 `()`, from before they are clipped as the recipe
        says."""
        return gradient_norm(self._parameters, self.recipe.max_grad_norm)

    def step(self, learning_rate: float, taken: torch.Tensor) -> None:
        """Collective. Move the weights, moments and averages, or leave them as they are, and drop the gradients.

        Args:
            taken: fp32 `()` on the accelerator, the same on every process: 1, or 0 to leave the step out, whatever the
                gradients are. It is read on the device, so the host need not know it yet.
        """
        set_learning_rate(self.optimizers, learning_rate)
        self._step(taken)
        if self.averages is not None:
            self.averages.update(taken)

    def _step(self, taken: torch.Tensor) -> None:
        found_inf = 1.0 - taken
        for optimizer in self.optimizers:
            # torch's fused AdamW reads this name, and Muon does as it does: nothing moves where it is 1.
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()

    def forget_moments(self) -> None:
        """Give the optimisers a fresh start."""
        self.layout.forget_moments()

    def averaged(self) -> AbstractContextManager[None]:
        """Collective. Let `model` have the averages for its weights meanwhile, where the recipe asks for them."""
        return nullcontext() if self.averages is None else self.averages.in_place_of_weights()

    def optimizer_steps(self) -> int:
        """Return how often the optimisers have moved the weights since their last fresh start."""
        return self.layout.optimizer_steps()

    def pieces(self) -> list[Piece]:
        """Return what this process writes to a checkpoint: ranges of weights, moments and averages."""
        return self.layout.pieces({} if self.averages is None else self.averages.values)
