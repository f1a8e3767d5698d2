"""Write a recipe for your data, your machine and your time. Comments give the reasons for its fields."""

import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flipscale.io.cores import usable_cores
from flipscale.io.errors import UserError
from flipscale.io.files import check_writable, is_utf8, quoted
from flipscale.io.options import Count, MinutesAboveZero, Positive

if TYPE_CHECKING:
    from flipscale.planning.proposal import Proposal, Survey

_MINUTES = 30.0
# Steps of each stage for measuring the speed.
_MEASURED_STEPS = 12


@dataclass(frozen=True)
class Init:
    """Write a recipe for your data, your machine and your time.

    Args:
        recipe: The file to write, such as mine.yaml. It must not exist.
        shards: The training data, as in data.shards of a recipe, or a saved data set or Parquet files with images.
        tokenizer: A folder that `flipscale prepare tokenizer` wrote, or a name on the Hub, such as bert.
        tests: A labelled test set that `flipscale prepare shards --labels` wrote.
        minutes: Training time on this machine. Its speed is measured. Default: 30.
        gpu: The kind of GPU for training elsewhere, such as h100 or rtx_4090.
        num_gpus: Number of these GPUs.
        hours: Training time on these GPUs. Their speed is computed.
    """

    recipe: Path
    _: KW_ONLY
    shards: str
    tokenizer: str = "bert"
    tests: str | None = None
    minutes: MinutesAboveZero | None = None
    gpu: str | None = None
    num_gpus: Count = 1
    hours: Positive | None = None

    def run(self) -> None:
        """Survey the data, propose a recipe, find its speed, and write it."""
        write_recipe(self)


def write_recipe(args: Init) -> None:
    """Survey the data, propose a recipe, find its speed, and write it."""
    _check_options(args)
    # Imported here, because torch and transformers take seconds and --help should not wait.
    import torch

    from flipscale.data.sources.opening import open_source
    from flipscale.data.tokenizers import check_tokenizer, load_tokenizer, num_entries
    from flipscale.objectives.build import build_config
    from flipscale.planning.proposal import LEAST_PAIRS, propose, survey
    from flipscale.preparation.lists import source_of
    from flipscale.recipe.data import DataRecipe
    from flipscale.runs.complete_recipe import parse_recipe
    from flipscale.training.console import start_logging

    start_logging()
    named = source_of(args.shards)
    source = open_source(DataRecipe(sources=[named], max_bad_fraction=1.0))
    if len(source) < LEAST_PAIRS:
        raise UserError(f"{args.shards} has {len(source)} pairs; training needs at least {LEAST_PAIRS}")
    try:
        tokenizer = load_tokenizer(args.tokenizer, 64)
    except ValueError as error:
        raise UserError(
            f"{error}; `flipscale prepare tokenizer {quoted(args.shards)} DIR` makes one of captions"
        ) from error
    data = survey(source, tokenizer)
    print(f"{args.shards}: {data}", flush=True)
    num_gpus = args.num_gpus if args.gpu else int(torch.cuda.is_available())
    minutes = 60 * args.hours if args.hours else args.minutes or _MINUTES
    proposal = propose(
        *(data, minutes, usable_cores(), num_gpus),
        source=named,
        tokenizer=args.tokenizer,
        # A folder's vocab_size follows from the folder.
        vocab_size=None if Path(args.tokenizer).is_dir() else num_entries(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        tasks=list(_tasks(args.tests)) if args.tests else [],
        output_dir=f"runs/{args.recipe.stem}",
    )
    check_tokenizer(tokenizer, build_config(proposal.recipe()).text_config)
    budget, speed = _length(args, proposal, data, minutes)
    command = _command(args)
    facts = [f"Data: {data}", f"Time: {speed}", *(f"Warning: {warning}" for warning in proposal.warnings)]
    text = proposal.text([*(f"{fact}." for fact in facts), command], budget)
    args.recipe.parent.mkdir(parents=True, exist_ok=True)
    with open(args.recipe, "x", encoding="utf-8") as file:
        file.write(text)
    parse_recipe(["--config", str(args.recipe.absolute())])
    for warning in proposal.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if reason := proposal.values["few_classes"]:
        print(f"{reason}; if their names are all you need, see loss.kind classify in docs/your_pictures.md")
    print(f"{args.recipe}: {speed}")
    print(f"next: {command}")


def _check_options(args: Init) -> None:
    for name in ("recipe", "shards", "tokenizer", "tests"):
        if not is_utf8(str(getattr(args, name))):
            raise UserError(f"{name} is not UTF-8, and a recipe is; rename it")
    if os.path.lexists(args.recipe):
        raise UserError(f"{args.recipe} is there already; name another file, or remove it")
    check_writable(args.recipe, "recipe")
    if args.recipe.suffix not in (".yaml", ".yml"):
        raise UserError(f"{args.recipe} has no ending .yaml; name a file such as mine.yaml")
    if (args.gpu is None) != (args.hours is None):
        raise UserError("gpu and hours go together, for machines elsewhere; give both, or minutes for this machine")
    if args.gpu is not None and args.minutes is not None:
        raise UserError("minutes is for this machine and gpu for others; leave one of them out")
    if args.gpu is None and args.num_gpus != 1:
        raise UserError("num_gpus is for machines elsewhere; add gpu and hours, or leave it out")
    if args.gpu is not None:
        from flipscale.engines.device import gpu_named

        gpu_named(args.gpu)


def _tasks(folder: str) -> Iterator[dict[str, Any]]:
    """Yield the evaluations that a test set allows: by its class names, and by its captions."""
    from flipscale.evaluation.test_set import TestSet

    source = TestSet.open(folder).source
    named = (Path(folder) / "classnames.txt").exists()
    captioned = len(source) > 0 and bool(source.read_captions(0, 0))
    if named:
        yield {"kind": "zero_shot", "data": folder}
    if captioned:
        yield {"kind": "retrieval", "data": folder, "group_by_caption": True}
    if not named and not captioned:
        raise UserError(
            f"tests {folder} has no classnames.txt and no captions, so no evaluation is possible; `flipscale prepare "
            "shards --labels` writes a test set"
        )


def _length(args: Init, proposal: "Proposal", data: "Survey", minutes: float) -> tuple[float, str]:
    """Return the useful part of `minutes` of training, and a text with its speed, pairs and epochs."""
    import torch

    from flipscale.engines.device import GPUS, gpu_named
    from flipscale.planning.measured_speed import measured_rates
    from flipscale.planning.time import Hardware, step_time

    if args.gpu:
        teraflops, gib = GPUS[name := gpu_named(args.gpu)]
        recipe, launch = proposal.fit(args.num_gpus, gib)
        hardware, how = Hardware(peak=1e12 * teraflops), f"as computed for {args.num_gpus} {name} (docs/planning.md)"
        rates = [proposal.batch_size / step_time(recipe, launch, stage, hardware).seconds for stage in recipe.stages]
    else:
        if torch.cuda.is_available():
            proposal.fit(1, torch.cuda.get_device_properties(0).total_memory // 2**30)
        print(f"measuring the speed: a trainer starts and takes {_MEASURED_STEPS} steps of each stage", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            rates, how = measured_rates(proposal.recipe(), _MEASURED_STEPS, Path(folder)), "as measured here"
    in_time = proposal.samples_in(60 * minutes, rates)
    if in_time < proposal.batch_size:
        raise UserError(f"{minutes:g} minutes are less than a step takes; give more minutes or hours")
    samples = min(in_time, proposal.most_samples)
    took, epochs = minutes * samples / in_time, samples / data.pairs
    unit, factor = ("hours", 1 / 60) if took / 60 >= 2 else ("minutes", 1) if took >= 2 else ("seconds", 60)
    words = f"about {samples:,} pairs in {took * factor:,.0f} {unit} of training, at {rates[0]:,.0f} pairs/s masked, "
    words += f"and {rates[1]:,.0f} whole, {how}; "
    words += f"{epochs:,.0f} times each pair" if epochs >= 2 else f"{epochs:.0%} of the pairs"
    words += "; more pairs would teach it more than more time" if samples < in_time else ""
    return float(f"{took:.3g}"), words


def _command(args: Init) -> str:
    """Return the command that trains the recipe on the machines of the options."""
    from flipscale.planning.memory import GPUS_OF_A_NODE

    files = "" if Path("ds_configs/ddp.yaml").exists() else "flipscale launch_files . && "
    recipe, run_dir = quoted(args.recipe), quoted(f"runs/{args.recipe.stem}")
    if args.gpu and args.num_gpus > GPUS_OF_A_NODE:
        nodes = -(-args.num_gpus // GPUS_OF_A_NODE)
        where = f"RECIPE={recipe} RUN={run_dir} LAUNCH_FILE=ds_configs/ddp.yaml"
        return f"{files}{where} bash slurm/pretrain.sh --nodes={nodes}"
    if args.gpu and args.num_gpus > 1:
        launcher = f"accelerate launch --config_file ds_configs/ddp.yaml --num_processes {args.num_gpus}"
        return f"{files}{launcher} -m flipscale.pretrain --config {recipe}"
    from flipscale.engines.launch import faster_precision

    faster = {} if args.gpu else faster_precision(os.environ)
    return "".join(f"{name}={value} " for name, value in faster.items()) + f"flipscale pretrain --config {recipe}"
