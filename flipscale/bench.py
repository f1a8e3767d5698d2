"""Measure speed and memory of a training step, the loss and the loader, alone or beside open_clip's."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flipscale.data.recipe import DataRecipe
from flipscale.io.command_line import number
from flipscale.io.errors import UserError
from flipscale.io.ranges import Count, CountOrNone, Pairs, Pixels, Positive, ShareBelowAll, Threads, Workers
from flipscale.training.recipe import parse_recipe
from flipscale.training.schedule import plan_stages

# What is measured takes seconds to import, so it is where it is needed: `--help` waits for nothing.
if TYPE_CHECKING:
    from flipscale.benchmarks.data import DataSetting
    from flipscale.benchmarks.step import StepSetting

_SIZE = "b16, l16, l14, h14 or g14"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale bench`."""
    subjects = parser.add_subparsers(dest="subject", metavar="SUBJECT", required=True)

    def add(subject: str, summary: str) -> argparse.ArgumentParser:
        return subjects.add_parser(subject, help=summary, description=summary)

    step = add("step", "Measure a training step: images/s, memory, and the share of the peak of matrix products.")
    step.add_argument(
        "--mask_ratio", type=number(ShareBelowAll), default=0.75, help="The share of patches removed; 0.75 by default."
    )
    step.add_argument(
        "--dtype", choices=["bf16", "fp32"], default="bf16", help="Precision of products; bf16 by default."
    )
    step.add_argument("--compile", action="store_true", help="Compile the model with torch.compile.")
    step.add_argument("--peer", choices=["open_clip"], help="Measure this code base's step instead.")
    compare = add("compare", "Measure our step and open_clip's in turn, masked and unmasked, in bf16 and fp32.")
    loss = add("loss", "Measure the contrastive loss and its gradients: time, extra memory, share of the peak.")
    loss.add_argument("--n", type=number(Pairs), default=16384, help="How many pairs; 16384 by default.")
    loss.add_argument("--dim", type=number(Pixels), default=512, help="The width of the embeddings; 512 by default.")
    loss.add_argument("--peer", choices=["open_clip"], help="Measure this code base's loss instead.")
    losses = add("compare_loss", "Measure our loss and open_clip's, each in a process of its own.")
    losses.add_argument(
        "--n", type=number(Pairs), nargs="+", default=[16384, 32768], help="Numbers of pairs; 16384 32768 by default."
    )
    losses.add_argument(
        "--dim", type=number(Pixels), nargs="+", default=[512, 768], help="Widths of embeddings; 512 768 by default."
    )
    for parser, num_steps in ((step, 10), (compare, 5)):
        parser.add_argument("--size", default="b16", help=f"The size of the model, {_SIZE}; b16 by default.")
        parser.add_argument(
            "--batch_size", type=number(Pairs), default=32, help="How many pairs a step takes; 32 by default."
        )
        parser.add_argument(
            "--steps",
            type=number(Count),
            default=num_steps,
            help=f"How many steps are timed, after two that are not; {num_steps} by default.",
        )
    for parser in (loss, losses):
        parser.add_argument(
            "--steps",
            type=number(Count),
            default=5,
            help="How often each is timed, after once; 5 by default.",
        )
    for parser in (step, compare, loss, losses):
        parser.add_argument("--threads", type=number(Threads), help="How many CPU threads work; by default all.")
        parser.add_argument("--json", action="store_true", help="Print JSON lines instead of a table.")
    world = add(
        "world",
        "Take a recipe's step as one process of many does, without the others and without a GPU: operations, messages, "
        "waits, memory. DeepSpeed's engines read numbers back from the GPU and cannot be run so.",
    )
    add_world_arguments(world)
    data = add("data", "Measure the loader: images/s of a worker, bytes, memory, and where its time goes.")
    compare_loaders = add("compare_data", "Measure our loader and two others in turn, with one worker each.")
    add_data_arguments(data, compare_loaders)


def add_world_arguments(world: argparse.ArgumentParser) -> None:
    """Add the arguments of `bench world`."""
    world.add_argument("--recipe", required=True, help="A file, or a name of the package's.")
    world.add_argument("--launch_file", type=Path, required=True, help="Accelerate's, such as ds_configs/fsdp2.yaml.")
    world.add_argument(
        "--num_processes", type=number(Count), help="How many there are; by default as the launch file says."
    )
    world.add_argument("--rank", type=number(CountOrNone), default=0, help="Which process's step it is; 0 by default.")
    world.add_argument("--stage", help="The name of the stage whose step it is; by default the first.")
    world.add_argument("--json", action="store_true", help="Print a JSON line instead of a table.")


def add_data_arguments(data: argparse.ArgumentParser, compare: argparse.ArgumentParser) -> None:
    """Add the arguments of `bench data` and `bench compare_data`."""
    data.add_argument("--shards", help="A folder of tar shards, a glob or a range; by default those of --recipe.")
    data.add_argument("--recipe", help="Take the loader's settings from this recipe, a file or a name.")
    data.add_argument(
        "--num_workers",
        type=number(Workers),
        default=1,
        help="How many workers; 1 by default, 0 decodes in this process.",
    )
    data.add_argument("--peer", choices=["open_clip", "webdataset"], help="Measure this code base's loader instead.")
    data.add_argument(
        "--size", default="l16", help=f"The model for which workers are counted, {_SIZE}; l16 by default."
    )
    data.add_argument(
        "--gpu_tflops",
        type=number(Positive),
        default=400.0,
        help="TFLOP/s that its GPU reaches in training; 400 by default.",
    )
    compare.add_argument("--shards", nargs="+", required=True, help="Folders of shards; each is a row of the table.")
    for parser, batches in ((data, 10), (compare, 5)):
        parser.add_argument(
            "--mask_ratio",
            type=number(ShareBelowAll),
            default=0.75,
            help="The share of patches removed; 0.75 by default.",
        )
        parser.add_argument(
            "--image_size", type=number(Pixels), default=224, help="The side of the image in pixels; 224 by default."
        )
        parser.add_argument(
            "--patch_size", type=number(Pixels), default=16, help="The side of a patch in pixels; 16 by default."
        )
        parser.add_argument(
            "--tokenizer",
            default="captions",
            help="A tokenizer named as in a recipe; by default one is trained on the captions.",
        )
        parser.add_argument(
            "--batch_size", type=number(Pairs), default=256, help="How many pairs a batch has; 256 by default."
        )
        parser.add_argument(
            "--batches",
            type=number(Count),
            default=batches,
            help=f"How many batches of each worker are timed; {batches} by default.",
        )
        parser.add_argument("--json", action="store_true", help="Print JSON lines instead of a table.")


def run(args: argparse.Namespace) -> None:
    """Print the figures of `args.subject`.

    Raises:
        ValueError: the setting cannot be measured, or open_clip is needed and not installed.
    """
    subjects = {
        "step": print_step,
        "compare": print_comparison,
        "data": print_data,
        "compare_data": print_data_comparison,
        "loss": print_loss,
        "compare_loss": print_losses,
        "world": print_world,
    }
    threads = getattr(args, "threads", None)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    subjects[args.subject](args)


def step_setting(args: argparse.Namespace) -> "StepSetting":
    """Return the setting that the options of `bench step` and `bench compare` describe.

    Raises:
        ValueError: the size is unknown.
    """
    import torch

    from flipscale.benchmarks.step import StepSetting
    from flipscale.engines.device import keep_freed_memory
    from flipscale.model import FlipConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    config = FlipConfig.from_size(args.size)
    return StepSetting(config, args.size, batch_size=args.batch_size, device=device, num_steps=args.steps)


def data_setting(args: argparse.Namespace, shards: str | None, num_workers: int = 0) -> "DataSetting":
    """Return the setting that the options describe, or that of the first stage of `--recipe`.

    Raises:
        ValueError: no shards are named, or the setting is impossible.
    """
    from flipscale.benchmarks.data import DataSetting
    from flipscale.data.pairs import InputShape
    from flipscale.model import FlipConfig

    if getattr(args, "recipe", None):
        recipe = parse_recipe(["--config", args.recipe])
        changes = {"shards": shards, "num_workers": num_workers, "global_batch_size": args.batch_size}
        setting = replace(DataSetting.of(recipe, **changes), num_batches=args.batches)
    else:
        data = DataRecipe(
            shards=shards or "", tokenizer=args.tokenizer, global_batch_size=args.batch_size, num_workers=num_workers
        )
        shape = InputShape(args.image_size, args.patch_size, FlipConfig().text_config.max_position_embeddings)
        setting = DataSetting(data, shape, args.mask_ratio, num_batches=args.batches)
    if not setting.data.shards:
        raise UserError("no shards to read; name them with --shards, or a recipe that does with --recipe")
    return setting


def print_world(args: argparse.Namespace) -> None:
    """Print what a step does as one process of many, as a JSON line or one figure a line."""
    from flipscale.benchmarks.world import World, simulate
    from flipscale.engines.launch import read_launch_file

    recipe = parse_recipe(["--config", args.recipe])
    launch = read_launch_file(args.launch_file, args.num_processes)
    stages = plan_stages(recipe.stages, recipe.data.global_batch_size, recipe.budget_minutes)
    names = [stage.name for stage in stages]
    if args.stage is not None and args.stage not in names:
        raise UserError(f"stage is {args.stage!r}; the recipe's are {', '.join(map(repr, names))}")
    stage = stages[names.index(args.stage)] if args.stage is not None else stages[0]
    figures = simulate(World(recipe, launch, stage, args.rank)).figures()
    if args.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        values = value.items() if isinstance(value, dict) else [("", value)]
        values = [(f"{number}.", where) for number, where in enumerate(value, 1)] if isinstance(value, list) else values
        for part, one in values:
            print(f"{f'{name} {part}':<32}{one if isinstance(one, str) else f'{one:,}'}")


def print_data(args: argparse.Namespace) -> None:
    """Print a loader's figures as a JSON line, or one a line."""
    from flipscale.benchmarks.data import measure_data, workers_for_gpu
    from flipscale.benchmarks.data_peer import compare_data

    setting = data_setting(args, args.shards, args.num_workers)
    if args.peer:
        figures = compare_data(setting, (args.peer,))[0]
        del figures["ratio"]
    else:
        figures = {"code": "flipscale", **measure_data(setting)}
        rate = figures["images_per_s_per_worker"]
        figures |= workers_for_gpu(args.size, setting.mask_ratio, args.gpu_tflops, rate)
    print_figures(figures, args.json)
    if not args.json and not args.peer:
        print(
            f"\n{args.size} at {setting.mask_ratio:.0%} on a GPU that reaches {args.gpu_tflops:g} TFLOP/s takes "
            f"{figures['gpu_images_per_s']:,.0f} images/s: {figures['workers_for_gpu']} workers as fast as these"
        )


def print_data_comparison(args: argparse.Namespace) -> None:
    """Print the figures of three loaders on each set of shards, as JSON lines or as table rows."""
    from flipscale.benchmarks.data_peer import compare_data, shards_in

    if not args.json:
        print("| shards | loader | images/s a worker | flipscale is | pixels to device, kB/image | peak memory, MB |")
        print("|---|---|---:|---:|---:|---:|")
    for shards in shards_in(args.shards):
        for row in compare_data(data_setting(args, shards)):
            if args.json:
                print(json.dumps(row), flush=True)
                continue
            print(
                f"| {Path(shards).name} | {row['code']} | {row['images_per_s_per_worker']:.0f} | {row['ratio']:.2f}x | "
                f"{row['bytes_to_device_per_image'] / 1000:.1f} | {row['peak_memory_bytes_per_worker'] / 1e6:.0f} |",
                flush=True,
            )


def print_step(args: argparse.Namespace) -> None:
    """Print the figures of a training step."""
    from flipscale.benchmarks.peer import open_clip_step, require_open_clip
    from flipscale.benchmarks.step import flip_step, measure_step

    if args.peer:
        require_open_clip()
    setting = replace(step_setting(args), mask_ratio=args.mask_ratio, dtype=args.dtype, compile=args.compile)
    figures = measure_step(setting, open_clip_step if args.peer else flip_step)
    print_figures({"code": args.peer or "flipscale", **figures}, args.json)


def print_figures(figures: dict[str, Any], as_json: bool) -> None:
    """Print figures as a JSON line, or one a line."""
    if as_json:
        print(json.dumps(figures))
    else:
        width = max(24, *(len(name) + 2 for name in figures))
        print("\n".join(f"{name:<{width}}{_readable(value)}" for name, value in figures.items()))


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1e6 else f"{value:.3e}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def print_comparison(args: argparse.Namespace) -> None:
    """Print our step's figures beside open_clip's, a JSON line or a table row as soon as each case is measured."""
    import torch

    from flipscale.benchmarks.peer import compare_steps

    setting = step_setting(args)
    if not args.json:
        print(f"{setting.size}, batch {setting.batch_size}, {setting.device.type}, {torch.get_num_threads()} threads")
        print(
            "| dtype | mask | flipscale, images/s | open_clip, images/s | ratio | shares of matmul peak | CPU share |"
        )
        print("|---|---|---|---|---|---|---|")
    for row in compare_steps(setting):
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        shares = f"{row['share_of_matmul_peak']:.0%} and {row['open_clip_share_of_matmul_peak']:.0%}"
        print(
            f"| {row['dtype']} | {row['mask_ratio']:.0%} | {row['images_per_s']:.1f} | "
            f"{row['open_clip_images_per_s']:.1f} | {row['ratio']:.2f} | {shares} | {row['cpu_share']:.2f} |",
            flush=True,
        )


def print_loss(args: argparse.Namespace) -> None:
    """Print the figures of a loss."""
    from flipscale.benchmarks.loss import LossSetting, measure_loss

    setting = LossSetting(args.n, args.dim, steps=args.steps, code=args.peer or "flipscale")
    print_figures(measure_loss(setting), args.json)


def print_losses(args: argparse.Namespace) -> None:
    """Print our loss's figures beside open_clip's, a JSON line or a table row as soon as each size is measured."""
    from flipscale.benchmarks.loss import compare_losses

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
