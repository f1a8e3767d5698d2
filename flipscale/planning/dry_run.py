"""`flipscale pretrain --dry_run`: what a recipe would need of each process, without data, GPUs or other processes."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from flipscale.engines.launch import PRECISION, Launch, launch_of, read_launch_file
from flipscale.io.errors import UserError
from flipscale.io.options import Count, Parser, Positive, number
from flipscale.planning.memory import Memory, heaviest_step, planned_model, recipe_memory, what_fits
from flipscale.planning.time_table import add_time_flags, hardware_of, time_tables
from flipscale.training.recipe import Recipe, parse_recipe
from flipscale.training.schedule import plan_stages

# The rest is CUDA's context and what the allocator cannot put together.
USABLE = 0.94


def dry_run(arguments: Sequence[str]) -> None:
    """Print parameters, bytes of each process and the time of a step under launch files; other flags are those of
    `flipscale pretrain`.

    Raises:
        ValueError: a recipe or launch file that cannot be run, or no launch that fits the memory stated.
    """
    args, rest = _parser().parse_known_args(arguments)
    hardware = hardware_of(args)
    recipe = parse_recipe(rest)
    by_file = _launches(args)
    for launch in (launch for sizes in by_file.values() for launch in sizes):
        heaviest_step(recipe, launch, "cuda")
    several = any(len(sizes) > 1 for sizes in by_file.values())
    launches = {
        f"{name} {launch.num_processes}" if several else name: launch
        for name, sizes in by_file.items()
        for launch in sizes
    }
    if int(os.environ.get("RANK", "0")) > 0:
        return
    limit = args.gpu_memory_gib
    if limit is None and torch.cuda.is_available():
        limit = torch.cuda.get_device_properties(0).total_memory / 2**30
    needs = {name: recipe_memory(recipe, launch) for name, launch in launches.items()}
    print(_heading(recipe, launches))
    print(_table(needs, limit))
    print(time_tables(recipe, by_file, hardware))
    if limit is not None and min(memory.total for memory in needs.values()) > USABLE * limit * 2**30:
        _refuse(recipe, launches, needs, limit)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="flipscale pretrain --dry_run", description=__doc__, allow_abbrev=False,
        epilog="All other flags are those of `flipscale pretrain`, such as --config RECIPE.",
    )  # fmt: skip
    parser.add_argument(
        "--dry_run", action="store_true", required=True, help="compute memory and time instead of training"
    )
    parser.add_argument(
        "--launch_file", type=Path, nargs="+", default=[], metavar="FILE",
        help="accelerate launch files, such as ds_configs/fsdp2.yaml; by default the launch of this process",
    )  # fmt: skip
    parser.add_argument(
        "--num_processes", type=counts_of_processes, default=[], metavar="N[,N...]",
        help="processes, in place of the launch file's; several make a table of how the run scales",
    )  # fmt: skip
    add_time_flags(parser)
    parser.add_argument(
        "--gpu_memory_gib", type=number(Positive), metavar="GIB",
        help="refuse what does not fit such a GPU, and name what would; by default this machine's GPU, if it has one",
    )  # fmt: skip
    return parser


def counts_of_processes(text: str) -> list[int]:
    return [number(Count)(part) for part in text.split(",")]


def _launches(args: argparse.Namespace) -> dict[str, list[Launch]]:
    """Return the launches of each file, or of this process's environment, at each number of processes."""
    if args.launch_file:
        counts = args.num_processes or [None]
        return {file.stem: [read_launch_file(file, count) for count in counts] for file in args.launch_file}
    # It is for GPUs that may be elsewhere: what trains there without a launch file does so in bf16.
    launch = launch_of({PRECISION: "bf16", **os.environ})
    counts = args.num_processes or [launch.num_processes]
    return {launch.engine: [launch.using(num_processes=count) for count in counts]}


def _heading(recipe: Recipe, launches: dict[str, Launch]) -> str:
    sizes = {
        name: p.numel()
        for name, p in planned_model(recipe.model_config(), recipe.objective().exported_class).named_parameters()
    }
    towers = {
        tower: sum(size for name, size in sizes.items() if name.startswith(f"{tower}_")) for tower in ("vision", "text")
    }
    total = sum(sizes.values())
    batch = recipe.data.global_batch_size
    stages = plan_stages(recipe.stages, batch, recipe.budget_minutes)
    length = f"{stages[-1].last:,}" if recipe.budget_minutes is None else f"{recipe.budget_minutes:g} minutes of"
    lines = [
        f"{recipe.model.size}: {total:,} parameters; image tower {towers['vision']:,}, text tower {towers['text']:,}",
        f"{length} steps of {batch:,} pairs"
        + (", activations recomputed" if recipe.model.gradient_checkpointing else ""),
    ]
    for name, launch in launches.items():
        step = heaviest_step(recipe, launch, "cuda")
        lines.append(
            f"{name}: {launch.num_processes} processes of {batch // launch.num_processes} pairs, "
            f"{step.batch_size} at once, {'bf16' if launch.bf16 else 'fp32'}, "
            f"at most {1 - step.mask_ratio:.0%} of the patches"
            + ("" if step.image_size is None else f" of {step.image_size} x {step.image_size} pixels")
        )
    return "\n".join(lines)


def _table(needs: dict[str, Memory], limit: float | None) -> str:
    """GiB of each kind, a column for each launch."""
    columns = [f"{name:>10}" for name in needs]
    lines = ["", "  ".join([f"{'GiB of each process':<20}", *columns])]
    for field in dataclasses.fields(Memory):
        values = [f"{getattr(memory, field.name) / 2**30:10.2f}" for memory in needs.values()]
        lines.append("  ".join([f"{field.name:<20}", *values]))
    lines.append("  ".join([f"{'total':<20}", *(f"{memory.total / 2**30:10.2f}" for memory in needs.values())]))
    if limit is not None:
        fits = ["yes" if memory.total <= USABLE * limit * 2**30 else "no" for memory in needs.values()]
        lines.append("  ".join([f"{f'fits {limit:.0f} GiB':<20}", *(f"{word:>10}" for word in fits)]))
    return "\n".join(lines)


def _refuse(recipe: Recipe, launches: dict[str, Launch], needs: dict[str, Memory], limit: float) -> None:
    name = min(needs, key=lambda name: needs[name].total)
    fits = what_fits(recipe, launches[name], int(USABLE * limit * 2**30))
    raise UserError(
        f"{name} needs {needs[name].total / 2**30:.1f} GiB of each process, of which a GPU of {limit:.0f} GiB has "
        f"{USABLE * limit:.1f} to give; "
        + (f"what would fit: {', or '.join(fits)}" if fits else "nothing that is known here would fit: use larger GPUs")
    )
