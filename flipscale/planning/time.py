"""The time of a step, computed without a machine: compute from operations, messages from an alpha-beta model.

docs/planning.md has the model, the sources of its numbers, and its limits.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flipscale.data.loader import pairs_of_a_process
from flipscale.engines.build_engine import engine_class
from flipscale.engines.device import GPUS, Gpu
from flipscale.engines.fsdp2 import Fsdp2Engine
from flipscale.engines.launch import Launch
from flipscale.engines.optimizers import encoder_blocks, muon_matrices, num_trained
from flipscale.engines.zero import ZeroEngine
from flipscale.io.cores import workers_of
from flipscale.io.errors import UserError
from flipscale.objectives.build_objective import build_config, build_objective
from flipscale.planning.flops import stage_flops
from flipscale.planning.memory import GPUS_OF_A_NODE, trained_model
from flipscale.recipe.optim import StageRecipe
from flipscale.recipe.recipe import Recipe
from flipscale.start.setup import compiles

# Default share of an H100's bf16 peak by the width of the image tower, for 50 to 75 % masked images: wide products fill
# a GPU better. Computed from the tiles of a layer's products on 132 processors, and not measured.
_SHARES = {768: 0.28, 1024: 0.34, 1280: 0.38}
# Share of the peak during the products alone. The rest of the time reads and writes the GPU's memory.
_PRODUCT_SHARE = 0.65
# Share of the TF32 peak, half of bf16's, that the loss's Triton products are assumed to reach; `flipscale bench gpu`
# measures it.
_TF32_SHARE = 0.4
# Share of the fp32 peak that large products reach.
_FP32_SHARE = 0.77
# Images per second of a loader's worker by the side of the training image in pixels, measured on a Xeon: JPEGs of
# 500x400, of which small sides are decoded at a half or a quarter (`benchmarks/data.py --alone`).
_DECODED = {64: 1744.0, 128: 1365.0, 224: 897.0}
# Bytes of DistributedDataParallel's buckets.
_BUCKET = 25 * 2**20
# Seconds of a ring's hop within a node and between nodes: the LL128 protocol in NCCL's model (src/graph/tuning.cc).
_NODE_HOP, _NETWORK_HOP = 1.9e-6, 4.0e-6
# Operations that the host queues in a step: a block's two passes, uncompiled and compiled, and all else.
# tests/simulated counts them. Compiled ones are kernels of Triton, matrix products and attention of L/16, without the
# guards and wrappers of a pass.
CALLS, COMPILED_CALLS, _OTHER_CALLS = (74, 98), (23, 35), 455
# Those that gather a block's weights once more, where FSDP2 drops them after a pass.
_GATHER_CALLS = 21
# Seconds that the host spends on a unit of FSDP2 before its forward pass (pytorch/pytorch#173680).
_UNIT_SECONDS = 1e-3


def bench_figures(bench: Path) -> dict[str, Any]:
    """Return the figures of a `--bench` file: `planning` of `flipscale bench gpu`'s gpu.json.

    They are `step_flops_per_s`, useful operations of whole steps on one GPU by `speed_key`, and `call_s`, `node_gb_s`
    and `images_per_worker_s`, each perhaps None.
    """
    try:
        figures = json.loads(bench.read_text(encoding="utf-8"))["planning"]
        return {**figures, "step_flops_per_s": dict(figures["step_flops_per_s"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--bench {bench} is not a gpu.json of `flipscale bench gpu` ({error!r}); write one") from error


def speed_key(recipe: Recipe) -> str:
    """Return the key of a recipe in `step_flops_per_s`: its model size, and whether its blocks are compiled."""
    return f"{recipe.model.size}{' compiled' * (recipe.model.compile is not False)}"


def usual_share(recipe: Recipe, gpu: Gpu) -> float:
    """Return the default share of a GPU's peak for the width of a recipe's image tower. A GPU with a slower memory for
    its peak than an H100 reaches less."""
    width, h100 = build_config(recipe).vision_config.hidden_size, GPUS["H100"]
    share = float(np.interp(width, [*_SHARES], [*_SHARES.values()]))
    in_memory = (1 / share - 1 / _PRODUCT_SHARE) * (h100.memory_gb_s / h100.teraflops) * gpu.teraflops / gpu.memory_gb_s
    return round(1 / (1 / _PRODUCT_SHARE + in_memory), 2)


def matmul_share(option: str, stated: float | None, bench: Path | None, gpu: Gpu, recipe: Recipe) -> float:
    """Return the reached share of a GPU's peak: stated, measured, or the usual share.

    Args:
        option: name of the option for `stated`.
        bench: file of `bench_figures`. For a step that was not measured, the mean of the others counts.
    """
    peak = 1e12 * gpu.teraflops
    if bench is None:
        return usual_share(recipe, gpu) if stated is None else stated
    if stated is not None:
        raise UserError(f"{option} and --bench both give the share of a GPU's peak; leave one of them out")
    speeds = bench_figures(bench)["step_flops_per_s"]
    flops = speeds.get(speed_key(recipe)) or sum(speeds.values()) / max(len(speeds), 1)
    if not 0.0 < flops <= peak:
        raise UserError(
            f"--bench {bench} has {flops / 1e12:,.1f} Tflop/s, and the GPU's peak is {peak / 1e12:,.0f}; measure it on "
            "a GPU of this kind"
        )
    return flops / peak


@dataclass(frozen=True)
class Links:
    """Bandwidths between GPUs in GB/s per GPU and direction.

    Args:
        node_gb_s: bandwidth within a node.
        network_gb_s: bandwidth between nodes.
    """

    node_gb_s: float = GPUS["H100"].node_gb_s
    network_gb_s: float = GPUS["H100"].network_gb_s

    def group(self, size: int, stride: int = 1) -> "Group":
        """Return a group of `size` processes: every `stride`-th process."""
        of_a_node = max(1, min(size, GPUS_OF_A_NODE // stride))
        nodes = -(-size // of_a_node)
        # The adapters of a node add up, because a ring crosses the node once for each adapter.
        bandwidth = self.node_gb_s if nodes == 1 else of_a_node * self.network_gb_s
        if of_a_node > 1:
            bandwidth = min(bandwidth, self.node_gb_s)
        return Group(size, of_a_node, nodes, 1e9 * bandwidth)


@dataclass(frozen=True)
class Group:
    """Processes that exchange messages, and their bandwidth in bytes per second and process."""

    size: int
    of_a_node: int
    nodes: int
    bandwidth: float

    def gather(self, size: int) -> float:
        """Return the seconds of an all-gather or a reduce-scatter of `size` bytes in total, around a ring."""
        crossings = self.nodes - 1
        hops = (self.size - 1 - crossings) * _NODE_HOP + crossings * _NETWORK_HOP
        return hops + size * (self.size - 1) / self.size / self.bandwidth

    def reduce(self, size: int) -> float:
        """Return the seconds of an all-reduce of `size` bytes along trees: twice the bytes of a gather."""
        hops = (self.of_a_node - 1) * _NODE_HOP + math.ceil(math.log2(self.nodes)) * _NETWORK_HOP
        return 2 * hops + 2 * size * (self.size - 1) / self.size / self.bandwidth


@dataclass(frozen=True)
class Hardware:
    """GPUs, by default H100 SXM, their links and their loaders.

    Args:
        peak, fp32_peak: bf16 and fp32 operations per second of a GPU.
        memory_gb_s: GB/s that the optimiser and the loss read and write.
        processors: multiprocessors of a GPU, which small matrix products do not fill.
        matmul_share: share of the peak that matrix products reach on a GPU alone.
        node_cores: cores of a node, as in the Slurm scripts; they decide the workers of a recipe that states none.
        images_per_worker_s: images per second of a loader's worker; by default those of JPEGs of 500x400.
        pair_kb: size of a pair on disk or network in kB.
        storage_gb_s: GB/s that the storage gives to all nodes together; None if it is no limit.
        call_s: seconds in which the host queues a torch operation; an assumption.
    """

    links: Links = field(default_factory=Links)
    peak: float = 1e12 * GPUS["H100"].teraflops
    fp32_peak: float = 1e12 * GPUS["H100"].fp32_teraflops
    memory_gb_s: float = GPUS["H100"].memory_gb_s
    processors: int = GPUS["H100"].processors
    matmul_share: float = _SHARES[1280]
    node_cores: int = 96
    images_per_worker_s: float | None = None
    pair_kb: float = 40.0
    storage_gb_s: float | None = None
    call_s: float = 2.2e-6

    def decoded(self, pixels: int) -> float:
        """Return the images per second of a loader's worker for training images of `pixels` x `pixels`."""
        if self.images_per_worker_s is not None:
            return self.images_per_worker_s
        rate = float(np.interp(pixels, [*_DECODED], [*_DECODED.values()]))
        return rate * min(1.0, (max(_DECODED) / pixels) ** 2)

    def workers(self, recipe: Recipe, launch: Launch) -> int:
        stated = recipe.data.num_workers
        return workers_of(self.node_cores, min(launch.num_processes, GPUS_OF_A_NODE)) if stated is None else stated

    def measured(self, figures: Mapping[str, Any]) -> "Hardware":
        """Return a copy with the links, loaders and host of `bench_figures`, as far as they were measured."""
        node_gb_s = figures.get("node_gb_s") or self.links.node_gb_s
        own = {name: figures.get(name) or getattr(self, name) for name in ("images_per_worker_s", "call_s")}
        return replace(self, links=replace(self.links, node_gb_s=node_gb_s), **own)


class UnknownHardware(UserError):
    """A GPU or its links are unknown, so no times can be computed."""


def hardware_of(
    name: str | None, count: int, node_gb_s: float | None = None, network_gb_s: float | None = None
) -> Hardware:
    """Return the hardware of a run on `count` GPUs, whose `name` is in `GPUS`, with the stated links. Raise
    UnknownHardware if the GPU or its links are unknown."""
    if name is None:
        raise UnknownHardware(
            "no times are computed, because the GPU is unknown; name it with --gpu, such as --gpu h100"
        )
    gpu = GPUS[name]
    links = Links(node_gb_s or gpu.node_gb_s, network_gb_s or gpu.network_gb_s)
    for option, has_link, needed_above in (
        ("node_gb_s", links.node_gb_s, 1),
        ("network_gb_s", links.network_gb_s, GPUS_OF_A_NODE),
    ):
        if count > needed_above and not has_link:
            raise UnknownHardware(
                f"no times are computed, because the links of {count:,} {name} are unknown; "
                f"`flipscale plan` and `pretrain --dry_run` take them as --{option}"
            )
    return Hardware(links, 1e12 * gpu.teraflops, 1e12 * gpu.fp32_teraflops, gpu.memory_gb_s, gpu.processors)


def planned_hardware(
    recipe: Recipe,
    gpu: str | None,
    count: int,
    option: str,
    share: float | None,
    bench: Path | None,
    node_gb_s: float | None = None,
    network_gb_s: float | None = None,
) -> Hardware:
    """Return the stated figures, else those of the file `bench`, else those of the GPU. Arguments and errors are those
    of `matmul_share` and `hardware_of`."""
    share = matmul_share(option, share, bench, GPUS[gpu or "H100"], recipe)
    figures = {} if bench is None else bench_figures(bench)
    figures["node_gb_s"] = node_gb_s or figures.get("node_gb_s")
    return replace(hardware_of(gpu, count, figures["node_gb_s"], network_gb_s), matmul_share=share).measured(figures)


@dataclass(frozen=True)
class Messages:
    """Seconds of a step's messages.

    Args:
        forward, backward: messages behind a forward pass, and behind the last backward pass.
        again: messages behind the backward pass of an earlier micro-batch.
        first, last: messages before the first block can compute, and after the last gradient is ready.
        between: messages of the loss and the optimiser, during which nothing computes.
    """

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0
    first: float = 0.0
    last: float = 0.0
    between: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """The seconds of a step, and figures that follow from them.

    Args:
        pairs, batch: pairs of a process, and of the global batch.
        compute, exposed: seconds of the model's matrix products, and of messages that no computation hides.
        loss: seconds of the loss over the global batch.
        optimizer: seconds of reading and writing weights, gradients and moments.
        host: seconds in which the host queues the step's operations, beside the GPU's work.
        seconds: the sum of the first four, or the seconds of the loader, the storage or the host if they are more.
        mfu: the model's useful operations as a share of the peak, without recomputation.
        workers, node_mb_s: loader workers that a node needs to keep up, and MB per second that it reads.
    """

    pairs: int
    batch: int
    compute: float
    loss: float
    exposed: float
    optimizer: float
    host: float
    seconds: float
    mfu: float
    workers: float
    node_mb_s: float
    bottleneck: str


def step_time(recipe: Recipe, launch: Launch, stage: StageRecipe, hardware: Hardware) -> StepTime:
    batch, count = recipe.data.global_batch_size, launch.num_processes
    pairs = pairs_of_a_process(batch, count)
    at_once = min(pairs, recipe.data.micro_batch_size or pairs)
    flops = stage_flops(recipe)[stage.name]
    micro_batches, useful = pairs // at_once, flops.training
    # Recomputation adds a forward pass to the backward pass. A coupled loss embeds micro-batches twice.
    forward, backward = (n * at_once / (hardware.peak * hardware.matmul_share) for n in (flops.forward, flops.backward))
    backward += forward if recipe.recomputes(stage) else 0.0
    passes = (2 if micro_batches > 1 and build_objective(recipe).needs_global_batch else 1) * micro_batches
    compute = passes * forward + micro_batches * backward
    sent = messages(recipe, launch, stage, hardware.links)
    exposed = (
        passes * (sent.first + max(0.0, sent.forward - forward))
        + (micro_batches - 1) * max(0.0, sent.again - backward)
        + max(0.0, sent.backward - backward)
        + sent.last
        + sent.between
    )
    kept = engine_class(launch).memory(trained_model(recipe, stage), launch)
    # AdamW reads weights, gradients and two moments, and writes all but the gradients.
    optimizer = 4 * 7 * sum(kept.moments.values()) / (1e9 * hardware.memory_gb_s)
    config, decodes = build_config(recipe), "images" not in recipe.data.stored
    workers, decoded = (
        hardware.workers(recipe, launch),
        hardware.decoded(stage.image_size or config.vision_config.image_size),
    )
    loader = pairs / (workers * decoded) if workers and decodes else 0.0
    # Stored features are rows in fp16.
    pair_kb = (
        hardware.pair_kb if decodes else 2 * (config.vision_config.hidden_size + config.text_config.hidden_size) / 1e3
    )
    storage = batch * pair_kb / (1e6 * hardware.storage_gb_s) if hardware.storage_gb_s else 0.0
    loss = loss_seconds(recipe, launch, pairs, hardware)
    busy = compute + loss + exposed + optimizer
    host = hardware.call_s * host_calls(recipe, launch, stage, passes, micro_batches)
    if issubclass(engine_class(launch), Fsdp2Engine) and count > 1:
        model = trained_model(recipe)
        host += _UNIT_SECONDS * (len(encoder_blocks(model)) + len(list(model.children())) + 1) * passes
    rate = pairs / max(busy, host) * min(count, GPUS_OF_A_NODE)
    vision = config.vision_config
    rows = at_once * max(1, round(vision.patches_along(stage.image_size) ** 2 * (1.0 - stage.mask_ratio)))
    if storage > max(busy, host, loader):
        bottleneck = "storage"
    elif loader > max(busy, host):
        bottleneck = "loader"
    elif host > busy:
        bottleneck = "host"
    elif loss > compute / 2:
        bottleneck = "loss"
    elif exposed + optimizer > compute / 4:
        bottleneck = "node links" if count <= GPUS_OF_A_NODE else "network"
    # With fewer than four tiles of 128 x 256 for each of a GPU's processors, some are idle.
    elif rows * vision.hidden_size < 4 * hardware.processors * 128 * 256:
        bottleneck = "small batch"
    else:
        bottleneck = "compute"
    seconds = max(busy, loader, storage, host)
    mfu = useful * pairs / seconds / hardware.peak
    eaten = rate / decoded if decodes else 0.0, rate * pair_kb / 1e3
    return StepTime(pairs, batch, compute, loss, exposed, optimizer, host, seconds, mfu, *eaten, bottleneck)


def loss_seconds(recipe: Recipe, launch: Launch, pairs: int, hardware: Hardware) -> float:
    """Return the seconds of the loss of one process's `pairs` against the global batch, on a GPU with Triton.

    Each logit takes 2 operations for each number of an embedding, in each product:

    | | logits | gradients of both sides | reads and writes of a logit |
    |---|---|---|---|
    | infonce | 2 products of 3 TF32 products each, in Triton | 2 | 3 |
    | sigmoid | 1 product of 3 TF32 products, in Triton | 2 | 3 |
    | each teacher of infonce | as infonce, at the teacher's width | 2 | 3 |

    Products of gradients are in TF32 if the launch trains in bf16, else in fp32.
    """
    if not build_objective(recipe).needs_global_batch:
        return 0.0
    views = max(recipe.mask.views, recipe.loss.captions_per_image)
    logits, dim = views * pairs * recipe.data.global_batch_size, int(build_config(recipe).projection_dim or 0)
    exact = 1 if recipe.loss.kind == "sigmoid" else 2
    teachers = len(recipe.data.teachers)
    tf32 = hardware.peak / 2
    of_gradients = tf32 * _PRODUCT_SHARE if launch.bf16 else hardware.fp32_peak * _FP32_SHARE
    products = 2 * logits * dim * (3 * exact / (tf32 * _TF32_SHARE) + 2 / of_gradients)
    moved = 3 * 4 * logits / (1e9 * hardware.memory_gb_s)
    return (1 + teachers) * (products + moved)


def host_calls(recipe: Recipe, launch: Launch, stage: StageRecipe, passes: int, micro_batches: int) -> int:
    """Return the operations that the host queues in a step of `passes` forward and `micro_batches` backward passes."""
    blocks = len(encoder_blocks(trained_model(recipe)))
    again = micro_batches if recipe.recomputes(stage) else 0
    forward, backward = COMPILED_CALLS if compiles(recipe, launch) else CALLS
    calls = forward * (passes + again) + backward * micro_batches
    if issubclass(engine_class(launch), Fsdp2Engine) and launch.num_processes > 1 and launch.reshard_after_forward:
        calls += _GATHER_CALLS * (passes + micro_batches)
    return _OTHER_CALLS + blocks * calls


def messages(recipe: Recipe, launch: Launch, stage: StageRecipe, links: Links) -> Messages:
    """Return the seconds of the messages of the engine, the loss and Muon in a step."""
    count = launch.num_processes
    if count == 1:
        return Messages()
    objective = build_objective(recipe)
    model = trained_model(recipe, stage)
    world, engine = links.group(count), engine_class(launch)
    # The texts and their gradients. The loss's other messages are a thousandth of these.
    dim = int(build_config(recipe).projection_dim or 0) if objective.needs_global_batch else 0
    texts = 4 * recipe.data.global_batch_size * dim
    between = 2 * world.gather(texts)
    if recipe.optim.name == "muon":
        matrices = muon_matrices(model)
        size = 2 * sum(p.numel() for name, p in model.named_parameters() if name in matrices)
        # Under FSDP2, rows travel to the computing process and back. Otherwise whole matrices are gathered in a node.
        if issubclass(engine, Fsdp2Engine):
            between += 2 * links.group(launch.shard_size or count).gather(size)
        else:
            between += links.group(launch.neighbours).gather(size)
    if issubclass(engine, Fsdp2Engine) or launch.engine == "zero3":
        modules = [*encoder_blocks(model), model]
        sizes = [(sum(p.numel() for p in module.parameters()), num_trained(module)) for module in modules]
        rest = tuple(2 * whole - sum(of) for whole, of in zip(sizes[-1], zip(*sizes, strict=True), strict=True))
        width = 2 if launch.bf16 and issubclass(engine, Fsdp2Engine) else 4
        return _sharded([*sizes[:-1], rest], width, launch, links, between)
    size = 4 * num_trained(model)
    if issubclass(engine, ZeroEngine):
        settings = launch.deepspeed.get("zero_optimization", {})
        reduced = world.gather(size)
        hidden = reduced if settings.get("overlap_comm") else 0.0
        # The updated weights are gathered after the optimiser step.
        return Messages(backward=hidden, last=reduced - hidden, between=between + world.gather(size))
    buckets = -(-size // _BUCKET)
    last = world.reduce(size // buckets)
    return Messages(backward=(buckets - 1) * last, last=last, between=between)


def _sharded(groups: list[tuple[int, ...]], width: int, launch: Launch, links: Links, between: float) -> Messages:
    """Return the seconds of sharded weights, given the weights and the trained weights of each group. A group is
    gathered before its use in both passes, and its gradients are sent behind the last backward pass."""
    reduced = 2 if launch.reduce_in_bf16 else 4
    shard_size = launch.shard_size or launch.num_processes
    shards, replicas = links.group(shard_size), launch.num_processes // shard_size
    gathers = [shards.gather(width * whole) for whole, _ in groups]
    scatters = [shards.gather(reduced * trained) if trained else 0.0 for _, trained in groups]
    copies = links.group(replicas, stride=shard_size)
    reduces = [copies.reduce(reduced * trained // shard_size) if trained else 0.0 for _, trained in groups]
    again = sum(gathers) if launch.reshard_after_forward else 0.0
    return Messages(
        forward=sum(gathers) - gathers[0],
        backward=again + sum(scatters[:-1]) + sum(reduces[:-1]),
        again=again,
        first=gathers[0],
        last=scatters[-1] + reduces[-1],
        between=between,
    )
