"""Compute what recipes take before they are trained: hours, energy, money and CO2, recipe beside recipe."""

import argparse
import dataclasses
from pathlib import Path

from flipscale.io.options import Count, NonNegative, Overhead, Positive, ShareAboveZero, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale plan`."""
    parser.add_argument(
        "recipes", nargs="+", metavar="RECIPE", help="A recipe file, or the name of a recipe of the package."
    )
    parser.add_argument("--gpu", required=True, help="The kind of GPU to train on, such as h100.")
    parser.add_argument("--num_gpus", type=number(Count), default=1, help="How many of them. Default: 1.")
    parser.add_argument(
        "--mfu",
        type=number(ShareAboveZero),
        help="Useful operations of a step as a share of the GPU's peak, as a run on such GPUs has it. Default: 0.4.",
    )
    parser.add_argument(
        "--bench",
        type=Path,
        metavar="FILE",
        help="In its place: the JSON line of `flipscale bench step --json` on such a GPU.",
    )
    parser.add_argument("--watts", type=number(Positive), help="What a GPU takes while it trains.")
    parser.add_argument(
        "--device_hour_dollars",
        type=number(NonNegative),
        help="The price of a GPU for an hour. Default, as of the two below: what `cost` of the recipe says.",
    )
    parser.add_argument("--pue", type=number(Overhead), help="The power of the computing centre over its machines'.")
    parser.add_argument("--kwh_co2_grams", type=number(NonNegative), help="What the grid emits for a kWh.")


def run(args: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        ValueError: a GPU that is not known, a recipe that cannot be trained, or a bench file that cannot be read.
    """
    from flipscale.engines.device import BF16_PEAKS
    from flipscale.planning.cost import Gpus, cost_table
    from flipscale.planning.measured import share_of_peak
    from flipscale.planning.proposal import gpu_named
    from flipscale.training.recipe import parse_recipe

    name = gpu_named(args.gpu)
    peak = BF16_PEAKS[name]
    mfu = share_of_peak("--mfu", args.mfu, args.bench, peak)
    gpus = Gpus(name, args.num_gpus, peak, mfu, args.watts)
    recipes = {recipe: parse_recipe(["--config", recipe]) for recipe in args.recipes}
    given = {
        field: getattr(args, field)
        for field in ("device_hour_dollars", "pue", "kwh_co2_grams")
        if getattr(args, field) is not None
    }
    print(cost_table(recipes, gpus, [dataclasses.replace(recipe.cost, **given) for recipe in recipes.values()]))
