"""`flipscale VERB`: what each verb does is in the module of its name."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from flipscale.training.console import report_user_errors

VERBS = {
    "prepare": "write data: the demo set, shards and their indices",
    "pretrain": "pre-train a model by masking, then tune it unmasked, as a recipe says",
    "evaluate": "zero-shot classification and retrieval of a trained model",
    "status": "how far runs are, how fast, and whether they live",
    "export": "write a run's model as a folder that transformers loads",
    "study": "run recipes side by side at equal wall-clock and compare them",
    "push": "put a trained model on the Hub",
    "convert": "turn other checkpoints into a model folder",
    "launch_files": "write accelerate's launch files and the Slurm scripts into a folder",
    "bench": "measure speed and memory, one JSON line each",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the verb that `arguments` (by default the command line's) name."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["pretrain"]:
        # A recipe has a parser of its own.
        importlib.import_module("flipscale.pretrain").main(arguments[1:])
        return
    parser = argparse.ArgumentParser(prog="flipscale", description="Scaling language-image pre-training by masking.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, summary in VERBS.items():
        subparser = verbs.add_parser(verb, help=summary, description=summary)
        if arguments[:1] == [verb]:
            module = importlib.import_module(f"flipscale.{verb}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    with report_user_errors():
        parsed.run(parsed)


if __name__ == "__main__":
    main()
