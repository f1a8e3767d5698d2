"""`flipscale pretrain --dry_run`: the memory and time of a recipe, computed without data, GPUs or other processes."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from flipscale.engines.device import GPUS, gpu_here, gpu_named
from flipscale.engines.launch import PRECISION, Launch, launch_of, read_launch_file
from flipscale.io.command_line import parse_known, reader_of
from flipscale.io.errors import UserError
from flipscale.io.options import Count, Positive, ShareAboveZero
from flipscale.io.text_table import hours_text, plain_table, rounded
from flipscale.objectives.build_objective import build_config, build_objective
from flipscale.planning.budget import with_time_shares
from flipscale.planning.memory import (
    GPUS_OF_A_NODE,
    USABLE,
    MemoryPlan,
    checkpoint_bytes,
    fitting_changes,
    heaviest_step,
    host_bytes,
    planned_model,
    recipe_memory,
)
from flipscale.planning.time import Hardware, StepTime, UnknownHardware, planned_hardware, step_time
from flipscale.process.world import whole_number
from flipscale.recipe.recipe import Recipe
from flipscale.recipe.schedule import schedule_stages
from flipscale.start.complete_recipe import parse_recipe

_MOST_COLUMNS = 6  # of a terminal with 100 columns
_SAME_TIME = 1.02  # of two computed times
_STEP_ROWS: dict[str, Callable[[StepTime], str]] = {
    "  step, ms": lambda step: f"{1e3 * step.seconds:,.1f}",
    "    computing": lambda step: f"{1e3 * step.compute:,.1f}",
    "    the loss": lambda step: f"{1e3 * step.loss:,.1f}",
    "    awaiting messages": lambda step: f"{1e3 * step.exposed:,.1f}",
    "    updating weights": lambda step: f"{1e3 * step.optimizer:,.1f}",
    "  host, ms": lambda step: f"{1e3 * step.host:,.1f}",
    "  pairs/s": lambda step: f"{step.batch / step.seconds:,.0f}",
    "  MFU": lambda step: f"{step.mfu:.0%}",
    "  loader workers a node": lambda step: f"{step.workers:.1f}",
    "  MB/s read by a node": lambda step: f"{step.node_mb_s:,.0f}",
    "  bottleneck": lambda step: step.bottleneck,
}


def _counts(text: str) -> list[int]:
    return [reader_of(Count)(part) for part in text.split(",")]


# A flag of one word, such as 8,64.
_COUNTS = {"action": "store", "nargs": None, "type": _counts}


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Compute the memory and time of a recipe, without data, GPUs or other processes. All other options are those of
    `flipscale pretrain`, such as --config RECIPE.

    Args:
        dry_run: Compute memory and time instead of training.
        launch_file: accelerate's launch files, such as ds_configs/fsdp2.yaml. Default: how this process was launched.
        num_processes: Number of processes instead of the launch file's. Several numbers, such as 8,64, show how the run
            scales.
        matmul_share: Fraction of the peak that a step reaches on one GPU without communication. Default: by the width
            of the image tower and the GPU's memory, such as 0.38 for H/14 on an H100.
        bench: The gpu.json of `flipscale bench gpu` on such GPUs, with speed, links, host and loaders. Replaces
            --matmul_share.
        gpu: The kind of GPU, such as h100 or rtx_4090. Default: this machine's GPU. Without a known one, only memory is
            computed.
        node_gb_s: GB/s per GPU within a node. Default: by the kind, such as 350 (NVLink of an H100).
        network_gb_s: GB/s per GPU between nodes. Default: by the kind, such as 46 (H100, a 400 Gb/s adapter per GPU).
        node_cores: Cores of a node.
        images_per_worker_s: Images per second of a loader's worker. Default: by the stage's image size, such as 897 at
            224 px and 1,744 at 64 px (JPEGs of 500x400). `python benchmarks/data.py --alone` measures it.
        pair_kb: kB per pair in the shards.
        storage_gb_s: GB/s that the storage gives to all nodes together. Default: no limit.
        gpu_memory_gib: Memory of a GPU. If no launch fits, the command fails and lists settings that would. Default:
            the memory of --gpu, or of this machine's GPU.
    """

    dry_run: bool
    launch_file: list[Path] = dataclasses.field(default_factory=list)
    num_processes: list[Count] = dataclasses.field(default_factory=list, metadata=_COUNTS)
    matmul_share: ShareAboveZero | None = None
    bench: Path | None = None
    gpu: str | None = None
    node_gb_s: Positive | None = None
    network_gb_s: Positive | None = None
    node_cores: Positive = Hardware.node_cores
    images_per_worker_s: Positive | None = None
    pair_kb: Positive = Hardware.pair_kb
    storage_gb_s: Positive | None = None
    gpu_memory_gib: Positive | None = None


class _Planned(NamedTuple):
    """The computed needs of a launch. `seconds` is the time of all steps, or of a mean step if a run has a budget. On
    unknown GPUs, there are no steps, and no hours unless the run has a budget."""

    name: str
    launch: Launch
    memory: MemoryPlan
    host_bytes: int
    steps: Sequence[StepTime]
    seconds: float
    hours: float | None


def dry_run(arguments: Sequence[str], check: Callable[[Recipe, Launch], None]) -> None:
    """Print memory and time with a column for each launch, and an advice. Other options are those of `flipscale
    pretrain`. Raise UserError if no launch fits the stated memory, or as `check`, a start's check of a recipe."""
    args, rest = parse_known(DryRun, arguments, "flipscale pretrain --dry_run")
    recipe = with_time_shares(parse_recipe(rest))
    launches = _launches(args)
    for _, launch in launches:
        check(recipe, launch)
    gpu, limit = args.gpu and gpu_named(args.gpu), args.gpu_memory_gib
    if gpu is not None:
        limit = limit or GPUS[gpu].gib
    elif torch.cuda.is_available():
        gpu = gpu_here(torch.device("cuda"))
        limit = limit or torch.cuda.get_device_properties(0).total_memory / 2**30
    hardware, unknown = _hardware(args, recipe, gpu, max(launch.num_processes for _, launch in launches))
    heading = f"{_heading(recipe)}\n{_on_disk(recipe, hardware)}\n{unknown or _assumed(gpu, hardware)}"
    if whole_number(os.environ, "RANK", 0) > 0:
        return
    planned = [_planned(name, launch, recipe, hardware, not unknown) for name, launch in launches]
    counts = dict.fromkeys(launch.num_processes for _, launch in launches)
    by_count = {count: [one for one in planned if one.launch.num_processes == count] for count in counts}
    print(heading)
    for columns in [planned] if len(planned) <= _MOST_COLUMNS else by_count.values():
        print(f"\n{_table(recipe, columns, limit)}")
    if limit is not None and not any(one.memory.fits(limit) for one in planned):
        least = min(planned, key=lambda one: one.memory.total)
        fits = fitting_changes(recipe, least.launch, int(USABLE * limit * 2**30))
        fix = f"what would fit: {', '.join(fits)}" if fits else "no known change would fit: use larger GPUs"
        raise UserError(
            f"{least.name} on {least.launch.num_processes} needs {least.memory.total / 2**30:.1f} GiB of each process, "
            f"but only {USABLE * limit:.1f} of a GPU's {limit:.0f} GiB are usable; {fix}"
        )
    print()
    for count, group in by_count.items():
        print(f"on {count:,} process{'es' * (count != 1)}, {_advice(group, limit)}")


def _hardware(args: DryRun, recipe: Recipe, gpu: str | None, count: int) -> tuple[Hardware, str]:
    """Return the planned hardware, and why no time follows from it."""
    speeds = ("--matmul_share", args.matmul_share, args.bench)
    try:
        hardware, unknown = planned_hardware(recipe, gpu, count, *speeds, args.node_gb_s, args.network_gb_s), ""
    except UnknownHardware as error:
        hardware, unknown = Hardware(), str(error)
    hardware = replace(
        hardware,
        images_per_worker_s=args.images_per_worker_s or hardware.images_per_worker_s,
        node_cores=round(args.node_cores),
        pair_kb=args.pair_kb,
        storage_gb_s=args.storage_gb_s,
    )
    return hardware, unknown


def _launches(args: DryRun) -> list[tuple[str, Launch]]:
    """Return the launches of each file, or of this process's environment, at each number of processes."""
    files: list[Path | None] = [*args.launch_file] or [None]
    counts: list[int | None] = [*args.num_processes] or [None]
    places = [(file, count) for file in files for count in counts]
    launches = [planned_launch(file, count) for file, count in places]
    return [(file.stem if file else one.engine, one) for (file, _), one in zip(places, launches, strict=True)]


def planned_launch(file: Path | None, num_processes: int | None, num_machines: int | None = None) -> Launch:
    """Return the launch of a file, or of this process, on other numbers of processes and machines if they are given."""
    if file is not None:
        return read_launch_file(file, num_processes, num_machines)
    # bf16, because the planned GPUs train so without a launch file, whatever this machine does.
    launch = launch_of({PRECISION: "bf16", **os.environ})
    return replace(launch, num_processes=num_processes or launch.num_processes)


def _planned(name: str, launch: Launch, recipe: Recipe, hardware: Hardware, is_timed: bool) -> _Planned:
    steps = [step_time(recipe, launch, stage, hardware) for stage in recipe.stages if is_timed]
    stages = schedule_stages(recipe.stages, recipe.data.global_batch_size, recipe.budget_minutes)
    seconds = sum((stage.last - stage.first) * step.seconds for stage, step in zip(stages, steps, strict=is_timed))
    hours = seconds / 3600 if is_timed else None
    if recipe.budget_minutes is not None:
        hours = recipe.budget_minutes / 60
    host = host_bytes(recipe, launch, hardware.workers(recipe, launch))
    return _Planned(name, launch, recipe_memory(recipe, launch), host, steps, seconds, hours)


def _heading(recipe: Recipe) -> str:
    kind, config = build_objective(recipe).exported_model(build_config(recipe))
    model = planned_model(config, kind)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    towers = ("vision_model.", "text_model.")
    vision, text = (sum(size for name, size in sizes.items() if name.startswith(tower)) for tower in towers)
    minutes, batch = recipe.budget_minutes, recipe.data.global_batch_size
    name = "towers" if recipe.model.family == "towers" else recipe.model.size
    lines = [f"{name}: {sum(sizes.values()):,} parameters; image tower {vision:,}, text tower {text:,}"]
    for stage in schedule_stages(recipe.stages, batch, minutes):
        length = stage.last - stage.first
        lines.append(
            f"{stage.name}: {f'{length:,} steps' if minutes is None else f'{length * minutes:g} minutes'} of {batch:,} "
            f"pairs, {stage.mask_ratio:.0%} masked"
            + ("" if stage.image_size is None else f", {stage.image_size} x {stage.image_size} pixels")
            + (", activations recomputed" if recipe.recomputes(stage) else "")
        )
    return "\n".join(lines)


def _on_disk(recipe: Recipe, hardware: Hardware) -> str:
    """Return the line on the space that checkpoints and shards take."""
    size, count = checkpoint_bytes(recipe), recipe.save.total_limit
    # An index has 24 bytes a sample.
    shards = f"{hardware.pair_kb:g} GB of shards and 0.024 GB of indices for a million pairs"
    return f"on disk: {size / 1e9:.2f} GB a checkpoint, at most {count} of them; {shards}"


def _assumed(gpu: str | None, hardware: Hardware) -> str:
    links = hardware.links
    return (
        f"computed, for {gpu} at {hardware.matmul_share:.0%} of {hardware.peak / 1e12:,.0f} Tflop/s, "
        + (f"{links.node_gb_s:g} GB/s a GPU within a node of {GPUS_OF_A_NODE}, " if links.node_gb_s else "")
        + (f"{links.network_gb_s:g} between nodes," if links.network_gb_s else "")
        + f"\n{hardware.node_cores} cores a node, {hardware.decoded(224):g} images/s a worker at 224 px, "
        f"{hardware.pair_kb:g} kB a pair"
    )


def _table(recipe: Recipe, planned: Sequence[_Planned], limit: float | None) -> str:
    """Return memory, time and cost, with a column for each launch."""
    blank = [""] * len(planned)
    rows = [
        ["", *(one.name for one in planned)],
        ["processes", *(f"{one.launch.num_processes:,}" for one in planned)],
        [
            "pairs each",
            *(f"{recipe.data.global_batch_size // one.launch.num_processes:,}" for one in planned),
        ],
        ["precision", *("bf16" if one.launch.bf16 else "fp32" for one in planned)],
        ["memory, GiB", *blank],
    ]
    if recipe.data.micro_batch_size is not None:
        at_once = (f"{heaviest_step(recipe, one.launch).batch_size:,}" for one in planned)
        rows.insert(3, ["  in a micro-batch", *at_once])
    for name in [*(field.name for field in dataclasses.fields(MemoryPlan)), "total"]:
        rows.append([f"  {name}", *(f"{getattr(one.memory, name) / 2**30:.2f}" for one in planned)])
    if limit is not None:
        rows.append([f"  fits {limit:.0f} GiB", *("yes" if one.memory.fits(limit) else "no" for one in planned)])
    rows.append(["  batches in a node's RAM", *(f"{one.host_bytes / 2**30:.2f}" for one in planned)])
    for at, stage in enumerate(recipe.stages if planned[0].steps else ()):
        rows.append([f"stage: {stage.name}", *blank])
        rows += [[name, *(text(one.steps[at]) for one in planned)] for name, text in _STEP_ROWS.items()]
    hours = [one.hours for one in planned if one.hours is not None]
    gpu_hours = [one.launch.num_processes * long for one, long in zip(planned, hours, strict=False)]
    if hours:
        rows.append(["whole run", *map(hours_text, hours)])
        rows.append(["  GPU-hours", *map(hours_text, gpu_hours)])
    if hours and recipe.cost.device_hour_dollars is not None:
        rows.append(["  dollars", *(rounded(recipe.cost.device_hour_dollars * hours) for hours in gpu_hours)])
    return plain_table(rows, range(1, len(rows[0])))


def _advice(planned: Sequence[_Planned], limit: float | None) -> str:
    """Return the launch to use: the one with the most memory to spare of the fastest that fit."""
    fitting = [one for one in planned if limit is None or one.memory.fits(limit)]
    if not fitting:
        return "nothing fits"
    fastest = min(one.seconds for one in fitting)
    best = min((one for one in fitting if one.seconds <= _SAME_TIME * fastest), key=lambda one: one.memory.total)
    gib = best.memory.total / 2**30
    room = f"fits in {limit:.0f} GiB with {USABLE * limit - gib:.0f} to spare" if limit else f"{gib:.1f} GiB a process"
    return f"use {best.name}: {room}" + ("" if best.hours is None else f", {hours_text(best.hours)}")
