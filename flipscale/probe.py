"""Probe a frozen image tower with a linear classifier, by logistic regression or by the paper's LARS recipe."""

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from flipscale.evaluation.probe.recipe import LarsRecipe
from flipscale.evaluation.reports.models import check_writable, name_models
from flipscale.evaluation.results import Result, with_unit
from flipscale.io.options import (
    Count,
    CountOrZero,
    Pairs,
    Positive,
    Seed,
    ShareAboveZero,
    Workers,
    number,
    output_folder,
)

# What embeds and learns takes seconds to import, so it is where it is needed: `--help` waits for nothing.
if TYPE_CHECKING:
    from flipscale.evaluation.kinds.probe import Probe
    from flipscale.evaluation.reports.record import Line

_PAPER = LarsRecipe()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale probe`."""
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="A model as for `flipscale evaluate`; or, to compare with, pixels, hog or untrained:FOLDER.",
    )
    parser.add_argument(
        "--train",
        metavar="DIR",
        required=True,
        help="Learn from the images of this folder: shards with KEY.cls and classnames.txt, or the train/ of a folder "
        "that has train/ and test/.",
    )
    parser.add_argument(
        "--test", metavar="DIR", required=True, help="Test on this folder's images, or those of its test/."
    )
    parser.add_argument(
        "--validation",
        metavar="DIR",
        help="Choose the penalty by this folder's images; by default by a fifth of the training images. The last fit "
        "is to both.",
    )
    parser.add_argument(
        "--solver",
        choices=("lbfgs", "lars"),
        default="lbfgs",
        help="How to train: lbfgs, the default, is logistic regression on whole images, as CLIP's; lars is the paper's "
        "recipe: random crops, embedded anew each epoch.",
    )
    parser.add_argument(
        "--features",
        choices=("pooled", "embeds"),
        default="pooled",
        help="What is classified: pooled, the default, is before the projection, embeds is after it, of unit length.",
    )
    _add_solver_arguments(parser)
    parser.add_argument(
        "--batch_size",
        type=number(Pairs),
        default=256,
        help="How many images a process embeds at once; 256 by default.",
    )
    parser.add_argument(
        "--num_workers",
        type=number(Workers),
        default=4,
        help="How many processes decode images; 4 by default, 0 decodes in this process.",
    )
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        type=output_folder,
        help="Keep results.jsonl in DIR/MODEL; by default in a local model folder itself, those of others in "
        "evaluations/MODEL.",
    )
    parser.add_argument("--json", action="store_true", help="Print a JSON line with all that the figures depend on.")


def _add_solver_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed", type=number(Seed), default=0, help="Of the validation part, order, crops and weights."
    )
    parser.add_argument(
        "--l2",
        type=number(Positive),
        help="The penalty of lbfgs, 1 / C of scikit-learn; searched where it is left out.",
    )
    parser.add_argument("--epochs", type=number(Count), default=_PAPER.epochs, help="Of lars; 90 by default.")
    parser.add_argument(
        "--warmup_epochs", type=number(CountOrZero), default=_PAPER.warmup_epochs, help="Of lars; 10 by default."
    )
    parser.add_argument(
        "--global_batch_size",
        type=number(Pairs),
        default=_PAPER.batch_size,
        help="Images of a step of lars, of all processes together; 16,384 by default.",
    )
    parser.add_argument(
        "--base_lr",
        type=number(Positive),
        default=_PAPER.base_lr,
        help="The learning rate of lars for 256 images; 0.01 by default.",
    )
    parser.add_argument(
        "--crop_scale",
        type=number(ShareAboveZero),
        nargs=2,
        metavar=("LEAST", "MOST"),
        default=_PAPER.crop_scale,
        help="The share of the area that a crop of lars has; 0.08 to 1 by default.",
    )
    parser.add_argument("--batch_norm", action="store_true", help="Normalise each feature over the batch in lars.")


def run(args: argparse.Namespace) -> None:
    """Print the accuracy of the probe of each model, and append its lines to the `results.jsonl` of the model. What
    stands there is not done again.

    Raises:
        ValueError: an option or a set is wrong, a model cannot be loaded or is named twice, or a folder cannot be
            written to.
        OSError: a shard cannot be read, or a line cannot be written.
    """
    models = name_models(args.models, args.output_dir)  # before the imports, which take seconds
    from flipscale.engines.start import start_accelerator
    from flipscale.evaluation.reports.session import evaluate_model
    from flipscale.hub.loading import OpenModels, open_embedder

    probe = _probe(args)
    probe.check()
    accelerator = start_accelerator([], ".")
    for model in models if accelerator.is_main_process else []:
        check_writable(model.home)
    found: dict[str, list[Line]] = {}
    opened = OpenModels(len(models), lambda name: open_embedder(name, accelerator, args.batch_size, args.num_workers))
    for model in models:
        embedder = opened.open(model.given)
        if embedder is None:
            continue
        found[model.name] = evaluate_model(embedder, model, [probe])
    if accelerator.is_main_process:
        print(_as_json(found) if args.json else _as_text(found))
    opened.raise_faults()
    accelerator.end_training()


def _probe(args: argparse.Namespace) -> "Probe":
    """Return what the arguments ask for."""
    from flipscale.evaluation.kinds.probe import Probe

    recipe = LarsRecipe(
        base_lr=args.base_lr,
        batch_size=args.global_batch_size,
        epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        batch_norm=args.batch_norm,
        crop_scale=tuple(args.crop_scale),
        seed=args.seed,
    )
    return Probe(
        *("probe", args.test, "probe"),
        train=args.train,
        validation=args.validation or "",
        solver=args.solver,
        features=args.features,
        l2=args.l2,
        lars=recipe,
        seed=args.seed,
    )


def _as_json(found: dict[str, list["Line"]]) -> str:
    """Return the lines of all models, with everything that made them, as one line of JSON."""
    return json.dumps(
        {name: [{**dataclasses.asdict(line.result), **line.about} for line in lines] for name, lines in found.items()}
    )


def _as_text(found: dict[str, list["Line"]]) -> str:
    """Return the figures of all models, each with how it was reached."""
    blocks = [
        "\n".join([name, *(f"  {_shown(line.result)}" for line in lines), f"  {_how(lines[0].result)}"])
        for name, lines in found.items()
    ]
    return "\n".join(blocks)


def _shown(result: Result) -> str:
    """Return value, 95 % interval, number of images, and what the commonest class or a guess would achieve."""
    chance = with_unit(result.chance, result.unit) if result.chance is not None else ""
    return f"{result.shown:<16}{result.value_text:>8}  {result.interval_text:>14}  n {result.n:,}  chance {chance}"


def _how(result: Result) -> str:
    """Return a sentence of how a result was reached."""
    made = result.made_by
    features = {"pooled": "pooled features (before the projection)", "embeds": "embeddings (after the projection)"}
    text = f"{made['solver']} on the {features[made['features']]} of {made['num_train']:,} images"
    if made["solver"] == "lars":
        return f"{text}: {made['steps']:,} steps of {made['batch_size']:,} random crops"
    searched = made.get("validation_top1")
    chosen = f" (validation top-1 {searched:.1f} %)" if searched is not None else ""
    ended = "" if made["converged"] else ", not converged"
    return f"{text}: l2 {made['l2']:.3g}{chosen}, {made['iterations']:,} steps{ended}"
