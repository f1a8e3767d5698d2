"""Studies: several runs, compared."""

import argparse

from flipscale.files.command_line import number, output_folder
from flipscale.files.ranges import Count, MinutesAboveNone
from flipscale.studies.race import race


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale study`."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    summary = "Train several recipes at once for the same time, and compare them."
    add_race_arguments(kinds.add_parser("race", help=summary, description=summary))


def add_race_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale study race`."""
    parser.add_argument(
        "recipes",
        nargs="+",
        help="Recipe files or names. The model of the first one is exported. Those that differ in their seed alone get "
        "their mean with its interval, too, and a band in the figures.",
    )
    parser.add_argument(
        "--minutes",
        type=number(MinutesAboveNone),
        required=True,
        help="How long every recipe trains, by its own clock, which stands still in evaluations and saves. A recipe's "
        "stages have their shares of this time.",
    )
    parser.add_argument(
        "--seeds",
        type=number(Count),
        default=1,
        help="Train every recipe with so many seeds, from its own on. The runs of a seed train at the same time, one "
        "seed after the other; 1 by default.",
    )
    parser.add_argument(
        "--output_dir", type=output_folder, required=True, help="The folder for runs, table, figures and model."
    )
    parser.add_argument(
        "--baselines", action="store_true", help="Compare with the nearest training image too, by pixels and by HOG."
    )


def run(args: argparse.Namespace) -> None:
    """Run the study that the arguments name.

    Raises:
        ValueError: it cannot be run as asked.
        OSError: a run failed.
    """
    race(args.recipes, args.minutes, args.seeds, args.output_dir, args.baselines)
