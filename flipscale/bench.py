"""Speed and memory of a training step, by itself or beside open_clip's."""

import argparse
import json
from dataclasses import replace
from typing import Any

import torch

from flipscale.benchmarks.loss import LossSetting, compare_losses, measure_loss
from flipscale.benchmarks.peer import compare_steps, open_clip_step, require_open_clip
from flipscale.benchmarks.step import DTYPES, StepSetting, flip_step, measure_step
from flipscale.model import FlipConfig
from flipscale.model.configuration_flip import SIZES
from flipscale.training.launch import keep_freed_memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `flipscale bench` takes: `step` or `compare`, and the options of each."""
    subjects = parser.add_subparsers(dest="subject", metavar="SUBJECT", required=True)
    step = subjects.add_parser("step", help="a training step: images/s, share of the matmul peak, memory")
    step.add_argument("--mask_ratio", type=float, default=0.75)
    step.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    step.add_argument("--compile", action="store_true", help="torch.compile the model")
    step.add_argument("--peer", choices=["open_clip"], help="another code base's step in place of ours")
    compare = subjects.add_parser("compare", help="our step and open_clip's in turn, masked and not, bf16 and fp32")
    loss = subjects.add_parser("loss", help="the contrastive loss and its gradients: time, extra memory, share of peak")
    loss.add_argument("--n", type=int, default=16384, help="pairs")
    loss.add_argument("--dim", type=int, default=512, help="width of the embeddings")
    loss.add_argument("--peer", choices=["open_clip"], help="another code base's loss in place of ours")
    losses = subjects.add_parser("compare_loss", help="our loss and open_clip's, each in a process of its own")
    losses.add_argument("--n", type=int, nargs="+", default=[16384, 32768], help="pairs")
    losses.add_argument("--dim", type=int, nargs="+", default=[512, 768], help="widths of the embeddings")
    for parser in (loss, losses):
        parser.add_argument("--steps", type=int, default=5, help="how often each is timed, after once that is not")
        parser.add_argument("--threads", type=int, help="CPU threads; all by default")
        parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    for parser, num_steps in ((step, 10), (compare, 5)):
        parser.add_argument("--size", choices=sorted(SIZES), default="b16")
        parser.add_argument("--batch_size", type=int, default=32)
        parser.add_argument("--steps", type=int, default=num_steps, help="steps timed of each, after two that are not")
        parser.add_argument("--threads", type=int, help="CPU threads; all by default")
        parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")


def run(args: argparse.Namespace) -> None:
    """Prints the figures asked for.

    Raises:
        ValueError: a setting that cannot be measured, or open_clip is asked for and not installed.
    """
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"threads is {args.threads}; it must be at least 1")
        torch.set_num_threads(args.threads)
    if args.subject == "loss":
        print_figures(
            measure_loss(LossSetting(args.n, args.dim, steps=args.steps, code=args.peer or "flipscale")), args
        )
        return
    if args.subject == "compare_loss":
        print_losses(args)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    setting = StepSetting(
        FlipConfig.from_size(args.size), args.size, batch_size=args.batch_size, device=device, num_steps=args.steps
    )
    if args.subject == "compare":
        print_comparison(setting, args.json)
    else:
        print_step(setting, args)


def print_step(setting: StepSetting, args: argparse.Namespace) -> None:
    """One step's figures."""
    if args.peer:
        require_open_clip()
    setting = replace(setting, mask_ratio=args.mask_ratio, dtype=args.dtype, compile=args.compile)
    figures = measure_step(setting, open_clip_step if args.peer else flip_step)
    print_figures({"code": args.peer or "flipscale", **figures}, args)


def print_figures(figures: dict[str, Any], args: argparse.Namespace) -> None:
    """A JSON line, or a figure a line."""
    if args.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name:<24}{_readable(value)}" for name, value in figures.items()))


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1e6 else f"{value:.3e}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def print_comparison(setting: StepSetting, as_json: bool) -> None:
    """Ours beside open_clip's: a JSON line or a table row as each is measured."""
    if not as_json:
        print(f"{setting.size}, batch {setting.batch_size}, {setting.device.type}, {torch.get_num_threads()} threads")
        print(
            "| dtype | mask | flipscale, images/s | open_clip, images/s | ratio | shares of matmul peak | CPU share |"
        )
        print("|---|---|---|---|---|---|---|")
    for row in compare_steps(setting):
        if as_json:
            print(json.dumps(row), flush=True)
            continue
        shares = f"{row['share_of_matmul_peak']:.0%} and {row['open_clip_share_of_matmul_peak']:.0%}"
        print(
            f"| {row['dtype']} | {row['mask_ratio']:.0%} | {row['images_per_s']:.1f} | "
            f"{row['open_clip_images_per_s']:.1f} | {row['ratio']:.2f} | {shares} | {row['cpu_share']:.2f} |",
            flush=True,
        )


def print_losses(args: argparse.Namespace) -> None:
    """Our loss beside open_clip's: a JSON line or a table row as each is measured."""
    if not args.json:
        print("| pairs | dim | flipscale | open_clip | time | flipscale, extra memory | open_clip | memory | of peak |")
        print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in compare_losses(args.n, args.dim, args.steps):
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        print(
            f"| {row['n']:,} | {row['dim']} | {row['seconds']:.2f} s | {row['open_clip_seconds']:.2f} s | "
            f"{row['time_ratio']:.2f}x | {row['extra_peak_bytes'] / 1e6:,.0f} MB | "
            f"{row['open_clip_extra_peak_bytes'] / 1e6:,.0f} MB | 1/{row['memory_ratio']:.0f} | "
            f"{row['share_of_matmul_peak']:.0%} and {row['open_clip_share_of_matmul_peak']:.0%} |",
            flush=True,
        )
