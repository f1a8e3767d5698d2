"""Studies: several runs, compared."""

import argparse
from pathlib import Path

from flipscale.io.errors import UserError
from flipscale.io.options import Count, MinutesAboveZero, number, output_folder, usable_cores
from flipscale.studies.design import study_file
from flipscale.studies.folder import read_plan, write_plan
from flipscale.studies.pool import train_missing
from flipscale.studies.race import race
from flipscale.studies.report import report
from flipscale.studies.search.halving import search_paths

_RESAMPLES = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale study`."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    summary = "Train several recipes at once for the same time, and compare them."
    add_race_arguments(kinds.add_parser("race", help=summary, description=summary))
    summary = "Write the recipes of a study: a base, axes along which it is changed, a design and seeds."
    plan = kinds.add_parser("plan", help=summary, description=summary)
    plan.add_argument(
        "study",
        metavar="STUDY.yaml",
        help="The study's file: base, axes, design (star or grid), seeds and, for runs that end by their clock, "
        "minutes; or the name of one of the package's.",
    )
    plan.add_argument(
        "--output_dir", type=output_folder, help="The study's folder; by default runs/ and the name of its file."
    )
    summary = "Train those runs of a planned study that are not done; one that fails stops no other."
    train = kinds.add_parser("run", help=summary, description=summary)
    train.add_argument("folder", type=Path, metavar="DIR", help="The study's folder.")
    _add_workers(train)
    summary = "Write the tables, laws of scaling and figures of the finished runs of a planned study."
    told = kinds.add_parser("report", help=summary, description=summary)
    told.add_argument("folder", type=Path, metavar="DIR", help="The study's folder.")
    told.add_argument(
        "--resamples", type=number(Count), default=_RESAMPLES, help="Draws of each bootstrap; 400 by default."
    )
    summary = "Search the path of image sizes, masks and tuning that is best at a given time, by successive halving."
    budget = kinds.add_parser("budget", help=summary, description=summary)
    budget.add_argument(
        "search",
        metavar="SEARCH.yaml",
        help="The search's file: base, minutes, validation and paths; or the name of one of the package's, such as "
        "budget_icons.",
    )
    budget.add_argument(
        "--output_dir", type=output_folder, help="The search's folder; by default runs/ and the name of its file."
    )
    _add_workers(budget)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=number(Count), default=1, help="Train so many runs side by side; 1 by default."
    )


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
        type=number(MinutesAboveZero),
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
    if args.kind == "race":
        race(args.recipes, args.minutes, args.seeds, args.output_dir, args.baselines)
    elif args.kind == "plan":
        file = study_file(args.study)
        folder = args.output_dir or Path("runs", file.stem)
        runs = write_plan(file, folder)
        print("\n".join(run.name for run in runs))
        print(f"{len(runs)} runs are planned; train them: flipscale study run {folder}")
    elif args.kind == "budget":
        _refuse_workers(args.workers)
        file = study_file(args.search)
        search_paths(file, args.output_dir or Path("runs", file.stem), args.workers)
    elif args.kind == "run":
        _refuse_workers(args.workers)
        train_missing(read_plan(args.folder)[1], args.workers)
    else:
        report(args.folder, args.resamples)


def _refuse_workers(workers: int) -> None:
    cores = usable_cores()
    if workers > cores:
        raise UserError(f"--workers is {workers}, and there are {cores} cores; give each run one at least")
