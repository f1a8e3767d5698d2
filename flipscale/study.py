"""Studies: several runs, compared."""

import argparse
from pathlib import Path

from flipscale.io.cores import usable_cores
from flipscale.io.errors import UserError
from flipscale.io.files import quoted
from flipscale.io.options import Count, MinutesAboveZero, number, output_folder
from flipscale.training.console import start_logging

_RESAMPLES = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale study`."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)

    def kind(name: str, summary: str) -> argparse.ArgumentParser:
        return kinds.add_parser(name, help=summary, description=summary)

    add = kind("race", "Train several recipes at once for the same time, and compare them.").add_argument
    add(
        "recipes", nargs="+",
        help="Recipe files or names. The first recipe's model is exported. For several seeds, tables show means with "
        "intervals and figures show bands.",
    )  # fmt: skip
    add(
        "--minutes", type=number(MinutesAboveZero), required=True,
        help="Training time of every recipe by its own clock, without evaluations and saves. A recipe's stages get "
        "their shares of this time.",
    )  # fmt: skip
    add(
        "--seeds", type=number(Count), default=1,
        help="Number of seeds of every recipe, beginning with its own. The recipes of one seed train at the same time; "
        "the next seed follows. Default: 1.",
    )  # fmt: skip
    add("--output_dir", type=output_folder, required=True, help="The folder for runs, table, figures and model.")
    add("--baselines", action="store_true", help="Also report the nearest training image, by pixels and by HOG.")
    plan = kind("plan", "Write one recipe per combination and seed of a study file.")
    plan.add_argument(
        "study", type=Path, metavar="STUDY.yaml",
        help="The study's file: base, axes, design (star or grid), seeds, and minutes for runs with a time budget.",
    )  # fmt: skip
    train = kind("run", "Train the unfinished runs of a planned study. If a run fails, the others go on.")
    train.add_argument("folder", type=Path, metavar="DIR", help="The study's folder.")
    report = kind("report", "Write tables, scaling laws and figures of a study's finished runs.")
    report.add_argument("folder", type=Path, metavar="DIR", help="The study's folder.")
    report.add_argument(
        "--resamples", type=number(Count), default=_RESAMPLES, help=f"Draws of each bootstrap. Default: {_RESAMPLES}."
    )
    summary = "Search the best schedule of image sizes, masks and tuning for a given time, by successive halving."
    budget = kind("budget", summary)
    budget.add_argument(
        "search", type=Path, metavar="SEARCH.yaml", help="The search's file: base, minutes, validation and paths."
    )
    for one in (plan, budget):
        one.add_argument("--output_dir", type=output_folder, help="The folder. Default: runs/ and the file's name.")
    for one in (train, budget):
        words = "Number of runs that train side by side. Default: 1."
        one.add_argument("--workers", type=number(Count), default=1, help=words)


def run(args: argparse.Namespace) -> None:
    """Run a kind of study."""
    # Imported where needed, because torch, scipy and the hub take seconds, which --help should not wait for.
    start_logging()
    if args.kind in ("budget", "run") and args.workers > usable_cores():
        raise UserError(f"--workers is {args.workers}, and there are {usable_cores()} cores; give each run one")
    if args.kind == "race":
        from flipscale.studies.race import race

        race(args.recipes, args.minutes, args.seeds, args.output_dir, args.baselines)
    elif args.kind == "plan":
        from flipscale.studies.design import write_plan

        folder = args.output_dir or Path("runs", args.study.stem)
        runs = write_plan(args.study, folder)
        print("\n".join(run.name for run in runs))
        print(f"{len(runs)} runs are planned; train them: flipscale study run {quoted(folder)}")
    elif args.kind == "budget":
        from flipscale.studies.budget import search_paths

        search_paths(args.search, args.output_dir or Path("runs", args.search.stem), args.workers)
    elif args.kind == "run":
        from flipscale.studies.design import read_plan
        from flipscale.studies.runs import train_missing

        train_missing(read_plan(args.folder)[1], args.workers)
    else:
        from flipscale.studies.report import report

        report(args.folder, args.resamples)
