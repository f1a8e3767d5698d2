"""Evaluate a model folder or Hub name: zero-shot classification, retrieval, or any task that a recipe may list."""

import argparse
import json
from collections.abc import Callable
from typing import Any

import yaml
from accelerate import Accelerator

from flipscale.engines.device import best_attention
from flipscale.engines.start import start_accelerator
from flipscale.evaluation.embedders import open_clip, transformers_model
from flipscale.evaluation.embedders.masked import WHOLE, ImageMask, add_mask_arguments, asked_masks, masked_embedder
from flipscale.evaluation.embedders.open_clip import open_clip_embedder
from flipscale.evaluation.embedders.transformers_model import transformers_embedder
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.kinds import KINDS
from flipscale.evaluation.kinds.templates import TEMPLATES
from flipscale.evaluation.reports.mask_table import MaskedResults, draw_masked_results, mask_table
from flipscale.evaluation.results import Result, as_metrics, with_unit
from flipscale.evaluation.suite import build_tasks, evaluate_tasks
from flipscale.hub.loading import load_flip

# Models that are not ours, by what their names begin with.
OTHERS: dict[str, Callable[..., Embedder]] = {
    open_clip.PREFIX: open_clip_embedder,
    transformers_model.PREFIX: transformers_embedder,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale evaluate`."""
    parser.add_argument(
        "model",
        help="A model folder, such as runs/demo/model, a Hub name, a model of open_clip: open_clip:NAME,PRETRAINED, or "
        "a CLIP or SigLIP of transformers: hf:NAME, a Hub name or a folder.",
    )
    parser.add_argument(
        "--zero_shot",
        metavar="DIR",
        help="Classify the images of this folder: shards with KEY.cls, and classnames.txt.",
    )
    parser.add_argument(
        "--retrieval", metavar="DIR", help="Retrieve images and captions of this folder: shards with KEY.txt."
    )
    parser.add_argument(
        "--task",
        metavar="YAML",
        action="append",
        default=[],
        help="Do an evaluation as a recipe's eval.tasks has it, such as '{kind: retrieval, data: DIR, ks: [1, 100]}'. "
        f"The kinds are {', '.join(KINDS)}. May be given several times.",
    )
    parser.add_argument(
        "--templates", choices=sorted(TEMPLATES), help="Use a set of CLIP's prompts instead of the folder's own."
    )
    parser.add_argument(
        "--batch_size", type=int, default=256, help="How many images or texts a process embeds at once; 256 by default."
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        default=4,
        help="How many processes decode images; 4 by default, 0 decodes in this process.",
    )
    add_mask_arguments(parser)
    parser.add_argument("--json", action="store_true", help="Print one JSON line instead of a table.")


def run(args: argparse.Namespace) -> None:
    """Print the results that were asked for.

    Raises:
        ValueError: nothing to evaluate, or a model that cannot be loaded.
    """
    tasks = build_tasks(_listed(args))
    if not tasks:
        raise ValueError(
            "nothing to evaluate; give --zero_shot DIR, --retrieval DIR or --task '{kind: ..., data: ...}'"
        )
    for task in tasks:
        task.check()
    accelerator = start_accelerator([], ".")
    embedder = open_embedder(args.model, accelerator, args.batch_size, args.num_workers)
    masks = asked_masks(args, embedder)
    found = [(mask, evaluate_tasks(masked_embedder(embedder, mask), tasks)) for mask in masks]
    if accelerator.is_main_process:
        if masks == [WHOLE]:
            print(json.dumps(as_metrics(found[0][1])) if args.json else as_table(found[0][1]))
        else:
            _print_masked(args, [_with_flops(embedder, mask, results) for mask, results in found])
    accelerator.end_training()


def _print_masked(args: argparse.Namespace, rows: list[MaskedResults]) -> None:
    """Print accuracy against the encoder's FLOPs, and draw it if asked to."""
    print(json.dumps([row.as_json() for row in rows]) if args.json else mask_table(rows))
    if args.mask_figure:
        draw_masked_results(rows, args.mask_figure)


def _with_flops(embedder: Embedder, mask: ImageMask, results: list[Result]) -> MaskedResults:
    """Return the results under a mask beside the operations of the image tower and its projection."""
    from flipscale.planning.flops import forward_flops

    counts = [forward_flops(embedder.model.config, m.ratio, m.views).modules for m in (mask, WHOLE)]
    flops, whole = (count["vision_model"] + count["image_projection"] for count in counts)
    return MaskedResults(embedder.name, mask, flops, whole, results)


def as_table(results: list[Result]) -> str:
    """Return a line for each result: value, 95 % interval, number of queries and chance."""
    lines = []
    for result in results:
        interval = f"  {result.interval_text:>16}" if result.interval_text else ""
        queries = f"  n {result.n:,}" if result.n is not None else ""
        chance = f"  chance {with_unit(result.chance, result.unit)}" if result.chance is not None else ""
        lines.append(f"{result.name:<32}{result.value_text:>10}{interval}{queries}{chance}")
    return "\n".join(lines)


def _listed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the tasks that the arguments ask for, as a recipe lists them."""
    listed: list[dict[str, Any]] = []
    if args.zero_shot:
        templates = {"templates": args.templates} if args.templates else {}
        listed.append({"kind": "zero_shot", "data": args.zero_shot, **templates})
    if args.retrieval:
        listed.append({"kind": "retrieval", "data": args.retrieval})
    for text in args.task:
        try:
            task = yaml.safe_load(text)
        except yaml.YAMLError:
            task = None
        if not isinstance(task, dict):
            raise ValueError(f"--task is {text!r}; write it like '{{kind: retrieval, data: DIR}}'")
        listed.append(task)
    return listed


def open_embedder(name: str, accelerator: Accelerator, batch_size: int = 256, num_workers: int = 0) -> Embedder:
    """Return the embedder of a model: a folder or Hub name of ours, `open_clip:NAME,PRETRAINED`, or `hf:NAME`.

    Raises:
        ValueError: it cannot be loaded.
    """
    for prefix, other in OTHERS.items():
        if name.startswith(prefix):
            return other(name.removeprefix(prefix), accelerator, batch_size, num_workers)
    model, tokenizer = load_flip(name)
    model.set_attn_implementation(best_attention(accelerator.device))
    return Embedder(model.to(accelerator.device), tokenizer, accelerator, batch_size, num_workers, name=name)
