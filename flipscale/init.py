"""Write a recipe for your data, your machine and your time. Comments give the reasons for its fields."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flipscale.io.cores import usable_cores
from flipscale.io.errors import UserError
from flipscale.io.files import check_writable, is_utf8, last_line, quoted
from flipscale.io.options import Count, MinutesAboveZero, Positive, number
from flipscale.io.processes import end_with_parent
from flipscale.objectives.build import build_config

if TYPE_CHECKING:
    from flipscale.engines.launch import Launch
    from flipscale.planning.proposal import Proposal, Survey
    from flipscale.recipe.recipe import Recipe

_MINUTES = 30.0
# Steps of each stage for measuring the speed.
_MEASURED_STEPS = 12
# Records of a stage's metrics while its speed is measured. The last one counts, because the first include start-up.
_RECORDS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale init`."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="The file to write. It must not exist.")
    shards_help = "The training data, as in data.shards of a recipe, or a saved data set or Parquet files with images."
    parser.add_argument("--shards", required=True, help=shards_help)
    parser.add_argument(
        "--tokenizer", default="bert",
        help="A folder that `flipscale prepare tokenizer` wrote, or a name on the Hub. Default: bert, from the Hub.",
    )  # fmt: skip
    parser.add_argument("--tests", help="A labelled test set that `flipscale prepare shards --labels` wrote.")
    parser.add_argument(
        "--minutes", type=number(MinutesAboveZero),
        help=f"Training time on this machine. Its speed is measured. Default: {_MINUTES:g}.",
    )  # fmt: skip
    parser.add_argument("--gpu", help="The kind of GPU for training elsewhere, such as h100 or rtx_4090.")
    parser.add_argument("--num_gpus", type=number(Count), default=1, help="Number of these GPUs. Default: 1.")
    parser.add_argument("--hours", type=number(Positive), help="Training time on these GPUs. Their speed is computed.")


def run(args: argparse.Namespace) -> None:
    """Survey the data, propose a recipe, find its speed, and write it."""
    _check_options(args)
    # Imported here, because torch and transformers take seconds and --help should not wait.
    import torch

    from flipscale.data.sources.opening import open_source
    from flipscale.data.tokenizers import check_tokenizer, load_tokenizer, num_entries
    from flipscale.planning.proposal import LEAST_PAIRS, propose, survey
    from flipscale.preparation.lists import source_of
    from flipscale.recipe.data import DataRecipe
    from flipscale.training.complete_recipe import parse_recipe
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
    minutes = 60 * args.hours if args.gpu else args.minutes or _MINUTES
    # A folder's vocab_size follows from the folder.
    tokens = {} if Path(args.tokenizer).is_dir() else {"vocab_size": num_entries(tokenizer)}
    if tokenizer.pad_token_id:
        tokens["pad_token_id"] = tokenizer.pad_token_id
    proposal = propose(data, tokens, minutes, usable_cores(), num_gpus)
    fields = proposal.fields
    columns = {"image_column": named.image_column, "caption_columns": named.caption_columns}
    where = {"sources": [{"dataset": named.dataset, **columns}]} if named.dataset else {"shards": args.shards}
    fields["data"] = {**where, "tokenizer": args.tokenizer, **fields["data"]}
    if args.tests:
        workers = {} if num_gpus else {"num_workers": fields["data"]["num_workers"]}
        fields["eval"] = {"tasks": list(_tasks(args.tests)), **workers}
    fields["output_dir"] = f"runs/{args.recipe.stem}"
    check_tokenizer(tokenizer, build_config(_recipe_of(proposal, 0)).text_config)
    budget, speed = _length(args, proposal, data, minutes)
    command = _command(args)
    text = _recipe_text(proposal, [f"Data: {data}", f"Time: {speed}"], command, budget)
    args.recipe.parent.mkdir(parents=True, exist_ok=True)
    with open(args.recipe, "x", encoding="utf-8") as file:
        file.write(text)
    parse_recipe(["--config", str(args.recipe.absolute())])
    for warning in proposal.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if reason := proposal.reasons.get("data.shards"):
        print(f"{reason}; if their names are all you need, see loss.kind classify in docs/your_pictures.md")
    print(f"{args.recipe}: {speed}")
    print(f"next: {command}")


def _check_options(args: argparse.Namespace) -> None:
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


def _length(args: argparse.Namespace, proposal: "Proposal", data: "Survey", minutes: float) -> tuple[float, str]:
    """Return the useful part of `minutes` of training, and a text with its speed, pairs and epochs."""
    import torch

    from flipscale.engines.device import GPUS, gpu_named
    from flipscale.planning.proposal import most_samples, samples_in
    from flipscale.planning.time import Hardware, step_time

    if args.gpu:
        teraflops, gib = GPUS[name := gpu_named(args.gpu)]
        recipe, launch = _fitted(proposal, args.num_gpus, gib)
        hardware, how = Hardware(peak=1e12 * teraflops), f"as computed for {args.num_gpus} {name} (docs/planning.md)"
        seconds = [step_time(recipe, launch, stage, hardware).seconds for stage in recipe.stages]
        rates = [proposal.batch_size / one for one in seconds]
    else:
        if torch.cuda.is_available():
            _fitted(proposal, 1, torch.cuda.get_device_properties(0).total_memory // 2**30)
        print(f"measuring the speed: a trainer starts and takes {_MEASURED_STEPS} steps of each stage", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            rates, how = measured_rates(_recipe_of(proposal, 0), _MEASURED_STEPS, Path(folder)), "as measured here"
    in_time, useful = samples_in(60 * minutes, rates, proposal), most_samples(data, proposal)
    if in_time < proposal.batch_size:
        raise UserError(f"{minutes:g} minutes are less than a step takes; give more minutes or hours")
    samples = min(in_time, useful)
    took, epochs = minutes * samples / in_time, samples / data.pairs
    unit, factor = ("hours", 1 / 60) if took / 60 >= 2 else ("minutes", 1) if took >= 2 else ("seconds", 60)
    words = f"about {samples:,} pairs in {took * factor:,.0f} {unit} of training, at {rates[0]:,.0f} pairs/s masked, "
    words += f"and {rates[1]:,.0f} whole, {how}; "
    words += f"{epochs:,.0f} times each pair" if epochs >= 2 else f"{epochs:.0%} of the pairs"
    words += "; more pairs would teach it more than more time" if samples < in_time else ""
    return float(f"{took:.3g}"), words


def _fitted(proposal: "Proposal", num_gpus: int, gib: int) -> tuple["Recipe", "Launch"]:
    """Add recomputation and micro-batches to a proposal until it fits GPUs of `gib`. Return the recipe and launch."""
    from flipscale.engines.launch import Launch
    from flipscale.planning.memory import GPUS_OF_A_NODE, recipe_memory

    launch = Launch(num_processes=num_gpus, precision="bf16", processes_per_node=min(num_gpus, GPUS_OF_A_NODE))
    pairs = proposal.batch_size // num_gpus
    model, data = proposal.fields["model"], proposal.fields["data"]
    # In this order: no change; recomputation, which costs a third more time; micro-batches.
    for parts in (0, 1, *(parts for parts in (2, 4, 8, 16, 32, 64) if pairs % parts == 0)):
        if parts:
            model["gradient_checkpointing"] = True
        if parts > 1:
            data["micro_batch_size"] = pairs // parts
        recipe = _recipe_of(proposal, 0)
        if recipe_memory(recipe, launch).fits(gib):
            return recipe, launch
    raise UserError(
        f"the model and a batch of {proposal.batch_size} do not fit {num_gpus} GPUs of {gib} GiB under DDP; use more "
        "or larger GPUs, or a recipe of your own under FSDP2"
    )


def measured_rates(recipe: "Recipe", num_steps: int, folder: Path) -> list[float]:
    """Return the pairs per second of each stage, by `num_steps` steps of `flipscale pretrain` in `folder`. If it
    fails, raise UserError or OSError with its last line."""
    from flipscale.engines.launch import faster_precision
    from flipscale.io.atomic import write_text
    from flipscale.io.progress import Progress
    from flipscale.recipe.outputs import EvalRecipe
    from flipscale.recipe.recipe import to_yaml

    samples = num_steps * recipe.data.global_batch_size
    *earlier, last = [dataclasses.replace(stage, samples=samples, warmup_samples=0) for stage in recipe.stages]
    # The trainer is stopped in an endless stage, because a finished run also exports its model and draws figures.
    short = dataclasses.replace(
        recipe,
        stages=[*earlier, dataclasses.replace(last, samples=1000 * samples)],
        log=dataclasses.replace(recipe.log, every_samples=samples // _RECORDS, report_to=[]),
        eval=EvalRecipe(),
        output_dir=str(folder / "run"),
    )
    file, log = folder / "recipe.yaml", folder / "log"
    write_text(file, to_yaml(short))
    command = [sys.executable, "-m", "flipscale.pretrain", "--config", str(file.absolute())]
    environment = {"TOKENIZERS_PARALLELISM": "false", **faster_precision(os.environ), **os.environ}
    with open(log, "wb") as output, Progress(len(short.stages) * num_steps, "measuring", "steps", leave=False) as bar:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, preexec_fn=end_with_parent)
        try:
            while process.poll() is None and len(_recorded_rates(short, last.name)) < _RECORDS:
                time.sleep(0.1)
                records = sum(min(len(_recorded_rates(short, stage.name)), _RECORDS) for stage in short.stages)
                bar.update(num_steps * records // _RECORDS - bar.done)
        finally:
            process.terminate()
            process.wait()
    if process.returncode:
        words = f"measuring the speed ended with exit code {process.returncode}: {last_line(log)}"
        raise (UserError if process.returncode == 2 else OSError)(words)
    return [_recorded_rates(short, stage.name)[-1] for stage in short.stages]


def _recorded_rates(recipe: "Recipe", stage: str) -> list[float]:
    from flipscale.evaluation.results import read_metrics

    records = read_metrics(Path(recipe.output_dir))
    return [record["images_per_s"] for record in records if record.get("stage") == stage and "images_per_s" in record]


def _recipe_text(proposal: "Proposal", facts: list[str], command: str, minutes: float) -> str:
    """Return the text of a recipe of `minutes`, with facts and the command that trains it above the fields."""
    from flipscale.planning.budget import in_shares
    from flipscale.planning.proposal import commented_yaml

    # The shares are those of many steps, whatever the measured speed.
    samples = 10_000 * proposal.batch_size
    timed = in_shares(dataclasses.replace(_recipe_of(proposal, samples), budget_minutes=minutes))
    names = [[name.replace("samples", "share") for name in stage] for stage in proposal.stages(samples)]
    stages = [{name: getattr(stage, name) for name in own} for stage, own in zip(timed.stages, names, strict=True)]
    fields = {**proposal.fields, "budget_minutes": minutes, "stages": stages, "save": {"every_minutes": 10}}
    if "eval" in fields:
        fields["eval"] = {"every_share": 0.1667, **fields["eval"]}
    reasons = {
        **proposal.reasons,
        "stages[0].base_lr": f"per 256 pairs: {proposal.base_lr * proposal.batch_size / 256:.2g} for the batch",
        "budget_minutes": "without evaluations and saves",
        "stages[0].warmup_share": "a twentieth of the stage, with a rising rate",
        "stages[1].name": "whole pictures, as in later use",
    }
    head = [
        "Written by `flipscale init`. Change any field: `flipscale pretrain --help` explains all of them.",
        *(f"{sentence}." for sentence in facts),
        *(f"Warning: {warning}." for warning in proposal.warnings),
        command,
    ]
    order = ("model", "data", "optim", "budget_minutes", "stages", "save", "eval", "output_dir")
    return commented_yaml(head, {name: fields[name] for name in order if name in fields}, reasons)


def _recipe_of(proposal: "Proposal", samples: int) -> "Recipe":
    """Return the recipe of a proposal for `samples` pairs, at least a step of each stage."""
    from flipscale.training.complete_recipe import parse_recipe

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(json.dumps({**proposal.fields, "stages": proposal.stages(samples)}), encoding="utf-8")
        return parse_recipe(["--config", str(file)])


def _command(args: argparse.Namespace) -> str:
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
