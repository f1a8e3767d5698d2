"""Measure the speed and memory of a training step on this machine, or check a node of GPUs."""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from flipscale.io.errors import UserError
from flipscale.io.options import Count, Pairs, ShareBelowOne, Threads, number

if TYPE_CHECKING:
    from flipscale.planning.bench_step import StepSetting

_SIZES = ("b16", "l16", "l14", "h14", "g14")  # flipscale.model's, which takes seconds to import
_SUMMARY = "Measure a training step: images/s, memory, and the fraction of the device's matmul peak."
_GPU_SUMMARY = "Check the GPUs of this node and measure the training step on them, on made-up data."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale bench`."""
    subjects = parser.add_subparsers(dest="subject", metavar="SUBJECT", required=True)
    add_step_arguments(subjects.add_parser("step", help=_SUMMARY, description=_SUMMARY))
    gpu = subjects.add_parser("gpu", help=_GPU_SUMMARY, description=_GPU_SUMMARY)
    gpu.add_argument(
        "--recipes", nargs="+", default=["l16_laion400m", "h14_laion2b"], metavar="RECIPE",
        help="Recipes whose first stage is measured: files, or names of the package. Default: L/16 and H/14.",
    )  # fmt: skip
    gpu.add_argument("--batch_size", type=number(Pairs), default=256, help="Pairs of a GPU. Default: 256.")
    gpu.add_argument("--shards", help="Shards for the loader. Default: made-up pictures of 500 x 400.")
    gpu.add_argument("--output", type=Path, default=Path("gpu.json"), help="File of all figures. Default: gpu.json.")
    gpu.add_argument("--json", action="store_true", help="Print the figures as JSON instead of the report.")


def add_step_arguments(parser: argparse.ArgumentParser, num_steps: int = 10) -> None:
    """Add the options of a measured step; `step_setting` reads them."""
    parser.add_argument("--size", choices=_SIZES, default="b16", help="Model size. Default: b16.")
    parser.add_argument("--batch_size", type=number(Pairs), default=32, help="Pairs in a step. Default: 32.")
    parser.add_argument(
        "--mask_ratio", type=number(ShareBelowOne), default=0.75, help="Share of patches removed. Default: 0.75."
    )
    parser.add_argument(
        "--dtype", choices=["bf16", "fp32"], default="bf16", help="Precision of products. Default: bf16."
    )
    parser.add_argument("--compile", action="store_true", help="Compile the blocks, as a recipe's model.compile does.")
    parser.add_argument(
        "--steps", type=number(Count), default=num_steps,
        help=f"Timed steps, after two untimed steps. Default: {num_steps}.",
    )  # fmt: skip
    parser.add_argument("--threads", type=number(Threads), help="CPU threads. Default: all.")
    parser.add_argument("--json", action="store_true", help="Print JSON lines instead of text.")


def run(args: argparse.Namespace) -> None:
    """Print the figures of a training step, as a JSON line or one figure a line, or the report of the GPUs."""
    if args.subject == "gpu":
        _check_gpus(args)
        return
    from flipscale.planning.bench_step import measure_step

    figures = {"code": "flipscale", **measure_step(step_setting(args))}
    print(json.dumps(figures) if args.json else as_text(figures))


def _check_gpus(args: argparse.Namespace) -> None:
    """Run all checks and write their figures. Under a launcher, a node's first process does so for all."""
    from flipscale.checks.bench import as_json, report, run_checks
    from flipscale.checks.node import Bench
    from flipscale.engines.launch import whole_number
    from flipscale.io.atomic import write_text
    from flipscale.training.complete_recipe import parse_recipe

    if (nodes := whole_number(os.environ, "GROUP_WORLD_SIZE", 1)) > 1:
        raise UserError(f"the launcher started {nodes} nodes; bench gpu measures one. Fix: start it on one node")
    if whole_number(os.environ, "LOCAL_RANK", 0) > 0:
        return
    import torch

    num_gpus = whole_number(os.environ, "LOCAL_WORLD_SIZE", torch.cuda.device_count())
    if not 0 < num_gpus <= torch.cuda.device_count():
        raise UserError(
            f"torch {torch.__version__} sees {torch.cuda.device_count()} GPUs, and bench gpu needs {max(num_gpus, 1)}. "
            "Fix: see what `nvidia-smi` prints, and install torch for CUDA"
        )
    for recipe in args.recipes:
        parse_recipe(["--config", recipe])  # refuses an unknown recipe before all checks
    folder = Path(tempfile.mkdtemp(prefix="flipscale-bench-"))
    bench = Bench(num_gpus, folder, args.recipes, args.batch_size, args.shards)
    run_checks(bench, lambda line: print(line, file=sys.stderr, flush=True))
    if any(one.status == "FAILED" for one in bench.findings):
        print(f"the output of all processes is in {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    text = json.dumps(as_json(bench))
    print(text if args.json else report(bench))
    write_text(args.output, f"{text}\n")


def step_setting(args: argparse.Namespace) -> "StepSetting":
    """Return the setting of parsed step options, on a GPU if possible. Set the number of CPU threads."""
    import torch

    from flipscale.engines.device import keep_freed_memory
    from flipscale.model import FlipConfig
    from flipscale.planning.bench_step import StepSetting

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    config = FlipConfig.from_size(args.size)
    return StepSetting(
        config, args.size, args.mask_ratio, args.batch_size, args.dtype, args.compile, device, args.steps
    )


def as_text(figures: dict[str, str | int | float | bool]) -> str:
    """Return figures as text, one a line."""
    width = max(24, *(len(name) + 2 for name in figures))
    return "\n".join(f"{name:<{width}}{_readable(value)}" for name, value in figures.items())


def _readable(value: str | int | float | bool) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1e6 else f"{value:.3e}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
