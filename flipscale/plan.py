"""Compute the hours, energy, money and CO2 of recipes before they are trained."""

import argparse
import dataclasses
from pathlib import Path

from flipscale.io.options import Count, NonNegative, Overhead, Positive, ShareAboveZero, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale plan`."""
    add = parser.add_argument
    add("recipes", nargs="+", metavar="RECIPE", help="A recipe file, or the name of a recipe of the package.")
    add("--gpu", required=True, help="The kind of GPU, such as h100 or rtx_4090.")
    add("--num_gpus", type=number(Count), default=1, help="Number of GPUs. Default: 1.")
    add("--mfu", type=number(ShareAboveZero), help="Measured model FLOPs utilisation of a whole step. Default: 0.4.")
    add(
        "--bench", type=Path, metavar="FILE",
        help="The gpu.json of `flipscale bench gpu` on such GPUs, or the JSON line of `flipscale bench step --json`, "
        "instead of --mfu. The step of the first recipe's model counts.",
    )  # fmt: skip
    add("--watts", type=number(Positive), help="Power of a GPU during training.")
    add(
        "--device_hour_dollars", type=number(NonNegative),
        help="Price of a GPU per hour. Default: the recipe's `cost` section. The same holds for --pue and "
        "--kwh_co2_grams.",
    )  # fmt: skip
    add("--pue", type=number(Overhead), help="Total power of the data centre divided by its machines' power.")
    add("--kwh_co2_grams", type=number(NonNegative), help="The grid's CO2 emissions in grams per kWh.")


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    # Imported here, because torch takes seconds and --help should not wait.
    from flipscale.engines.device import GPUS, gpu_named
    from flipscale.planning.budget import in_shares
    from flipscale.planning.cost import Gpus, cost_table
    from flipscale.planning.time import share_of_peak, speed_key
    from flipscale.training.complete_recipe import parse_recipe

    name = gpu_named(args.gpu)
    peak = 1e12 * GPUS[name][0]
    recipes = {recipe: in_shares(parse_recipe(["--config", recipe])) for recipe in args.recipes}
    mfu = share_of_peak("--mfu", args.mfu, args.bench, peak, speed_key(recipes[args.recipes[0]]))
    gpus = Gpus(name, args.num_gpus, peak, mfu, args.watts)
    prices = ("device_hour_dollars", "pue", "kwh_co2_grams")
    given = {field: getattr(args, field) for field in prices if getattr(args, field) is not None}
    print(cost_table(recipes, gpus, [dataclasses.replace(recipe.cost, **given) for recipe in recipes.values()]))
