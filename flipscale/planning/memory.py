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
        weights: that it keeps, fp32, with their averages and the optimiser's copy of its part where there are such.
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
    config = recipe.model_config()
    step = heaviest_step(recipe, launch, device_type)
    shapes = parameter_shapes(config)
    held = held_elements(shapes, launch)
    whole = sum(shape.numel() for shape in shapes.values())
    moments = sum(held[name] * (4 if _has_one_moment(name, shapes[name], recipe) else 8) for name in shapes)
    sharded, zero = sum(held.values()), launch.engine.startswith("zero")
    if not _has(launch.engine, recipe):
        raise ValueError(f"optim.name is muon, which {launch.engine} does not have; use ddp.yaml or fsdp2.yaml")
    weights = sharded if launch.engine in ("fsdp2", "zero3") else whole
    gradients = whole if launch.engine in ("ddp", "zero1") else sharded
    return Memory(
        weights=4 * weights * (2 if recipe.optim.ema_decay else 1) + (4 * sharded if zero else 0),
        gradients=4 * gradients,
        moments=moments,
        activations=activation_bytes(config, step),
        communication=communication_bytes(shapes, launch),
        loss=loss_bytes(recipe, launch, step.views),
    )


def heaviest_step(recipe: Recipe, launch: Launch, device_type: str) -> Step:
    """A process's part of a step of the stage that sees most: as a rule the unmasked one."""
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
        autocast=launch.engine != "fsdp2",
        device_type=device_type,
    )


def parameter_shapes(config: FlipConfig) -> dict[str, torch.Size]:
    """The shape of every parameter by name, of a model without storage."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in FlipModel(config).named_parameters()}


def held_elements(shapes: dict[str, torch.Size], launch: Launch) -> dict[str, int]:
    """Elements of each parameter whose moments the fullest process has: rows under FSDP2, a flat part under ZeRO."""
    count = launch.shard_size or launch.num_processes
    if launch.engine == "ddp":
        return {name: shape.numel() for name, shape in shapes.items()}
    if launch.engine == "fsdp2":
        return {name: -(-shape[0] // count) * shape[1:].numel() for name, shape in shapes.items()}
    return {name: -(-shape.numel() // count) for name, shape in shapes.items()}


def communication_bytes(shapes: dict[str, torch.Size], launch: Launch) -> int:
    """Weights and gradients in transit. Data parallel sends its gradients from where they lie, and so do the replicas
    of FSDP2 theirs of a shard."""
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


def loss_bytes(recipe: Recipe, launch: Launch, views: int) -> int:
    """The embeddings that the loss holds on one process, fp32, their gradients, and a tile of logits."""
    row = 4 * int(recipe.model_config().projection_dim or 0)
    batch = recipe.data.global_batch_size
    pairs = batch // launch.num_processes
    mine = 2 * row * pairs * (views + 1)
    tile = min(_TILE_BYTES, 8 * pairs * batch)
    if launch.num_processes == 1:
        return mine + tile
    # Round a ring, texts and gradients of the neighbours come and go. Gathered: all texts, what this process's images
    # contribute to their gradients, and all that comes back for its own.
    return mine + tile + (6 * row * pairs if recipe.loss.exchange == "ring" else 3 * row * batch)


def _has_one_moment(name: str, shape: torch.Size, recipe: Recipe) -> bool:
    return recipe.optim.name == "muon" and ".encoder.layers." in name and len(shape) == 2


def what_fits(recipe: Recipe, launch: Launch, limit: int, device_type: str = "cuda") -> list[str]:
    """Changes that bring the total under `limit` bytes, each with what it then needs; pairs where no one alone does."""
    again = "model.gradient_checkpointing"
    recomputing = replace(recipe, model=replace(recipe.model, gradient_checkpointing=True))
    if recipe.model.gradient_checkpointing:
        return _fitting(_changes(recipe, launch), limit, device_type)
    single = _fitting([{again: (recomputing, launch)}, *_changes(recipe, launch)], limit, device_type)
    return single or [f"{again} and {other}" for other in _fitting(_changes(recomputing, launch), limit, device_type)]


def _changes(recipe: Recipe, launch: Launch) -> list[dict[str, tuple[Recipe, Launch]]]:
    """What else can be changed: of each kind, the least change first."""
    pairs = recipe.data.global_batch_size // launch.num_processes
    at_once = recipe.data.micro_batch_size or pairs
    parts = [at_once // count for count in (4, 16) if at_once % count == 0]
    counts = [launch.num_processes * times for times in (2, 4, 8) if pairs % times == 0]
    others = [launch.using(engine=engine, shard_size=None) for engine in ("fsdp2", "zero3")]
    return [
        {f"data.micro_batch_size {n}": (_in_parts(recipe, n), launch) for n in parts},
        *({other.engine: (recipe, other)} for other in others if other != launch and _has(other.engine, recipe)),
        {f"{count} processes": (recipe, launch.using(num_processes=count)) for count in counts},
    ]


def _in_parts(recipe: Recipe, micro_batch_size: int) -> Recipe:
    return replace(recipe, data=replace(recipe.data, micro_batch_size=micro_batch_size))


def _has(engine: str, recipe: Recipe) -> bool:
    """Whether an engine has the recipe's optimiser."""
    return not (engine.startswith("zero") and recipe.optim.name == "muon")


def _fitting(groups: list[dict[str, tuple[Recipe, Launch]]], limit: int, device_type: str) -> list[str]:
    """The first of each group that fits."""
    found = []
    for group in groups:
        for words, (recipe, launch) in group.items():
            need = recipe_memory(recipe, launch, device_type).total
            if need <= limit:
                found.append(f"{words} ({need / 2**30:.1f} GiB)")
                break
    return found
