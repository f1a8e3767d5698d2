"""The dry run's tables of time: a line for each number of processes, one table for each stage and launch file."""

import argparse
from pathlib import Path

from flipscale.engines.launch import Launch
from flipscale.io.options import Positive, ShareAboveZero, number
from flipscale.planning.measured import USUAL_SHARE, share_of_peak
from flipscale.planning.time import Hardware, Links, StepTime, step_time
from flipscale.training.recipe import Recipe
from flipscale.training.schedule import StageRecipe, plan_stages


def add_time_flags(parser: argparse.ArgumentParser) -> None:
    """Add the numbers that only the user's machines know."""
    links, hardware = Links(), Hardware()
    parser.add_argument(
        "--matmul_share",
        type=number(ShareAboveZero),
        help=f"share of the peak that matrix products reach on a GPU alone; {USUAL_SHARE} by default",
    )
    parser.add_argument(
        "--bench",
        type=Path,
        metavar="FILE",
        help="in its place: the JSON line of `flipscale bench step --json` on such a GPU",
    )
    parser.add_argument(
        "--peak_tflops",
        type=number(Positive),
        default=hardware.peak / 1e12,
        help="of a GPU's bf16 products; 989 is an H100's",
    )
    parser.add_argument(
        "--node_gbps",
        type=number(Positive),
        default=links.node_gbps,
        help="GB/s of a GPU within a node; 350 is an H100's NVLink",
    )
    parser.add_argument(
        "--network_gbps", type=number(Positive), default=links.network_gbps,
        help="GB/s of a GPU between nodes; 46 is an adapter of 400 Gb/s for each",
    )  # fmt: skip
    parser.add_argument(
        "--images_per_worker_s", type=number(Positive), default=hardware.images_per_worker_s,
        help="images/s that a worker of the loader delivers",
    )  # fmt: skip
    parser.add_argument(
        "--pair_kb", type=number(Positive), default=hardware.pair_kb, help="what a pair takes in the shards"
    )


def hardware_of(args: argparse.Namespace) -> Hardware:
    """Return what the flags describe.

    Raises:
        ValueError: a number that makes no sense, or a bench file that cannot be read.
    """
    peak = args.peak_tflops * 1e12
    return Hardware(
        links=Links(args.node_gbps, args.network_gbps),
        peak=peak,
        matmul_share=share_of_peak("--matmul_share", args.matmul_share, args.bench, peak),
        images_per_worker_s=args.images_per_worker_s,
        pair_kb=args.pair_kb,
    )


def time_tables(recipe: Recipe, launches: dict[str, list[Launch]], hardware: Hardware) -> str:
    """Return the tables, and the assumptions above them."""
    links = hardware.links
    lines = [
        "",
        f"time, at {hardware.matmul_share:.0%} of {hardware.peak / 1e12:,.0f} Tflop/s, {links.node_gbps:g} GB/s a GPU "
        f"within a node of {links.gpus_of_a_node}, {links.network_gbps:g} between nodes, "
        f"{hardware.images_per_worker_s:g} images/s a worker, {hardware.pair_kb:g} KB a pair:",
    ]
    plan = plan_stages(recipe.stages, recipe.data.global_batch_size, recipe.budget_minutes)
    for name, sizes in launches.items():
        hours = dict.fromkeys((launch.num_processes for launch in sizes), 0.0)
        for stage, planned in zip(recipe.stages, plan, strict=True):
            lines += ["", f"{name}, {stage.name} ({stage.mask_ratio:.0%} masked{_at(stage)}):", _HEADER]
            for launch in sizes:
                found = step_time(recipe, launch, stage, hardware)
                hours[launch.num_processes] += found.seconds * (planned.last - planned.first) / 3600
                lines.append(_line(launch.num_processes, found))
        if recipe.budget_minutes is None:
            run = ", ".join(f"{value:,.0f} h on {count}" for count, value in hours.items())
            lines += ["", f"{name}, the whole run: {run}"]
    return "\n".join(lines)


def _at(stage: StageRecipe) -> str:
    return "" if stage.image_size is None else f", {stage.image_size} x {stage.image_size} pixels"


_HEADER = (
    f"{'processes':>9} {'pairs':>6} {'compute':>9} {'exposed':>9} {'optimizer':>9} {'step':>9} {'pairs/s':>9} "
    f"{'MFU':>5} {'workers':>8} {'MB/s':>7}  binds\n"
    f"{'':>9} {'each':>6} {'ms':>9} {'ms':>9} {'ms':>9} {'ms':>9} {'':>9} {'':>5} {'a node':>8} {'a node':>7}"
)


def _line(count: int, found: StepTime) -> str:
    milliseconds = (found.compute, found.exposed, found.optimizer, found.seconds)
    return (
        f"{count:>9,} {found.pairs:>6,} "
        + " ".join(f"{1e3 * value:>9,.1f}" for value in milliseconds)
        + f" {found.batch / found.seconds:>9,.0f} {found.mfu:>5.0%} {found.workers:>8.1f} {found.node_mb_s:>7,.0f}  "
        + found.binds
    )
