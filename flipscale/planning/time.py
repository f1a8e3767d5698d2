"""How long a step takes on machines that are not there: compute by its operations, messages by an alpha-beta model.

docs/planning.md states the model, where its numbers come from, and what it leaves out.
"""

import math
from dataclasses import dataclass, field

from flipscale.data.loader import pairs_of_a_process
from flipscale.engines.fsdp2 import Fsdp2Engine
from flipscale.engines.launch import Launch
from flipscale.engines.optimizers import encoder_blocks, muon_matrices
from flipscale.engines.start import engine_class
from flipscale.engines.zero import ZeroEngine
from flipscale.io.errors import UserError
from flipscale.planning.flops import pair_flops
from flipscale.planning.measured import USUAL_SHARE
from flipscale.planning.memory import planned_model
from flipscale.training.recipe import Recipe
from flipscale.training.schedule import StageRecipe

# DistributedDataParallel's buckets.
_BUCKET = 25 * 2**20


@dataclass(frozen=True)
class Links:
    """What connects the GPUs; bandwidths in GB/s of one GPU in one direction, latencies in seconds a hop.

    Args:
        node_gbps: within a node. 350: what NCCL's makers count on for an H100's NVLink (NVIDIA/nccl#986).
        network_gbps: between nodes. 46: of a 400 Gb/s adapter for each GPU (NVIDIA/nccl-tests#290 says 46 to 48).
        node_latency: NCCL's own model (src/graph/tuning.cc), a ring's hop by its LL128 protocol.
        network_latency: likewise.
        gpus_of_a_node: processes of one machine.
    """

    node_gbps: float = 350.0
    network_gbps: float = 46.0
    node_latency: float = 1.9e-6
    network_latency: float = 4.0e-6
    gpus_of_a_node: int = 8

    def __post_init__(self) -> None:
        for name in ("node_gbps", "network_gbps"):
            if not getattr(self, name) > 0.0:
                raise UserError(f"{name} is {getattr(self, name):g}; it must be above 0")

    def group(self, size: int, stride: int = 1) -> "Group":
        """Return a group of `size` processes, every `stride`-th one."""
        of_a_node = max(1, min(size, self.gpus_of_a_node // stride))
        nodes = -(-size // of_a_node)
        # A ring crosses each node once for each of its adapters, so that the adapters of a node add up.
        bandwidth = self.node_gbps if nodes == 1 else of_a_node * self.network_gbps
        if of_a_node > 1:
            bandwidth = min(bandwidth, self.node_gbps)
        return Group(size, of_a_node, nodes, 1e9 * bandwidth, self)


@dataclass(frozen=True)
class Group:
    """Processes that exchange messages, and the bandwidth in bytes a second that each of them has for it."""

    size: int
    of_a_node: int
    nodes: int
    bandwidth: float
    links: Links

    def gather(self, size: int) -> float:
        """Return the seconds of an all-gather or a reduce-scatter of `size` bytes in all, around a ring."""
        crossings = self.nodes - 1
        hops = (self.size - 1 - crossings) * self.links.node_latency + crossings * self.links.network_latency
        return hops + size * (self.size - 1) / self.size / self.bandwidth

    def reduce(self, size: int) -> float:
        """Return the seconds of an all-reduce of `size` bytes: twice a gather's bytes, along trees."""
        hops = (self.of_a_node - 1) * self.links.node_latency + math.ceil(math.log2(self.nodes)) * (
            self.links.network_latency
        )
        return 2 * hops + 2 * size * (self.size - 1) / self.size / self.bandwidth


@dataclass(frozen=True)
class Hardware:
    """What computes and what feeds it.

    Args:
        links: between GPUs.
        peak: bf16 operations a second of a GPU; 989e12: H100 SXM, dense, by its data sheet.
        matmul_share: the share of the peak that products reach while a GPU only computes.
        memory_bandwidth: bytes a second, for the optimiser; 3.35e12: H100 SXM, by its data sheet.
        images_per_worker_s: what a loader's worker delivers; 827: docs/speed.md, JPEGs of 500x400.
        pair_kb: what a pair takes on disk or network.
    """

    links: Links = field(default_factory=Links)
    peak: float = 989e12
    matmul_share: float = USUAL_SHARE
    memory_bandwidth: float = 3.35e12
    images_per_worker_s: float = 827.0
    pair_kb: float = 40.0

    def __post_init__(self) -> None:
        if not 0.0 < self.matmul_share <= 1.0:
            raise UserError(f"matmul_share is {self.matmul_share:g}; it must be in (0, 1]")
        for name in ("peak", "images_per_worker_s", "pair_kb"):
            if not getattr(self, name) > 0.0:
                raise UserError(f"{name} is {getattr(self, name):g}; it must be above 0")


@dataclass(frozen=True)
class Messages:
    """Seconds of a step's messages.

    Args:
        forward: of a forward pass, hidden behind it but for `first`.
        backward: of the last backward pass, hidden behind it but for `last`.
        again: of a backward pass of an earlier micro-batch.
        first: before the first block can compute.
        last: after the last gradient is there.
        between: nothing computes meanwhile: the loss's and the optimiser's.
    """

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0
    first: float = 0.0
    last: float = 0.0
    between: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and what follows from them.

    Args:
        compute: products.
        exposed: messages that nothing hides.
        optimizer: reading and writing of weights, gradients and moments.
        seconds: of the whole step: all of these, or the loader's where it takes longer for a batch.
        mfu: useful operations of the step, without those of recomputation, as a share of the peak.
        workers: that a node needs for the step not to wait.
        node_mb_s: what a node reads.
    """

    pairs: int
    batch: int
    compute: float
    exposed: float
    optimizer: float
    seconds: float
    mfu: float
    workers: float
    node_mb_s: float
    binds: str


def step_time(recipe: Recipe, launch: Launch, stage: StageRecipe, hardware: Hardware) -> StepTime:
    """Return what a step of a stage takes.

    Raises:
        ValueError: the processes do not divide the batch.
    """
    batch, count = recipe.data.global_batch_size, launch.num_processes
    pairs = pairs_of_a_process(batch, count)
    at_once = min(pairs, recipe.data.micro_batch_size or pairs)
    micro_batches, useful = pairs // at_once, pair_flops(recipe)[stage.name]
    # A backward pass is two forward passes; recomputation repeats one, and micro-batches are embedded twice where the
    # loss compares them with each other.
    forward = useful / 3 * at_once / (hardware.peak * hardware.matmul_share)
    backward = forward * (3 if recipe.model.gradient_checkpointing else 2)
    passes = (2 if micro_batches > 1 and recipe.objective().is_coupled else 1) * micro_batches
    compute = passes * forward + micro_batches * backward
    sent = messages(recipe, launch, hardware.links)
    exposed = (
        passes * (sent.first + max(0.0, sent.forward - forward))
        + (micro_batches - 1) * max(0.0, sent.again - backward)
        + max(0.0, sent.backward - backward)
        + sent.last
        + sent.between
    )
    kept = engine_class(launch).memory(planned_model(recipe.model_config(), recipe.objective().model_class), launch)
    # AdamW reads weights, gradients and two moments, and writes all but the gradients.
    optimizer = 4 * 7 * sum(kept.moments.values()) / hardware.memory_bandwidth
    loader = pairs / (recipe.data.num_workers * hardware.images_per_worker_s) if recipe.data.num_workers else 0.0
    busy = compute + exposed + optimizer
    rate = pairs / busy * min(count, hardware.links.gpus_of_a_node)
    return StepTime(
        pairs=pairs,
        batch=batch,
        compute=compute,
        exposed=exposed,
        optimizer=optimizer,
        seconds=max(busy, loader),
        mfu=useful * pairs / max(busy, loader) / hardware.peak,
        workers=rate / hardware.images_per_worker_s,
        node_mb_s=rate * hardware.pair_kb / 1e3,
        binds=_binds(recipe, launch, stage, hardware, at_once, compute, exposed + optimizer, loader),
    )


def messages(recipe: Recipe, launch: Launch, links: Links) -> Messages:
    """Return the seconds of what the engine, the loss and Muon send in a step."""
    count = launch.num_processes
    if count == 1:
        return Messages()
    objective = recipe.objective()
    model = planned_model(recipe.model_config(), objective.model_class)
    whole = sum(parameter.numel() for parameter in model.parameters())
    world, engine = links.group(count), engine_class(launch)
    # The texts, and their gradients; what else the loss sends is a thousandth of it.
    dim = int(recipe.model_config().projection_dim or 0) if objective.is_coupled else 0
    texts = 4 * recipe.data.global_batch_size * dim
    between = 2 * world.gather(texts)
    if recipe.optim.name == "muon":
        matrices = muon_matrices(model)
        size = 2 * sum(p.numel() for name, p in model.named_parameters() if name in matrices)
        # Rows go to who computes and come back; whole matrices are gathered on each machine.
        if issubclass(engine, Fsdp2Engine):
            between += 2 * links.group(launch.shard_size or count).gather(size)
        else:
            between += links.group(launch.neighbours).gather(size)
    if issubclass(engine, Fsdp2Engine) or launch.engine == "zero3":
        blocks = [sum(p.numel() for p in block.parameters()) for block in encoder_blocks(model)]
        width = 2 if launch.bf16 and issubclass(engine, Fsdp2Engine) else 4
        return _sharded([*blocks, whole - sum(blocks)], width, launch, links, between)
    size = 4 * whole
    if issubclass(engine, ZeroEngine):
        settings = launch.deepspeed.get("zero_optimization", {})
        reduced = world.gather(size)
        hidden = reduced if settings.get("overlap_comm") else 0.0
        # The weights that each process has moved are gathered when all have.
        return Messages(backward=hidden, last=reduced - hidden, between=between + world.gather(size))
    buckets = -(-size // _BUCKET)
    last = world.reduce(size // buckets)
    return Messages(backward=(buckets - 1) * last, last=last, between=between)


def _sharded(groups: list[int], width: int, launch: Launch, links: Links, between: float) -> Messages:
    """Return what sharded weights cost: each group of them is gathered ahead of its use in both passes, and its
    gradients are sent in fp32 behind the last backward pass."""
    shard_size = launch.shard_size or launch.num_processes
    shards, replicas = links.group(shard_size), launch.num_processes // shard_size
    gathers = [shards.gather(width * size) for size in groups] if shard_size > 1 else [0.0] * len(groups)
    scatters = [shards.gather(4 * size) for size in groups] if shard_size > 1 else [0.0] * len(groups)
    within = sum(gathers) + sum(scatters)
    reduces = [0.0] * len(groups)
    if replicas > 1:
        copies = links.group(replicas, stride=shard_size)
        reduces = [copies.reduce(4 * size // shard_size) for size in groups]
    # Within a node and between nodes, messages travel at the same time.
    return Messages(
        forward=sum(gathers) - gathers[0],
        backward=max(within, sum(reduces)) - scatters[-1] - reduces[-1],
        again=sum(gathers),
        first=gathers[0],
        last=scatters[-1] + reduces[-1],
        between=between,
    )


def _binds(
    recipe: Recipe,
    launch: Launch,
    stage: StageRecipe,
    hardware: Hardware,
    at_once: int,
    compute: float,
    exposed: float,
    loader: float,
) -> str:
    """Return what a faster step would need most."""
    if loader > compute + exposed:
        return "loader"
    if exposed > compute / 4:
        shard_size = launch.shard_size or launch.num_processes
        return "node links" if max(shard_size, launch.num_processes) <= hardware.links.gpus_of_a_node else "network"
    vision = recipe.model_config().vision_config
    rows = at_once * max(1, round(vision.patches_along(stage.image_size) ** 2 * (1.0 - stage.mask_ratio)))
    # Fewer tiles of 128 x 256 than four for each of an H100's 132 processors leave some idle.
    if rows * vision.hidden_size < 4 * 132 * 128 * 256:
        return "small batch"
    return "compute"
