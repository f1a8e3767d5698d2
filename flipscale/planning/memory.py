"""What a recipe needs of each process's memory under a launch, known before there is a machine to run it."""

import functools
import json
from dataclasses import dataclass, replace

from flipscale.engines.first_weights import model_without_storage
from flipscale.engines.launch import Launch
from flipscale.engines.optimizers import num_moments
from flipscale.engines.start import engine_class, engine_classes
from flipscale.model import FlipConfig, FlipModel
from flipscale.planning.activations import Step, activation_bytes
from flipscale.planning.flops import pair_flops
from flipscale.training.recipe import Recipe

# Logits and what is made of them in a tile of the loss, on a GPU.
_TILE_BYTES = 2 * 4 * 4096 * 8192


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest process.

    Args:
        weights: kept in fp32, with their averages and the optimiser's copy of its part where there are such.
        gradients: kept in fp32.
        moments: of the optimiser.
        activations: the most that a step adds between its first product and its last gradient; where fp32 weights are
            cast for every product, their casts too.
        communication: weights that were gathered and gradients on their way to other processes.
        loss: embeddings of the global batch, their gradients, and a tile of logits.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    communication: int
    loss: int

    @property
    def total(self) -> int:
        """The sum: nearly all of it is there at once when the last layer's gradients begin."""
        return self.weights + self.gradients + self.moments + self.activations + self.communication + self.loss


def recipe_memory(recipe: Recipe, launch: Launch, device_type: str = "cuda") -> Memory:
    """Return what the recipe's heaviest stage needs of the fullest process.

    Raises:
        ValueError: the processes do not divide the batch, or the engine refuses the recipe.
    """
    config, engine = recipe.model_config(), engine_class(launch)
    step = heaviest_step(recipe, launch, device_type)
    refusal = engine.refusal(launch, recipe.optim.name, recipe.model.compile)
    if refusal is not None:
        raise ValueError(refusal)
    model = planned_model(config)
    kept = engine.memory(model, launch)
    moments = num_moments(model, recipe.optim)
    return Memory(
        weights=4 * kept.weights * (2 if recipe.optim.ema_decay else 1) + 4 * kept.copies,
        gradients=4 * kept.gradients,
        moments=sum(4 * count * kept.moments[name] for name, count in moments.items()),
        activations=activation_bytes(config, step),
        communication=kept.communication_bytes,
        loss=loss_bytes(recipe, launch, step.views),
    )


def heaviest_step(recipe: Recipe, launch: Launch, device_type: str) -> Step:
    """Return a process's part of a step of the stage that sees most: as a rule the unmasked one.

    Raises:
        ValueError: the processes do not divide the batch.
    """
    batch = recipe.data.global_batch_size
    if batch % launch.num_processes:
        raise ValueError(f"global_batch_size {batch} is not divisible by {launch.num_processes} processes")
    by_name = pair_flops(recipe)
    stage = max(recipe.stages, key=lambda stage: by_name[stage.name])
    pairs = batch // launch.num_processes
    return Step(
        batch_size=min(pairs, recipe.data.micro_batch_size or pairs),
        mask_ratio=stage.mask_ratio,
        views=recipe.mask.views_at(stage.mask_ratio),
        text_mask_ratio=stage.text_mask_ratio,
        gradient_checkpointing=recipe.model.gradient_checkpointing,
        bf16=launch.bf16,
        autocast=engine_class(launch).autocasts,
        device_type=device_type,
    )


def planned_model(config: FlipConfig) -> FlipModel:
    """Return a model without storage, the same one for the same configuration."""
    return _planned_model(config.to_json_string(use_diff=False))


@functools.lru_cache(maxsize=8)
def _planned_model(config: str) -> FlipModel:
    return model_without_storage(FlipConfig(**json.loads(config)))


def loss_bytes(recipe: Recipe, launch: Launch, views: int) -> int:
    """Return the bytes of the embeddings that the loss holds on one process, fp32, of their gradients, and of a tile of
    logits."""
    row = 4 * int(recipe.model_config().projection_dim or 0)
    batch = recipe.data.global_batch_size
    pairs = batch // launch.num_processes
    mine = 2 * row * pairs * (views + 1)
    tile = min(_TILE_BYTES, 8 * pairs * batch)
    if launch.num_processes == 1:
        return mine + tile
    # Around the ring, texts and gradients of the neighbours come and go. The gathered exchange has all texts, what this
    # process's images contribute to their gradients, and all that comes back for its own texts.
    return mine + tile + (6 * row * pairs if recipe.loss.exchange == "ring" else 3 * row * batch)


def what_fits(recipe: Recipe, launch: Launch, limit: int, device_type: str = "cuda") -> list[str]:
    """Return the changes that bring the total under `limit` bytes, each with what it then needs; where none does alone,
    recomputation together with another one."""
    again = "model.gradient_checkpointing"
    recomputing = replace(recipe, model=replace(recipe.model, gradient_checkpointing=True))
    if recipe.model.gradient_checkpointing:
        return _fitting(_changes(recipe, launch), limit, device_type)
    single = _fitting([{again: (recomputing, launch)}, *_changes(recipe, launch)], limit, device_type)
    return single or [f"{again} and {other}" for other in _fitting(_changes(recomputing, launch), limit, device_type)]


def _changes(recipe: Recipe, launch: Launch) -> list[dict[str, tuple[Recipe, Launch]]]:
    """Return what else can be changed: of each kind, the least change first."""
    pairs = recipe.data.global_batch_size // launch.num_processes
    at_once = recipe.data.micro_batch_size or pairs
    parts = [at_once // count for count in (4, 16) if at_once % count == 0]
    counts = [launch.num_processes * times for times in (2, 4, 8) if pairs % times == 0]
    others = [launch.using(engine=engine, shard_size=None) for engine in engine_classes()]
    return [
        {f"data.micro_batch_size {n}": (_in_parts(recipe, n), launch) for n in parts},
        *({other.engine: (recipe, other)} for other in others if other != launch and _takes(recipe, other)),
        {f"{count} processes": (recipe, launch.using(num_processes=count)) for count in counts},
    ]


def _in_parts(recipe: Recipe, micro_batch_size: int) -> Recipe:
    return replace(recipe, data=replace(recipe.data, micro_batch_size=micro_batch_size))


def _takes(recipe: Recipe, launch: Launch) -> bool:
    return engine_class(launch).refusal(launch, recipe.optim.name, recipe.model.compile) is None


def _fitting(groups: list[dict[str, tuple[Recipe, Launch]]], limit: int, device_type: str) -> list[str]:
    """Return the first of each group that fits."""
    found = []
    for group in groups:
        for words, (recipe, launch) in group.items():
            need = recipe_memory(recipe, launch, device_type).total
            if need <= limit:
                found.append(f"{words} ({need / 2**30:.1f} GiB)")
                break
    return found
