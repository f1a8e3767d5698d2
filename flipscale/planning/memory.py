"""The memory of each process under a recipe and a launch, computed without a machine.

Activations are counted by running the step on tensors without storage: forward and backward, with recomputation. So a
laptop can plan a model of any size.
"""

import functools
import json
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.initialization import no_init_weights

from flipscale.data.features import read_about
from flipscale.data.loader import BATCHES_OF_A_WORKER, BATCHES_ON_DEVICE, PINNED_BATCHES, pairs_of_a_process
from flipscale.engines.build_engine import engine_class, engine_classes
from flipscale.engines.device import best_attention
from flipscale.engines.first_weights import model_without_storage
from flipscale.engines.launch import Launch
from flipscale.engines.optimizers import encoder_blocks, muon_buffer_bytes, num_moments, num_trained
from flipscale.io.errors import UserError
from flipscale.model import FlipConfig, FlipModel, FlipPreTrainedModel
from flipscale.model.modeling_flip import BlockLayerNorm, as_on_gpu
from flipscale.objectives.build_objective import build_config, build_objective
from flipscale.objectives.contrastive import exchange_bytes, tile_bytes
from flipscale.objectives.objective import Objective
from flipscale.planning.flops import PLAIN, StepShape, example_batch, pair_flops, pair_step
from flipscale.recipe.optim import StageRecipe
from flipscale.recipe.recipe import Recipe
from flipscale.recipe.schedule import Stage

GPUS_OF_A_NODE = 8
# Usable share of a GPU's memory. CUDA's context and fragmentation take the rest.
USABLE = 0.94
# Source: github.com/NVIDIA/nccl/issues/1685. Each of 8 H100 had 1.06 GB without PyTorch's memory before the first
# all-to-all: the rings' buffers. It had 4.34 GB after it: a buffer for each neighbour.
_COMMUNICATOR_BYTES = 1_060_000_000
_NEIGHBOUR_BYTES = (4_340_000_000 - 1_060_000_000) // 7


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the fullest process at its peak.

    Args:
        weights: fp32 weights, with their moving averages and the optimiser's copy of its part.
        gradients: fp32 gradients at the peak.
        moments: moments of the optimiser.
        activations: activations of both passes, with the casts of weights under autocast.
        communication: gathered weights and gradients on their way; Muon's buffers if the optimiser step is the peak.
        loss: embeddings of the global batch, their gradients, and a tile of logits.
        batches: batch of the step, and prefetched batches.
        nccl: buffers of NCCL's communicators.
    """

    weights: int
    gradients: int = 0
    moments: int = 0
    activations: int = 0
    communication: int = 0
    loss: int = 0
    batches: int = 0
    nccl: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def fits(self, gib: float) -> bool:
        return self.total <= USABLE * gib * 2**30


def recipe_memory(recipe: Recipe, launch: Launch) -> MemoryPlan:
    """Return the memory of the fullest process in the recipe's heaviest stage. Raise UserError if the processes do not
    divide the batch, or the engine cannot run the recipe."""
    groups: dict[tuple[Any, ...], list[StageRecipe]] = {}
    for stage in recipe.stages:
        groups.setdefault((stage.frozen, recipe.recomputes(stage)), []).append(stage)
    alike = [replace(recipe, stages=stages) for stages in groups.values()]
    return max((_memory(one, launch) for one in alike), key=lambda memory: memory.total)


def _memory(recipe: Recipe, launch: Launch) -> MemoryPlan:
    """Return the memory in the heaviest stage. All stages have the same frozen parts, and recompute or not."""
    config, objective, engine = build_config(recipe), build_objective(recipe), engine_class(launch)
    step = heaviest_step(recipe, launch)
    refusal = engine.refusal(launch, recipe.optim.name, recipe.model.compile is True)
    if refusal is not None:
        raise UserError(refusal)
    model = planned_model(config, objective.trained_class(config), step)
    micro_batches = recipe.data.global_batch_size // launch.num_processes // step.batch_size
    kept, moments = engine.memory(model, launch), num_moments(model, recipe.optim)
    with torch.device("meta"):
        batch = example_batch(config, step, objective)
    always = MemoryPlan(
        weights=4 * kept.weights * (2 if recipe.optim.ema_decay else 1) + 4 * kept.copies,
        moments=sum(4 * count * kept.moments[name] for name, count in moments.items()),
        batches=BATCHES_ON_DEVICE * micro_batches * sum(tensor.nbytes for tensor in batch.values()),
        nccl=_nccl_bytes(launch, recipe.optim.name),
    )
    # The memory of a loss that is a mean over samples is among the activations.
    loss_peak, loss_kept = loss_bytes(recipe, launch, step.views) if objective.needs_global_batch else (0, 0)
    waiting = engine.memory(model, launch, accumulates=micro_batches > 1).gradients
    passes = _passes(num_trained(model), kept.gradients, waiting, micro_batches)
    activations = [activation_bytes(config, replace(step, added_gradients=share), objective) for _, share in passes]
    at_loss = replace(
        always,
        gradients=4 * passes[0][0],
        loss=loss_peak,
        activations=activations[0].saved if micro_batches == 1 else 0,
    )
    in_backward = [
        replace(
            always,
            gradients=4 * before + of_pass.gradients,
            activations=of_pass.peak,
            communication=kept.communication_bytes,
            loss=loss_kept,
        )
        for (before, _), of_pass in zip(passes, activations, strict=True)
    ]
    exchanged = muon_buffer_bytes(model, launch) if recipe.optim.name == "muon" else 0
    at_step = replace(always, gradients=4 * kept.gradients, communication=exchanged)
    return max([at_loss, *in_backward, at_step], key=lambda memory: memory.total)


def _passes(whole: int, kept: int, waiting: int, micro_batches: int) -> list[tuple[int, float]]:
    """Return the backward passes that may be the peak: number of gradient elements before a pass, and share of each
    gradient that stays when it is ready.

    Args:
        kept: gradient elements that the engine keeps for the optimiser step; the last pass sends the others away.
        waiting: gradient elements that the engine keeps between micro-batches.
    """
    if kept >= whole:
        return [(kept, 0.0)]
    if micro_batches == 1:
        return [(0, kept / whole)]
    return [(waiting - whole, 1.0) if micro_batches == 2 else (waiting, 0.0), (waiting, kept / whole - 1.0)]


def heaviest_step(recipe: Recipe, launch: Launch) -> StepShape:
    """Return a process's part of a step in the stage with the most operations."""
    by_name = pair_flops(recipe)
    return micro_batch(recipe, launch, max(recipe.stages, key=lambda stage: by_name[stage.name]))


def micro_batch(recipe: Recipe, launch: Launch, stage: StageRecipe | Stage) -> StepShape:
    """Return the pairs of a process that are in its model at once."""
    pairs = pairs_of_a_process(recipe.data.global_batch_size, launch.num_processes)
    return replace(
        pair_step(recipe, stage),
        batch_size=min(pairs, recipe.data.micro_batch_size or pairs),
        gradient_checkpointing=recipe.recomputes(stage),
        bf16=launch.bf16,
        autocast=engine_class(launch).autocasts,
    )


def host_bytes(recipe: Recipe, launch: Launch, workers: int) -> int:
    """Return the bytes of batches in the memory of a node, with `workers` in each of its processes: batches made ahead
    in /dev/shm, and page-locked ones, for which torch's allocator takes powers of two."""
    config, objective, largest = build_config(recipe), build_objective(recipe), 0
    for stage in recipe.stages:
        step = micro_batch(recipe, launch, stage)
        with torch.device("meta"):
            size = sum(tensor.nbytes for tensor in example_batch(config, step, objective).values())
        at_once = recipe.data.global_batch_size // launch.num_processes // step.batch_size
        pinned = PINNED_BATCHES * at_once << (size - 1).bit_length()
        largest = max(largest, pinned + BATCHES_OF_A_WORKER * workers * size)
    return min(launch.num_processes, GPUS_OF_A_NODE) * largest


def trained_model(recipe: Recipe, stage: StageRecipe | Stage | None = None) -> FlipPreTrainedModel:
    """Return the trained model of a recipe without storage, with the parts frozen that a stage freezes."""
    config, frozen = build_config(recipe), (*recipe.model.frozen, *(stage.frozen if stage else ()))
    step = StepShape(1, frozen=frozen, lora=recipe.optim.lora)
    return planned_model(config, build_objective(recipe).trained_class(config), step)


def planned_model(
    config: FlipConfig, kind: type[FlipPreTrainedModel] = FlipModel, step: StepShape | None = None
) -> FlipPreTrainedModel:
    """Return a model without storage, with the frozen parts and the LoRA of a step. Models are cached."""
    trained = StepShape(1) if step is None else StepShape(1, frozen=step.frozen, lora=step.lora)
    return _planned_model(config.to_json_string(use_diff=False), kind, trained)  # type: ignore[arg-type]  # hashable


@functools.lru_cache(maxsize=8)
def _planned_model(config: str, kind: type[FlipPreTrainedModel], step: StepShape) -> FlipPreTrainedModel:
    model = model_without_storage(kind.config_class(**json.loads(config)), kind)
    step.prepare(model)
    return model


def checkpoint_bytes(recipe: Recipe) -> int:
    """Return the bytes of a checkpoint of all processes: fp32 weights, moments, and any averages."""
    model = trained_model(recipe)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    averages = 0 if recipe.optim.ema_decay is None else 1
    moments = sum(count * sizes[name] for name, count in num_moments(model, recipe.optim).items())
    return 4 * ((1 + averages) * sum(sizes.values()) + moments)


def loss_bytes(recipe: Recipe, launch: Launch, views: int) -> tuple[int, int]:
    """Return the fp32 bytes of the loss at its peak, and those kept for the backward pass.

    They are the gradients of this process's embeddings, the exchange, and two buffers of logits. With Triton, infonce
    needs only one buffer.
    """
    dim, batch = int(build_config(recipe).projection_dim or 0), recipe.data.global_batch_size
    views, pairs = max(views, recipe.loss.captions_per_image), batch // launch.num_processes
    tiles = tile_bytes(pairs, batch, dim)
    kept = 4 * dim * pairs * (views + 1)
    peak = kept + tiles + exchange_bytes(pairs, launch.num_processes, dim, views)
    if not recipe.data.teachers:
        return peak, kept
    # The teachers' part comes first, beside the student's texts if they are gathered already.
    abouts = [read_about(Path(folder)) for folder in recipe.data.teachers]
    widths = [about["texts"]["width"] if "texts" in about else dim for about in abouts]
    width, world = len(widths) * max(widths), launch.num_processes
    others = world if world > 1 else 0
    tiles = tile_bytes(pairs, batch, max(widths))
    rows = 4 * pairs * (width * (3 + others) + dim * (2 + others))
    exchanged = exchange_bytes(pairs, world, dim, len(widths))
    return kept + max(peak, tiles + rows + exchanged), 2 * kept


def _nccl_bytes(launch: Launch, optimizer: str) -> int:
    """Return the bytes of NCCL's communicators: one for all processes, two more under HSDP, and one of each node's
    processes for Muon under ddp. Only Muon of sharded weights sends all-to-all, and so needs buffers for each
    neighbour."""
    if launch.num_processes == 1:
        return 0
    communicators = 3 if launch.shard_size not in (None, launch.num_processes) else 1
    communicators += optimizer == "muon" and launch.engine == "ddp" and launch.neighbours < launch.num_processes
    sends_to_each = optimizer == "muon" and launch.engine == "fsdp2"
    neighbours = min(launch.num_processes, GPUS_OF_A_NODE) - 1 if sends_to_each else 0
    return communicators * _COMMUNICATOR_BYTES + neighbours * _NEIGHBOUR_BYTES


def fitting_changes(recipe: Recipe, launch: Launch, limit: int) -> list[str]:
    """Return single changes that bring the total under `limit` bytes, with the new totals. If no single change does,
    return recomputation with another change."""
    again = "model.gradient_checkpointing"
    if recipe.model.gradient_checkpointing:
        keeping = (stage.name for stage in recipe.stages if not recipe.recomputes(stage))
        again = " and ".join(f"stages.{name}.gradient_checkpointing" for name in keeping)
    stages = [replace(stage, gradient_checkpointing=None) for stage in recipe.stages]
    recomputing = replace(recipe, model=replace(recipe.model, gradient_checkpointing=True), stages=stages)
    recomputes = [(again, again, recomputing, launch)] if recipe != recomputing else []
    fitting = _fitting([*recomputes, *_changes(recipe, launch)], limit)
    if fitting or not recomputes:
        return fitting
    return [f"{again} and {other}" for other in _fitting(_changes(recomputing, launch), limit)]


def _changes(recipe: Recipe, launch: Launch) -> Iterator[tuple[str, str, Recipe, Launch]]:
    """Yield the kind and name of possible changes, the smallest of a kind first, and what they change."""
    pairs = recipe.data.global_batch_size // launch.num_processes
    at_once = recipe.data.micro_batch_size or pairs
    for size in (at_once // count for count in (4, 16) if at_once % count == 0):
        changed = replace(recipe, data=replace(recipe.data, micro_batch_size=size))
        yield "micro-batches", f"data.micro_batch_size {size}", changed, launch
    for engine in engine_classes():
        other = replace(launch, engine=engine, shard_size=None, reshard_after_forward=True)
        refusal = engine_class(other).refusal(other, recipe.optim.name, recipe.model.compile is True)
        if other != launch and refusal is None:
            yield engine, engine, recipe, other
    for count in (launch.num_processes * times for times in (2, 4, 8) if pairs % times == 0):
        yield "processes", f"{count} processes", recipe, replace(launch, num_processes=count)


def _fitting(changes: Iterable[tuple[str, str, Recipe, Launch]], limit: int) -> list[str]:
    """Return the first fitting change of each kind."""
    fitting: dict[str, str] = {}
    for kind, name, recipe, launch in changes:
        if kind not in fitting and (need := recipe_memory(recipe, launch).total) <= limit:
            fitting[kind] = f"{name} ({need / 2**30:.1f} GiB)"
    return list(fitting.values())


@dataclass(frozen=True)
class Activations:
    """Bytes of activations, without weights and the batch.

    Args:
        saved: activations kept for the backward pass while the loss is computed.
        peak: activations and their gradients at the peak of these and the weights' gradients together.
        gradients: the weights' gradients kept at that peak.
    """

    saved: int
    peak: int
    gradients: int


def activation_bytes(config: FlipConfig, step: StepShape, objective: Objective = PLAIN) -> Activations:
    """Return the activations of a forward and a backward pass of the objective's model."""
    return _simulated(type(config), config.to_json_string(use_diff=False), step, objective)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=64)
def _simulated(kind: type[FlipConfig], content: str, step: StepShape, objective: Objective) -> Activations:
    # Some initialisers of transformers look at their numbers, which fake tensors lack.
    with FakeTensorMode(), no_init_weights():
        return measured(kind(**json.loads(content)), step, objective)


def measured(config: FlipConfig, step: StepShape, objective: Objective = PLAIN) -> Activations:
    """Return `activation_bytes` by running both passes, on fake tensors if that mode is on, else on real tensors. The
    memory of the loss's own computation is not included."""
    weights_dtype = torch.bfloat16 if step.bf16 and not step.autocast else torch.float32
    model = objective.trained_class(config)._from_config(config, dtype=weights_dtype).train()
    step.prepare(model)
    for module in model.modules():
        for name, matrix in module.named_parameters(recurse=False):
            if matrix.device.type == "meta":  # LoRA's
                setattr(module, name, nn.Parameter(torch.zeros(matrix.shape, dtype=weights_dtype)))
    products_dtype = torch.bfloat16 if step.bf16 else torch.float32
    model.set_attn_implementation(best_attention(torch.device(step.device_type), products_dtype))
    if step.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if step.bf16 and step.autocast and step.device_type == "cuda":
        cast_norms_as_cuda_does(model)
    batch = example_batch(config, step, objective)
    as_there = as_on_gpu() if step.device_type == "cuda" else nullcontext()
    with as_there, LiveBytes([*model.parameters(), *model.buffers(), *batch.values()]) as live:
        in_blocks = {id(parameter) for block in encoder_blocks(model) for parameter in block.parameters()}

        def count_gradient(parameter: torch.Tensor) -> None:
            parameter.grad = None
            if step.added_gradients > 0.0 or id(parameter) in in_blocks:
                live.kept += int(4 * parameter.numel() * step.added_gradients)

        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter.register_post_accumulate_grad_hook(count_gradient)
        with torch.autocast("cpu", torch.bfloat16, enabled=step.bf16 and step.autocast):
            output = model(**batch, image_size=step.image_size, return_logits=False)
        loss = objective.per_sample_loss(output)
        values = [*objective.loss_inputs(output), *objective.parameters(output).values()]
        if values:
            loss = torch.stack([value.float().sum() for value in values]).sum() + loss
        saved = live.now
        loss.backward()
    return Activations(saved, live.peak, live.kept_at_peak)


def cast_norms_as_cuda_does(model: nn.Module) -> None:
    """Cast the inputs of layer norms to fp32. CUDA's autocast does so and keeps them; the CPU's does not."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and not isinstance(module, BlockLayerNorm):
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))


class LiveBytes(TorchDispatchMode):
    """Count the bytes of live tensors made while this mode is on, and the bytes added to `kept`.

    `peak` and `kept_at_peak` are values at the peak of their sum.
    """

    def __init__(self, already_there: list[torch.Tensor]):
        super().__init__()
        self.now = self.peak = self.kept = self.kept_at_peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in already_there}

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                self.now += size
                if self.now + self.kept > self.peak + self.kept_at_peak:
                    self.peak, self.kept_at_peak = self.now, self.kept
                weakref.finalize(storage, self._remove, key, size)
        return result

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
