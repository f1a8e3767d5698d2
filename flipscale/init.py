"""Write a recipe for your data, your machine and your time, with the reasons beside its fields."""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flipscale.io.errors import UserError
from flipscale.io.files import check_writable, is_utf8
from flipscale.io.options import Count, MinutesAboveZero, Positive, number, usable_cores

if TYPE_CHECKING:
    from flipscale.planning.proposal import Proposal
    from flipscale.planning.survey import Survey
    from flipscale.training.recipe import Recipe

_MINUTES = 30.0
# Of each stage, on this machine.
_CALIBRATION_STEPS = 12
_GPUS_OF_A_NODE = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale init`."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="The file to write; one that is there stays.")
    parser.add_argument("--shards", required=True, help="The training data, as data.shards of a recipe names it.")
    parser.add_argument(
        "--tokenizer",
        default="bert",
        help="A folder that `flipscale prepare tokenizer` wrote, or a name on the Hub. Default: bert, from the Hub.",
    )
    parser.add_argument("--tests", help="A labelled test set, as `flipscale prepare shards --labels` writes one.")
    parser.add_argument(
        "--minutes",
        type=number(MinutesAboveZero),
        help=f"How long to train on this machine, whose speed is measured. Default: {_MINUTES:g}.",
    )
    parser.add_argument("--gpu", help="In place of --minutes: the kind of GPU to train on elsewhere, such as h100.")
    parser.add_argument("--num_gpus", type=number(Count), default=1, help="How many of them. Default: 1.")
    parser.add_argument("--hours", type=number(Positive), help="How long to train on them; their speed is computed.")


def run(args: argparse.Namespace) -> None:
    """Look at the data, propose a recipe, see how fast it trains, and write it.

    Raises:
        ValueError: options that do not go together, a file that is there, or data that cannot be trained on.
        OSError: a shard cannot be read, or the file cannot be written.
    """
    _check_options(args)
    from flipscale.data.recipe import DataRecipe
    from flipscale.data.sources.opening import open_shards
    from flipscale.data.tokenizers import check_tokenizer, load_tokenizer
    from flipscale.planning.proposal import LEAST_PAIRS, propose
    from flipscale.planning.survey import survey

    source = open_shards(args.shards, DataRecipe())
    if len(source) < LEAST_PAIRS:
        raise UserError(f"{args.shards} has {len(source)} pairs; {LEAST_PAIRS} are the least to train on")
    try:
        tokenizer = load_tokenizer(args.tokenizer, 64)
    except ValueError as error:
        raise UserError(f"{error}; `flipscale prepare tokenizer {args.shards} DIR` makes one of the captions") from None
    data = survey(source, tokenizer)
    print(f"{args.shards}: {data}", flush=True)
    num_gpus = args.num_gpus if args.gpu else _gpus_here()
    minutes = 60 * args.hours if args.gpu else args.minutes or _MINUTES
    proposal = propose(data, _of_tokenizer(args.tokenizer, tokenizer), minutes, usable_cores(), num_gpus)
    _add_places(proposal, args, num_gpus)
    check_tokenizer(tokenizer, _recipe_of(proposal, 0).model_config().text_config)
    samples, speed = _length(args, proposal, data, minutes)
    command = _command(args)
    text = _written(proposal, [f"Data: {data}", f"Time: {speed}"], command, samples)
    args.recipe.parent.mkdir(parents=True, exist_ok=True)
    with open(args.recipe, "x", encoding="utf-8") as file:
        file.write(text)
    from flipscale.training.recipe import parse_recipe

    parse_recipe(["--config", str(args.recipe.absolute())])
    for warning in proposal.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{args.recipe}: {speed}")
    print(f"next: {command}")


def _check_options(args: argparse.Namespace) -> None:
    for name in ("recipe", "shards", "tokenizer", "tests"):
        if not is_utf8(str(getattr(args, name))):
            raise UserError(f"{name} has letters in its name that no recipe can have: they are not UTF-8; rename it")
    if os.path.lexists(args.recipe):
        raise UserError(f"{args.recipe} is there already; name another file, or remove it")
    check_writable(args.recipe, "recipe")
    if args.recipe.suffix not in (".yaml", ".yml"):
        raise UserError(f"{args.recipe} has no ending .yaml, by which a recipe is known; name a file such as mine.yaml")
    if (args.gpu is None) != (args.hours is None):
        raise UserError("gpu and hours go together, for machines elsewhere; give both, or minutes for this machine")
    if args.gpu is not None and args.minutes is not None:
        raise UserError("minutes is for this machine and gpu for others; leave one of them out")
    if args.gpu is None and args.num_gpus != 1:
        raise UserError("num_gpus is of machines elsewhere; add gpu and hours, or leave it out")
    if args.gpu is not None:
        from flipscale.planning.proposal import gpu_named

        gpu_named(args.gpu)


def _gpus_here() -> int:
    import torch

    return 1 if torch.cuda.is_available() else 0


def _gib_here() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory // 2**30


def _of_tokenizer(name: str, tokenizer: Any) -> dict[str, int]:
    """Return the fields of the text tower that a tokenizer asks for; where it is a folder, vocab_size follows it."""
    from flipscale.data.tokenizers import num_entries

    vocabulary = {} if Path(name).is_dir() else {"vocab_size": num_entries(tokenizer)}
    return {**vocabulary, **({"pad_token_id": tokenizer.pad_token_id} if tokenizer.pad_token_id else {})}


def _add_places(proposal: "Proposal", args: argparse.Namespace, num_gpus: int) -> None:
    """Add what the user named: data, tokenizer, test set and the run directory."""
    fields = proposal.fields
    fields["data"] = {"shards": args.shards, "tokenizer": args.tokenizer, **fields["data"]}
    if args.tests:
        workers = {} if num_gpus else {"num_workers": fields["data"]["num_workers"]}
        fields["eval"] = {"tasks": list(_tasks(args.tests)), **workers}
    fields["output_dir"] = f"runs/{args.recipe.stem}"


def _tasks(folder: str) -> Iterator[dict[str, Any]]:
    """Yield the evaluations that a test set allows: by its class names, and by its captions.

    Raises:
        ValueError: it is no test set, or has neither.
    """
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
            f"tests {folder} has no classnames.txt and no captions, so that nothing can be asked of its pictures; "
            "`flipscale prepare shards --labels` writes a test set"
        )


def _length(args: argparse.Namespace, proposal: "Proposal", data: "Survey", minutes: float) -> tuple[int, str]:
    """Return how many pairs a run of `minutes` sees, and in words how fast it is and how often it sees each of them."""
    from flipscale.planning.proposal import most_samples, samples_in

    if not args.gpu and _gpus_here():
        _fitted(proposal, 1, _gib_here())
    rates, how = _computed(args, proposal) if args.gpu else _measured(proposal)
    in_time, useful = samples_in(60 * minutes, rates, proposal), most_samples(data, proposal)
    if in_time < proposal.batch_size:
        raise UserError(f"{minutes:g} minutes are less than a step takes; give more of them, or of hours")
    samples = min(in_time, useful)
    took = minutes * samples / in_time
    epochs = samples / data.pairs
    units = (("hours", 1 / 60), ("minutes", 1), ("seconds", 60))
    unit, factor = next(one for one in units if took * one[1] >= 2 or one[0] == "seconds")
    length = f"{took * factor:,.0f} {unit}"
    words = (
        f"{samples:,} pairs in {length} of training, at {rates[0]:,.0f} pairs/s masked and {rates[1]:,.0f} whole, {how}"
    )
    times = f"{epochs:,.0f} times each pair" if epochs >= 2 else f"{epochs:.0%} of the pairs"
    if samples < in_time:
        times += "; more pairs would teach it more than more time"
    return samples, f"{words}; {times}"


def _measured(proposal: "Proposal") -> tuple[list[float], str]:
    """Return the pairs a second of both stages on this machine."""
    from flipscale.planning.calibration import measured_rates

    print(f"measuring the speed: {_CALIBRATION_STEPS} steps of each stage", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rates = measured_rates(_recipe_of(proposal, 0), _CALIBRATION_STEPS, Path(folder))
    return rates, "as measured here"


def _computed(args: argparse.Namespace, proposal: "Proposal") -> tuple[list[float], str]:
    """Return the pairs a second of both stages on GPUs that are elsewhere, and add what their memory asks for."""
    from flipscale.engines.device import BF16_PEAKS
    from flipscale.planning.proposal import GPU_GIB, gpu_named
    from flipscale.planning.time import Hardware, step_time

    name = gpu_named(args.gpu)
    recipe, launch = _fitted(proposal, args.num_gpus, GPU_GIB[name])
    hardware = Hardware(peak=BF16_PEAKS[name])
    seconds = [step_time(recipe, launch, stage, hardware).seconds for stage in recipe.stages]
    return [proposal.batch_size / one for one in seconds], f"as computed for {args.num_gpus} {name} (docs/planning.md)"


def _fitted(proposal: "Proposal", num_gpus: int, gib: int) -> tuple["Recipe", Any]:
    """Return the recipe and a launch that fits GPUs of `gib`; what it takes becomes part of the proposal.

    Raises:
        ValueError: nothing that is known here fits.
    """
    from flipscale.engines.launch import Launch
    from flipscale.planning.dry_run import USABLE
    from flipscale.planning.memory import recipe_memory

    launch = Launch(num_processes=num_gpus, precision="bf16", processes_per_node=min(num_gpus, _GPUS_OF_A_NODE))
    pairs = proposal.batch_size // num_gpus
    model, data = proposal.fields["model"], proposal.fields["data"]
    # Nothing; activations recomputed, a third more time that may save most of the memory; and micro-batches.
    for parts in (0, 1, *(parts for parts in (2, 4, 8, 16, 32, 64) if pairs % parts == 0)):
        if parts:
            model["gradient_checkpointing"] = True
        if parts > 1:
            data["micro_batch_size"] = pairs // parts
        recipe = _recipe_of(proposal, 0)
        if recipe_memory(recipe, launch).total <= USABLE * gib * 2**30:
            return recipe, launch
    raise UserError(
        f"the model and a batch of {proposal.batch_size} do not fit {num_gpus} GPUs of {gib} GiB under DDP; use more "
        "or larger GPUs, or a recipe of your own under FSDP2"
    )


def _written(proposal: "Proposal", found: list[str], command: str, samples: int) -> str:
    """Return the text of the recipe of a run of `samples` pairs.

    Args:
        found: sentences for its head.
    """
    from flipscale.planning.commented import commented_yaml

    stages = proposal.stages(samples)
    total = sum(stage["samples"] for stage in stages)
    often = max(total // 60, proposal.batch_size)
    fields = {**proposal.fields, "stages": stages, "log": {"every_samples": often}, "save": {"every_minutes": 10}}
    if "eval" in fields:
        fields["eval"] = {"every_samples": max(total // 6, proposal.batch_size), **fields["eval"]}
    reasons = {
        **proposal.reasons,
        "stages[0].base_lr": f"per 256 pairs: {proposal.base_lr * proposal.batch_size / 256:.2g} for the batch",
        "stages[0].warmup_samples": "a twentieth, in which the rate grows",
        "stages[1].name": "the model sees whole pictures, as it will when it is used",
    }
    head = [
        "Written by `flipscale init`. Change what you like: reasons stand beside the fields, and `flipscale pretrain "
        "--help` explains all that there are.",
        *(f"{sentence}." for sentence in found),
        *(f"Warning: {warning}." for warning in proposal.warnings),
        command,
    ]
    order = ("model", "data", "optim", "stages", "log", "save", "eval", "output_dir")
    return commented_yaml(head, {name: fields[name] for name in order if name in fields}, reasons)


def _recipe_of(proposal: "Proposal", samples: int) -> "Recipe":
    """Return the proposal as a recipe of a run of `samples` pairs, a step of each stage at least.

    Raises:
        ValueError: the data cannot be used so.
    """
    from flipscale.training.recipe import parse_recipe

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        # JSON is YAML.
        file.write_text(json.dumps({**proposal.fields, "stages": proposal.stages(samples)}), encoding="utf-8")
        return parse_recipe(["--config", str(file)])


def _command(args: argparse.Namespace) -> str:
    """Return the command that trains the recipe where it is meant to be trained."""
    files = "" if Path("ds_configs/ddp.yaml").exists() else "flipscale launch_files . && "
    recipe, run_dir = shlex.quote(str(args.recipe)), shlex.quote(f"runs/{args.recipe.stem}")
    if args.gpu and args.num_gpus > _GPUS_OF_A_NODE:
        nodes = -(-args.num_gpus // _GPUS_OF_A_NODE)
        where = f"RECIPE={recipe} RUN={run_dir} LAUNCH_FILE=ds_configs/ddp.yaml"
        return f"{files}{where} bash slurm/pretrain.sh --nodes={nodes}"
    if args.gpu and args.num_gpus > 1:
        launcher = f"accelerate launch --config_file ds_configs/ddp.yaml --num_processes {args.num_gpus}"
        return f"{files}{launcher} -m flipscale.pretrain --config {recipe}"
    return f"flipscale pretrain --config {recipe}"
