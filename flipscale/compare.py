"""Compare runs: their recipes, curves and last results, as text and as a page: `flipscale compare runs/A runs/B`."""

import argparse
from pathlib import Path

from flipscale.io.errors import UserError
from flipscale.io.files import check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale compare`."""
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path,
        help="Two or more run directories, finished or not. The first is the one that the others are compared with.",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="PAGE", type=Path, default=Path("compare.html"), help="Page to write. Default: compare.html."
    )


def run(args: argparse.Namespace) -> None:
    """Print the comparison and write its page."""
    if len({run.resolve() for run in args.runs}) < max(2, len(args.runs)):
        raise UserError(f"{', '.join(map(str, args.runs))} is only one run or names a run twice; name different runs")
    if args.out.suffix != ".html" or args.out.is_dir():
        raise UserError(f"--out is {str(args.out)!r}; name a file that ends in .html")
    check_writable(args.out.parent, "--out")
    from flipscale.pages.comparison import Comparison, write_comparison

    comparison = Comparison.of(args.runs)
    print(comparison.text())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_comparison(comparison, args.out)
    print(f"\n{args.out}: the same with curves; open it in a browser")
