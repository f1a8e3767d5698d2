"""`flipscale pretrain --dry_run`: the memory and time of a recipe, computed without data, GPUs or other processes."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from flipscale.engines.launch import PRECISION, Launch, launch_of, read_launch_file
from flipscale.io.errors import UserError
from flipscale.io.options import Count, Parser, Positive, ShareAboveZero, number
from flipscale.io.text_table import plain_table
from flipscale.planning.memory import (
    GPUS_OF_A_NODE,
    USABLE,
    Memory,
    heaviest_step,
    planned_model,
    recipe_memory,
    what_fits,
)
from flipscale.planning.time import USUAL_SHARE, Hardware, Links, share_of_peak, step_time
from flipscale.training.recipe import Recipe, parse_recipe
from flipscale.training.schedule import plan_stages

_TIME_HEAD = (
    *("processes", "pairs each", "compute ms", "exposed ms", "optimizer ms", "step ms", "pairs/s", "MFU"),
    *("workers a node", "MB/s a node", "bottleneck"),
)


def dry_run(arguments: Sequence[str]) -> None:
    """Print parameters, bytes of each process and the time of a step under launch files. Other options are those of
    `flipscale pretrain`.

    Raises:
        UserError: a recipe or launch file cannot be run, or no launch fits the stated memory.
    """
    args, rest = _parser().parse_known_args(arguments)
    peak = args.peak_tflops * 1e12
    hardware = Hardware(
        links=Links(args.node_gb_s, args.network_gb_s),
        peak=peak,
        matmul_share=share_of_peak("--matmul_share", args.matmul_share, args.bench, peak),
        images_per_worker_s=args.images_per_worker_s,
        pair_kb=args.pair_kb,
    )
    recipe = parse_recipe(rest)
    by_file = _launches(args)
    several = any(len(sizes) > 1 for sizes in by_file.values())
    launches = {
        f"{name} {launch.num_processes}" if several else name: launch
        for name, sizes in by_file.items()
        for launch in sizes
    }
    heading = _heading(recipe, launches)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    limit = args.gpu_memory_gib
    if limit is None and torch.cuda.is_available():
        limit = torch.cuda.get_device_properties(0).total_memory / 2**30
    needs = {name: recipe_memory(recipe, launch) for name, launch in launches.items()}
    print(heading)
    print(_memory_table(needs, limit))
    print(_time_tables(recipe, by_file, hardware))
    if limit is not None and not any(memory.fits(limit) for memory in needs.values()):
        name = min(needs, key=lambda name: needs[name].total)
        fits = what_fits(recipe, launches[name], int(USABLE * limit * 2**30))
        fix = f"what would fit: {', or '.join(fits)}" if fits else "no known change would fit: use larger GPUs"
        raise UserError(
            f"{name} needs {needs[name].total / 2**30:.1f} GiB of each process, but only {USABLE * limit:.1f} of a "
            f"GPU's {limit:.0f} GiB are usable; {fix}"
        )


def _parser() -> argparse.ArgumentParser:
    links, hardware = Links(), Hardware()
    parser = Parser(
        prog="flipscale pretrain --dry_run", description=__doc__, allow_abbrev=False,
        epilog="All other options are those of `flipscale pretrain`, such as --config RECIPE.",
    )  # fmt: skip
    add = parser.add_argument
    add("--dry_run", action="store_true", required=True, help="Compute memory and time instead of training.")
    add(
        "--launch_file", type=Path, nargs="+", default=[], metavar="FILE",
        help="accelerate's launch files, such as ds_configs/fsdp2.yaml. Default: how this process was launched.",
    )  # fmt: skip
    add(
        "--num_processes", type=_counts, default=[], metavar="N[,N...]",
        help="Number of processes instead of the launch file's. Several numbers show how the run scales.",
    )  # fmt: skip
    add(
        "--matmul_share", type=number(ShareAboveZero),
        help=f"Fraction of the peak that a step reaches on one GPU without communication. Default: {USUAL_SHARE}.",
    )  # fmt: skip
    add(
        "--bench", type=Path, metavar="FILE",
        help="JSON line of `flipscale bench step --json` on such a GPU, instead of --matmul_share.",
    )  # fmt: skip
    sizes = {
        "peak_tflops": (hardware.peak / 1e12, "bf16 peak of a GPU in Tflop/s", " (H100)"),
        "node_gb_s": (links.node_gb_s, "GB/s per GPU within a node", " (NVLink of an H100)"),
        "network_gb_s": (links.network_gb_s, "GB/s per GPU between nodes", " (one 400 Gb/s adapter per GPU)"),
        "images_per_worker_s": (
            *(hardware.images_per_worker_s, "Images per second of a loader's worker"),
            ", as measured by `python benchmarks/data.py --alone`",
        ),
        "pair_kb": (hardware.pair_kb, "kB per pair in the shards", ""),
    }
    for name, (default, words, source) in sizes.items():
        add(f"--{name}", type=number(Positive), default=default, help=f"{words}. Default: {default:g}{source}.")
    add(
        "--gpu_memory_gib", type=number(Positive), metavar="GIB",
        help="Memory of a GPU. If no launch fits, the command fails and lists settings that would. Default: the memory "
        "of this machine's GPU.",
    )  # fmt: skip
    return parser


def _counts(text: str) -> list[int]:
    return [number(Count)(part) for part in text.split(",")]


def _launches(args: argparse.Namespace) -> dict[str, list[Launch]]:
    """Return the launches of each file, or of this process's environment, at each number of processes."""
    if args.launch_file:
        counts = args.num_processes or [None]
        return {file.stem: [read_launch_file(file, count) for count in counts] for file in args.launch_file}
    # bf16, because the planned GPUs train so without a launch file, whatever this machine does.
    launch = launch_of({PRECISION: "bf16", **os.environ})
    counts = args.num_processes or [launch.num_processes]
    return {launch.engine: [launch.using(num_processes=count) for count in counts]}


def _heading(recipe: Recipe, launches: dict[str, Launch]) -> str:
    model = planned_model(recipe.model_config(), recipe.objective().exported_class)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    vision, text = (
        sum(size for name, size in sizes.items() if name.startswith(tower)) for tower in ("vision_", "text_")
    )
    batch = recipe.data.global_batch_size
    stages = plan_stages(recipe.stages, batch, recipe.budget_minutes)
    length = f"{stages[-1].last:,}" if recipe.budget_minutes is None else f"{recipe.budget_minutes:g} minutes of"
    lines = [
        f"{recipe.model.size}: {sum(sizes.values()):,} parameters; image tower {vision:,}, text tower {text:,}",
        f"{length} steps of {batch:,} pairs"
        + (", activations recomputed" if recipe.model.gradient_checkpointing else ""),
    ]
    for name, launch in launches.items():
        step = heaviest_step(recipe, launch)
        lines.append(
            f"{name}: {launch.num_processes} processes of {batch // launch.num_processes} pairs, "
            f"{step.batch_size} at once, {'bf16' if launch.bf16 else 'fp32'}, "
            f"at most {1 - step.mask_ratio:.0%} of the patches"
            + ("" if step.image_size is None else f" of {step.image_size} x {step.image_size} pixels")
        )
    return "\n".join(lines)


def _memory_table(needs: dict[str, Memory], limit: float | None) -> str:
    """Return GiB by kind, a column for each launch."""
    rows = [["GiB of each process", *needs]]
    for name in [*(field.name for field in dataclasses.fields(Memory)), "total"]:
        rows.append([name, *(f"{getattr(memory, name) / 2**30:.2f}" for memory in needs.values())])
    if limit is not None:
        rows.append([f"fits {limit:.0f} GiB", *("yes" if memory.fits(limit) else "no" for memory in needs.values())])
    return "\n" + plain_table(rows, range(1, len(rows[0])))


def _time_tables(recipe: Recipe, launches: dict[str, list[Launch]], hardware: Hardware) -> str:
    """Return the assumptions, and a table for each stage and launch file with a row for each number of processes."""
    links = hardware.links
    lines = [
        "",
        f"time, at {hardware.matmul_share:.0%} of {hardware.peak / 1e12:,.0f} Tflop/s, {links.node_gb_s:g} GB/s a GPU "
        f"within a node of {GPUS_OF_A_NODE}, {links.network_gb_s:g} between nodes, "
        f"{hardware.images_per_worker_s:g} images/s a worker, {hardware.pair_kb:g} KB a pair:",
    ]
    plan = plan_stages(recipe.stages, recipe.data.global_batch_size, recipe.budget_minutes)
    for name, sizes in launches.items():
        hours = dict.fromkeys((launch.num_processes for launch in sizes), 0.0)
        for stage, planned in zip(recipe.stages, plan, strict=True):
            rows: list[tuple[str, ...]] = [_TIME_HEAD]
            for launch in sizes:
                step = step_time(recipe, launch, stage, hardware)
                hours[launch.num_processes] += step.seconds * (planned.last - planned.first) / 3600
                milliseconds = (1e3 * step.compute, 1e3 * step.exposed, 1e3 * step.optimizer, 1e3 * step.seconds)
                cells = [f"{launch.num_processes:,}", f"{step.pairs:,}", *(f"{ms:,.1f}" for ms in milliseconds)]
                cells += [f"{step.batch / step.seconds:,.0f}", f"{step.mfu:.0%}", f"{step.workers:.1f}"]
                rows.append((*cells, f"{step.node_mb_s:,.0f}", step.bottleneck))
            size = "" if stage.image_size is None else f" of {stage.image_size} x {stage.image_size} pixels"
            table = plain_table(rows, range(len(_TIME_HEAD) - 1))
            lines += ["", f"{name}, {stage.name} ({stage.mask_ratio:.0%} masked{size}):", table]
        if recipe.budget_minutes is None:
            run = ", ".join(f"{value:,.0f} h on {count}" for count, value in hours.items())
            lines += ["", f"{name}, the whole run: {run}"]
    return "\n".join(lines)
