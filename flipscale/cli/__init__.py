"""The command `flipscale VERB`. Each verb is the module of its name."""

import importlib
import resource
import sys
from collections.abc import Sequence

from flipscale.io.command_line import Command, Parser, add_commands, others_field
from flipscale.process.console import report_user_errors
from flipscale.process.state import use_utf8, without_collector

VERBS = {
    "prepare": "Prepare data: write, index, inspect and audit shards, train tokenizers, and download test sets.",
    "init": "Write a recipe for your data, your machine and your time.",
    "recipes": "List the recipes of the package, and the commands that train them.",
    "plan": "Compute the hours, energy, money and CO2 of recipes before they are trained.",
    "check": "Check recipes, flags and a launch file in seconds, before they wait in a queue.",
    "pretrain": "Train a model as a recipe says: masked pre-training, then unmasked tuning.",
    "finetune": "Fine-tune the model of `model.init_from` as a recipe says, such as to name classes.",
    "evaluate": "Evaluate a trained model by zero-shot classification, retrieval or other tasks.",
    "search": "Find the pictures of a folder that are nearest to words, and write a page for a browser.",
    "compare": "Compare runs by their recipes, curves and last results, and write a page for a browser.",
    "status": "Print the progress and speed of runs, and whether they are alive.",
    "export": "Write the model of a checkpoint as a folder that transformers loads.",
    "study": "Train several recipes as one study, and compare them.",
    "push": "Upload a trained model to the Hugging Face Hub.",
    "convert": "Convert models from and to the formats of other programs.",
    "launch_files": "Write accelerate's launch files and the Slurm scripts into a folder.",
    "bench": "Check the GPUs of one or several nodes, and measure the training step on them.",
}

# Verbs with a recipe's own parser, whose help needs none of the training's imports.
TRAINING = ("pretrain", "finetune")
_LEAST_MEMORY = 1_500_000_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb by its arguments, by default the command line's."""
    if arguments is None:
        use_utf8()
    with report_user_errors():
        _run(list(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> None:
    if arguments and arguments[0] in TRAINING:
        if {"-h", "--help"} & set(arguments) and "--dry_run" not in arguments:
            importlib.import_module("flipscale.recipe.recipe").build_parser(arguments[0]).parse_args(["--help"])
        if 0 <= resource.getrlimit(resource.RLIMIT_AS)[0] < _LEAST_MEMORY:
            raise MemoryError("training's libraries need 1.5 GB")  # below, their import may end in a segmentation fault
        with without_collector():
            return importlib.import_module("flipscale.pretrain").main(arguments[1:])
    parse(arguments).run()


def parse(arguments: Sequence[str]) -> Command:
    """Return the dataclass of a command line of a verb without training."""
    parser = build_parser(arguments[0] if arguments else "")
    namespace, others = parser.parse_known_args(arguments)
    parsed = vars(namespace)
    command = parsed.pop("command")
    if name := others_field(command):
        parsed[name] = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return command(**parsed)


def build_parser(verb: str) -> Parser:
    """Return the parser of all verbs, with the arguments of one verb."""
    parser = Parser(prog="flipscale", description="Scaling language-image pre-training by masking.")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, summary in VERBS.items():
        subparser = verbs.add_parser(name, help=summary, description=summary)
        if name == verb:
            module = importlib.import_module(f"flipscale.cli.{verb}")
            # The dataclass is called as the verb is.
            add_commands(subparser, getattr(module, "COMMANDS", None) or getattr(module, verb.title().replace("_", "")))
            parser.prog = subparser.prog  # because argparse reports a verb's unknown arguments here
    return parser
