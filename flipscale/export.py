"""Export a run's model to a folder that transformers loads: `flipscale export runs/NAME`."""

import argparse
from pathlib import Path

from flipscale.io.errors import UserError
from flipscale.io.options import CountOrZero, Share, number, output_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale export`."""
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="A run directory, finished or not.")
    parser.add_argument(
        "--step", type=number(CountOrZero), help="Export the checkpoint of this step; by default the newest."
    )
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="The data type of the weights; fp32 by default."
    )
    parser.add_argument(
        "--interpolate",
        metavar="BASE",
        help="Export weights between those of another model, such as the one that a fine-tuning started from, and the "
        "run's (WiSE-FT): a run, a model folder or a Hub name.",
    )
    parser.add_argument(
        "--alpha",
        type=number(Share),
        nargs="+",
        default=[0.5],
        help="The share of the run's own weights with --interpolate; 0.5 by default. Of several, each has a folder in "
        "that of --out, such as alpha-0.25, to be evaluated side by side.",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=output_folder, help="The folder to write; by default RUN/export-STEP."
    )


def run(args: argparse.Namespace) -> None:
    """Write the folder, or one of each share, and print its name. One tensor is in memory at a time, and no engine is
    needed.

    Raises:
        ValueError: the checkpoint does not exist, the folder exists and is not a model folder, or the other model has
            other weights.
    """
    import torch

    from flipscale.engines.checkpoint import checkpoint_of, latest_checkpoint
    from flipscale.hub.export import Interpolation, export_checkpoint

    checkpoint = latest_checkpoint(args.run_dir) if args.step is None else checkpoint_of(args.run_dir, args.step)
    if checkpoint is None:
        raise UserError(f"{args.run_dir} has no checkpoint; name a run directory with one in checkpoints/")
    out = args.out or args.run_dir / f"export-{int(checkpoint.name[5:])}"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    if args.interpolate is None:
        print(export_checkpoint(checkpoint, out, dtype))
        return
    for alpha in dict.fromkeys(args.alpha):
        folder = out if len(args.alpha) == 1 else out / f"alpha-{alpha:g}"
        print(export_checkpoint(checkpoint, folder, dtype, Interpolation(args.interpolate, alpha)))
