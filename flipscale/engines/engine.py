"""The base of all engines: an engine holds one model on many processes, trains it, and gives checkpoints their data.

Its layout knows the elements of weights, moments and averages that a process holds, saves and loads.

The launch chooses the engine (`flipscale.engines.build_engine.engine_classes`). All engines learn the same numbers from
the same recipe and write the same checkpoints. An engine is one file: a subclass of `Engine` or of another engine.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from flipscale.engines.checkpoint import CheckpointReader, TensorChunk
from flipscale.engines.first_weights import ParameterInit, build_weights
from flipscale.engines.launch import Launch, shipped
from flipscale.engines.muon import local
from flipscale.engines.optimizers import build_optimizers, empty_state, moment_names, set_learning_rate
from flipscale.engines.trainable import freeze
from flipscale.io.errors import UserError
from flipscale.model import FlipConfig, FlipModel, FlipPreTrainedModel
from flipscale.process.slow_steps import PhaseLog
from flipscale.process.state import collect_frozen_garbage
from flipscale.recipe.optim import OptimRecipe

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
        # Set by the engine, which makes them for each set of frozen parts.
        self.optimizers: Sequence[torch.optim.Optimizer] = ()

    def shapes(self) -> dict[str, torch.Size]:
        return {name: self.shape(parameter) for name, parameter in self.model.named_parameters()}

    def shape(self, parameter: Any) -> torch.Size:
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
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter] = empty_state(optimizer, parameter, steps)

    def forget_moments(self) -> None:
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def saved_ranges(self) -> dict[str, range]:
        """Return the elements of each parameter that this process saves.

        All processes hold every parameter here, and each saves an equal part.
        """
        return {name: dict(parts).get(self.rank, range(0)) for name, parts in self._parts().items()}

    def _parts(self) -> dict[str, list[tuple[int, range]]]:
        """Return the processes that save each parameter, by rank, with the elements that each of them saves."""
        sizes = {name: shape.numel() for name, shape in self.shapes().items()}
        total, start, parts = sum(sizes.values()), 0, {}
        bounds = [total * rank // self.world for rank in range(self.world + 1)]
        for name, size in sizes.items():
            ranks = range(bisect_right(bounds, start) - 1, bisect_left(bounds, start + size))
            of_ranks = [range(max(bounds[r] - start, 0), min(bounds[r + 1] - start, size)) for r in ranks]
            parts[name] = [(rank, part) for rank, part in zip(ranks, of_ranks, strict=True) if part]
            start += size
        return parts

    def tensor_chunks(self, averages: dict[str, torch.Tensor]) -> list[TensorChunk]:
        """Return the data that this process saves, with the averages of `all_weights` if the run has them."""
        ranges, tensor_chunks = self.saved_ranges(), []
        for name, parameter in self.model.named_parameters():
            mine, weights = ranges[name], self.weights(parameter)
            held = {"weight": weights, **self.moments(parameter)}
            if averages:
                held["ema"] = Shard(averages[name], weights.first)
            for kind, (values, first) in held.items():
                tensor_chunks.append(TensorChunk(kind, name, values[mine.start - first : mine.stop - first]))
        return tensor_chunks

    def load_weights(self, reader: CheckpointReader) -> None:
        self.fill(reader, "weight", {name: self.weights(p) for name, p in self.model.named_parameters()})

    def load_moments(self, reader: CheckpointReader, steps: int) -> None:
        """Collective. Fill the moments from a checkpoint after `steps` optimiser steps. Raise UserError if another
        optimiser wrote the checkpoint."""
        if steps == 0:
            return
        self.allocate_moments(steps)
        kinds: dict[str, dict[str, Shard]] = {}
        for name, parameter in self.model.named_parameters():
            for kind, shard in self.moments(parameter).items():
                kinds.setdefault(kind, {})[name] = shard
        for kind, shards in kinds.items():
            self.fill(reader, kind, shards)

    def fill(self, reader: CheckpointReader, kind: str, shards: Mapping[str, Shard]) -> None:
        """Collective. Fill this process's ranges of the parameters' tensors of a `TensorChunk.kind`.

        They are whole here. Each process reads the part that it would save, and sends it to the others.
        """
        parts = self._parts()
        for name, (values, _) in shards.items():
            for rank, part in parts[name]:
                if rank == self.rank:
                    reader.fill(kind, name, values[part.start : part.stop], part.start)
        for name, (values, _) in shards.items():
            for rank, part in parts[name] if self.world > 1 else ():
                dist.broadcast(values[part.start : part.stop], rank)


class ShardedLayout(Layout):
    """A layout whose processes hold ranges of weights or moments: each reads its own ranges of a checkpoint."""

    def fill(self, reader: CheckpointReader, kind: str, shards: Mapping[str, Shard]) -> None:
        for name, shard in shards.items():
            reader.fill(kind, name, *shard)


class Engine:
    """One model on the processes of a launch. All processes make these calls, in this order:

    1. `build` makes the model and its optimisers, sharded where the engine shards.
    2. `reset_optimizer` drops the moments before the first step of a schedule.
    3. For every step: the engine itself and `backward` for each batch of `accumulate`, `gradient_norm`, `step`.

    `model` is the model itself, for evaluation and parameter names. `wrapped` is its wrapper for training, which a call
    of the engine calls.
    """

    # Whether fp32 weights are cast to bf16 for each product; otherwise they are gathered in bf16.
    autocasts: ClassVar[bool] = True
    # Supported values of optim.name.
    optimizers_carried: ClassVar[tuple[str, ...]] = ("adamw", "muon")

    def __init__(self, accelerator: "Accelerator", launch: Launch, recipe: OptimRecipe, global_batch_size: int):
        self.accelerator = accelerator
        self.launch = launch
        self.recipe = recipe
        self.batch_size = global_batch_size // accelerator.num_processes
        self.name = launch.engine  # in the run directory's reports
        self.model: FlipPreTrainedModel
        self.wrapped: Any = None
        # Kept here, because a walk through the modules takes the host longer than the sum of the norms.
        self._parameters: list[nn.Parameter] = []
        # Parameters that are trained in some stage, and the parts of them that are frozen now.
        self._trainable: list[nn.Parameter] = []
        self._frozen: tuple[str, ...] = ()
        self._recomputes = False
        self._is_checked = False
        self.layout: Layout
        self.optimizers: list[torch.optim.Optimizer] = []
        # Exponential moving averages of this process's elements of each parameter, if the recipe asks for them.
        self.averages: dict[str, torch.Tensor] = {}
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
        frozen: Sequence[str] = (),
        reader: CheckpointReader | None = None,
        num_steps: int = 0,
    ) -> None:
        """Collective. Make the model and its optimisers, ready to train.

        Args:
            config, configure, init, kind: arguments of `flipscale.engines.first_weights.build_weights`.
            frozen: parts to freeze, besides those that `configure` freezes.
            reader: checkpoint to load weights and averages from.
            num_steps: number of the checkpoint's optimiser steps; 0 leaves its moments.
        """
        # 1. New weights, sharded block by block.
        self.model = build_weights(config, configure, init, self.shard, kind)
        self.layout = self.shard(self.model, is_block=False)
        # 2. The checkpoint's weights, before the model is wrapped, because a wrapper may copy the weights.
        if reader is not None:
            self.layout.load_weights(reader)
        # 3. Frozen parts, the wrapper and the optimisers; 4. their moments; 5. the averages.
        self._prepare(frozen)
        if reader is not None:
            self.layout.load_moments(reader, num_steps)
        if self.recipe.ema_decay is not None:
            self._start_averages(reader)

    def _start_averages(self, reader: CheckpointReader | None) -> None:
        """Start the averages from a checkpoint, or else from the current weights."""
        self.averages = {name: held.clone() for name, held in self.layout.all_weights().items()}
        if reader is not None:
            parameters = self.model.named_parameters()
            averages = {name: Shard(self.averages[name], self.layout.weights(p).first) for name, p in parameters}
            self.layout.fill(reader, "ema", averages)

    def shard(self, part: nn.Module, is_block: bool = True) -> Layout:
        """Collective. Move a part to the device, sharded if the engine shards, and return its layout.

        The parts are the blocks, each as soon as it has its weights, and at the end the model.
        """
        part.to(self.accelerator.device)
        return Layout(part, self.accelerator.process_index, self.accelerator.num_processes)

    def _prepare(self, frozen: Sequence[str]) -> None:
        """Collective. Freeze parts, wrap the model for training and make its optimisers, without moments."""
        self._freeze(frozen)
        self.wrapped = self._wrap()
        self._parameters = list(self.model.parameters())
        muon_dtype = torch.bfloat16 if self.launch.bf16 else torch.float32
        self.optimizers = build_optimizers(self.model, self.recipe, muon_dtype, self._muon_group())
        self.layout.optimizers = self.optimizers

    def _freeze(self, frozen: Sequence[str]) -> None:
        self._trainable = self._trainable or [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        freeze(self.model, frozen, "stages.frozen")
        self._frozen, self._is_checked = tuple(frozen), False

    def reset_optimizer(self, frozen: Sequence[str]) -> None:
        """Collective. Drop the moments. If other parts are now `frozen`, wrap the model and make optimisers again."""
        if tuple(frozen) == self._frozen:
            self.layout.forget_moments()
            return
        self._release()
        collect_frozen_garbage()  # the wrapper has reference cycles
        self._prepare(frozen)

    def recompute(self, enabled: bool) -> None:
        """Recompute the blocks' activations in backward passes from here on, or keep them."""
        if enabled != self._recomputes:
            self._recomputes = enabled
            (self.model.activation_checkpointing_enable if enabled else self.model.activation_checkpointing_disable)()

    def _release(self) -> None:
        self.wrapped, self.optimizers, self.layout.optimizers = None, [], ()

    def _wrap(self) -> Any:
        return self.model

    def _muon_group(self) -> dist.ProcessGroup | None:
        """Collective. Return the processes that share Muon's work on whole matrices; None if each does all of it."""
        return None

    def __call__(self, **batch: Any) -> Any:
        """Collective. Return the `FlipOutput` of this process's part of a batch, the arguments of `forward`."""
        self.phases.mark("forward")
        output = self.wrapped(**batch, return_logits=False)
        self.phases.mark("loss")
        return output

    def autocast(self) -> torch.autocast:
        """Return the autocast of the launch's precision, under which the loss is called."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.launch.bf16)

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

    def check_gradients(self) -> None:
        """Raise UserError if the first step of new optimisers gave trained parameters no gradient.

        Data parallelism would wait for it, so one process refuses the same."""
        if self._is_checked:
            return
        self._is_checked = True
        # By the modules of a parameter, the largest first, and its own name: `a`, `a.b`, `a.b.weight`.
        trained = {
            tuple(accumulate(name.split("."), "{}.{}".format)): self._has_gradient(parameter)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        used = {part for parts, has_gradient in trained.items() if has_gradient for part in parts}
        # A module that is not used at all stands for its parameters.
        unused = [next(part for part in parts if part not in used) for parts in trained if parts[-1] not in used]
        if unused:
            some = ", ".join([*dict.fromkeys(unused)][:9])
            raise UserError(
                f"the loss gives no gradient to {len(unused)} trained parameters, those of {some}. Fix: add [{some}] "
                "to model.frozen and name another output_dir, or let the loss use them"
            )

    def _has_gradient(self, parameter: nn.Parameter) -> bool:
        return parameter.grad is not None

    def gradient_norm(self) -> torch.Tensor:
        """Collective. Return the global norm of the gradients, fp32 `()`, then clip them if the recipe says so."""
        return gradient_norm(self._parameters, self.recipe.max_grad_norm)

    def step(self, learning_rate: float, should_step: torch.Tensor) -> None:
        """Collective. Update the weights, moments and averages, and drop the gradients.

        Args:
            learning_rate: learning rate before the groups' factors.
            should_step: fp32 `()` on the accelerator, the same on every process: 1, or 0 to skip the update. The
                device reads it, so the host need not know it.
        """
        set_learning_rate(self.optimizers, learning_rate)
        self._step(should_step)
        if self.recipe.ema_decay is not None:
            # On the device, as `should_step` is; torch's fused lerp of many tensors takes a number of the host.
            share = (1.0 - self.recipe.ema_decay) * should_step
            for name, values in self.layout.all_weights().items():
                self.averages[name].lerp_(values, share)

    def _step(self, should_step: torch.Tensor) -> None:
        found_inf = 1.0 - should_step
        for optimizer in self.optimizers:
            # torch's fused AdamW and our Muon read this name: at 1 nothing is updated.
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Collective. Swap the averages, if the recipe has them, into `model` for the duration of the context."""
        self._swap_averages()
        try:
            yield
        finally:
            self._swap_averages()

    def _swap_averages(self) -> None:
        if not self.averages:
            return
        for name, values in self.layout.all_weights().items():
            kept = values.clone()
            values.copy_(self.averages[name])
            self.averages[name].copy_(kept)
        self.layout.weights_changed()

    def tensor_chunks(self) -> list[TensorChunk]:
        """Return the data that this process saves: ranges of weights, moments and averages."""
        return self.layout.tensor_chunks(self.averages)


@torch.no_grad()
def gradient_norm(
    parameters: Iterable[nn.Parameter], max_grad_norm: float | None, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Return the global norm of the gradients, fp32 `()`, and clip them in place to `max_grad_norm`, if that is set.

    Collective over `group`, which together hold every gradient once. With None, each process has all gradients.
    """
    shards = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    gradients = [gradient for gradient in shards if gradient.numel()]
    norm = nn.utils.get_total_norm(gradients) if gradients else shards[0].new_zeros(())
    if group is not None:
        square = norm.square()
        dist.all_reduce(square, group=group)
        norm = square.sqrt()
    if max_grad_norm is not None and gradients:
        # Also with a factor of 1, which changes no bit, because the host would wait for a check.
        torch._foreach_mul_(gradients, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
