"""What a recipe needs of each process's memory under a launch, before there is a machine to run it."""

from dataclasses import dataclass, replace

import torch

from flipscale.model import FlipConfig, FlipModel
from flipscale.planning.activations import Step, activation_bytes
from flipscale.planning.flops import pair_flops
from flipscale.planning.launch_file import Launch
from flipscale.training.recipe import Recipe

# Logits and what is made of them in a tile of the loss, on a GPU.
_TILE_BYTES = 2 * 4 * 4096 * 8192


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest process.

    Args:
        weights: that it keeps, fp32, with the optimiser's copy of its part where the engine has one.
        gradients: that it keeps, fp32.
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
        """All of them at once, as they nearly are when the last layer's gradients begin."""
        return self.weights + self.gradients + self.moments + self.activations + self.communication + self.loss


def recipe_memory(recipe: Recipe, launch: Launch, device_type: str = "cuda") -> Memory:
    """What the recipe's heaviest stage needs of the fullest process.

    Raises:
        ValueError: a batch that the processes do not divide, or an optimiser that the engine does not have.
    """
    config = recipe.model.config()
    step = heaviest_step(recipe, launch, device_type)
    shapes = parameter_shapes(config)
    held = held_elements(shapes, launch)
    whole = sum(shape.numel() for shape in shapes.values())
    moments = sum(held[name] * (4 if _has_one_moment(name, shapes[name], recipe) else 8) for name in shapes)
    sharded, zero = sum(held.values()), launch.engine.startswith("zero")
    if recipe.optim.name == "muon" and zero:
        raise ValueError(f"optim.name is muon, which {launch.engine} does not have; use ddp.yaml or fsdp2.yaml")
    weights = sharded if launch.engine in ("fsdp2", "zero3") else whole
    gradients = whole if launch.engine in ("ddp", "zero1") else sharded
    return Memory(
        weights=4 * weights + (4 * sharded if zero else 0),
        gradients=4 * gradients,
        moments=moments,
        activations=activation_bytes(config, step),
        communication=communication_bytes(shapes, launch),
        loss=loss_bytes(recipe, launch, step),
    )


def heaviest_step(recipe: Recipe, launch: Launch, device_type: str) -> Step:
    """A process's part of a step of the stage that sees most: as a rule the unmasked one."""
    batch = recipe.data.global_batch_size
    if batch % launch.num_processes:
        raise ValueError(f"global_batch_size {batch} is not divisible by {launch.num_processes} processes")
    by_name = pair_flops(recipe)
    stage = max(recipe.stages, key=lambda stage: by_name[stage.name])
    return Step(
        batch_size=batch // launch.num_processes,
        mask_ratio=stage.mask_ratio,
        views=recipe.mask.views_at(stage.mask_ratio),
        text_mask_ratio=stage.text_mask_ratio,
        gradient_checkpointing=recipe.model.gradient_checkpointing,
        bf16=launch.bf16,
        autocast=launch.engine != "fsdp2",
        device_type=device_type,
    )


def parameter_shapes(config: FlipConfig) -> dict[str, torch.Size]:
    """The shape of every parameter by name, of a model without storage."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in FlipModel(config).named_parameters()}


def held_elements(shapes: dict[str, torch.Size], launch: Launch) -> dict[str, int]:
    """Elements of each parameter whose moments the fullest process has: rows under FSDP2, a flat part under ZeRO."""
    count = launch.num_processes
    if launch.engine == "ddp":
        return {name: shape.numel() for name, shape in shapes.items()}
    if launch.engine == "fsdp2":
        return {name: -(-shape[0] // count) * shape[1:].numel() for name, shape in shapes.items()}
    return {name: -(-shape.numel() // count) for name, shape in shapes.items()}


def communication_bytes(shapes: dict[str, torch.Size], launch: Launch) -> int:
    """Weights and gradients in transit. Data parallel sends its gradients from where they lie."""
    whole = sum(shape.numel() for shape in shapes.values())
    if launch.engine == "ddp" or launch.num_processes == 1:
        return 0
    if launch.engine == "fsdp2":
        blocks: dict[str, int] = {}
        for name, shape in shapes.items():
            head, found, tail = name.partition(".layers.")
            block = f"{head}.{tail.split('.')[0]}" if found else ""
            blocks[block] = blocks.get(block, 0) + shape.numel()
        rest = blocks.pop("", 0)
        # The block that computes and the one that is gathered ahead, a block's gradients in both precisions, and the
        # weights outside of blocks.
        width = 2 if launch.bf16 else 4
        return max(blocks.values()) * (2 * width + width + 4) + rest * width
    gathered = 4 * min(whole, launch.live_elements) if launch.engine == "zero3" else 0
    return gathered + 4 * min(whole, launch.bucket_elements)


def loss_bytes(recipe: Recipe, launch: Launch, step: Step) -> int:
    """The embeddings that the loss holds on one process, fp32, and their gradients."""
    row = 4 * int(recipe.model.config().projection_dim or 0)
    batch = recipe.data.global_batch_size
    mine = 2 * row * step.batch_size * (step.views + 1)
    # All texts, what this process's images contribute to their gradients, and all that comes back for its own.
    return mine + (3 * row * batch if launch.num_processes > 1 else 0) + min(_TILE_BYTES, 8 * step.batch_size * batch)


def _has_one_moment(name: str, shape: torch.Size, recipe: Recipe) -> bool:
    return recipe.optim.name == "muon" and ".encoder.layers." in name and len(shape) == 2


def what_fits(recipe: Recipe, launch: Launch, limit: int, device_type: str = "cuda") -> list[str]:
    """Changes that bring the total under `limit` bytes, each with what it then needs; pairs where no one alone does."""
    recomputing = replace(recipe, model=replace(recipe.model, gradient_checkpointing=True))
    again = {} if recipe.model.gradient_checkpointing else {"model.gradient_checkpointing": recomputing}
    engines = [engine for engine in ("fsdp2", "zero3") if engine != launch.engine]
    if recipe.optim.name == "muon":
        engines = [engine for engine in engines if engine == "fsdp2"]
    moved = {engine: launch.using(engine=engine) for engine in engines}
    counts = [launch.num_processes * times for times in (2, 4, 8)]
    more = {f"{n} processes": launch.using(num_processes=n) for n in counts if recipe.data.global_batch_size % n == 0}
    found = _fitting({how: (changed, launch) for how, changed in again.items()}, limit, device_type)
    found += _fitting({where: (recipe, there) for where, there in moved.items()}, limit, device_type)
    found += _fitting({where: (recipe, there) for where, there in more.items()}, limit, device_type)[:1]
    if found or not again:
        return found
    return [
        change
        for group in (moved, more)
        for change in _fitting(
            {f"model.gradient_checkpointing and {where}": (recomputing, there) for where, there in group.items()},
            limit,
            device_type,
        )
    ]


def _fitting(changes: dict[str, tuple[Recipe, Launch]], limit: int, device_type: str) -> list[str]:
    needs = {words: recipe_memory(recipe, launch, device_type).total for words, (recipe, launch) in changes.items()}
    return [f"{words} ({need / 2**30:.1f} GiB)" for words, need in needs.items() if need <= limit]
