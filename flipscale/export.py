"""Export a run's model as a folder that transformers loads: `flipscale export runs/NAME`."""

import argparse
from pathlib import Path

from flipscale.io.errors import UserError
from flipscale.io.options import CountOrZero, Share, number, output_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale export`."""
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="A run directory, finished or not.")
    parser.add_argument("--step", type=number(CountOrZero), help="Step of the checkpoint. Default: the newest.")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="Data type of the weights. Default: fp32."
    )
    parser.add_argument(
        "--interpolate",
        metavar="BASE",
        help="Mix the weights with those of another model (WiSE-FT), such as the start of a fine-tuning: a run, a "
        "model folder or a Hub name.",
    )
    parser.add_argument(
        "--alpha",
        type=number(Share),
        nargs="+",
        default=[0.5],
        help="Share of the run's own weights with --interpolate. Default: 0.5. Several shares get a folder each in "
        "--out, such as alpha-0.25.",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="Write only the changes of a run with optim.lora, as a folder for PEFT. Default: add them to the weights.",
    )
    parser.add_argument("--out", metavar="DIR", type=output_folder, help="Folder to write. Default: RUN/export-STEP.")


def run(args: argparse.Namespace) -> None:
    """Write the folder, or a folder for each share, and print its name."""
    import torch

    from flipscale.engines.checkpoint import checkpoint_of, latest_checkpoint
    from flipscale.hub.export import export_adapter, export_checkpoint

    checkpoint = latest_checkpoint(args.run_dir) if args.step is None else checkpoint_of(args.run_dir, args.step)
    if checkpoint is None:
        raise UserError(f"{args.run_dir} has no checkpoint; name a run directory with checkpoints/step-*")
    out = args.out or args.run_dir / f"{'adapter' if args.adapter else 'export'}-{int(checkpoint.name[5:])}"
    if args.adapter:
        if args.interpolate or args.dtype != "fp32":
            raise UserError("--adapter writes the changes alone, in fp32; leave --interpolate and --dtype out")
        print(export_adapter(checkpoint, out))
        return
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    if args.interpolate is None:
        print(export_checkpoint(checkpoint, out, dtype))
        return
    for alpha in dict.fromkeys(args.alpha):
        folder = out if len(args.alpha) == 1 else out / f"alpha-{alpha:g}"
        print(export_checkpoint(checkpoint, folder, dtype, args.interpolate, alpha))
