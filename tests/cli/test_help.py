"""The help of every verb: each argument is explained in a sentence, and nothing heavy is imported for it."""

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Iterator

import pytest

from flipscale.cli import TRAINING, VERBS, main, module_of
from flipscale.data.masks.image import IMAGE_MASKS
from flipscale.evaluation.kinds.kinds import KINDS
from flipscale.training.recipe import Recipe, build_parser, help_parser


def parsers(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """A parser and those below it, by their command."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help for choice in action._choices_actions}
            for choice, below in action.choices.items():
                assert below.description == summaries[choice], f"{name} {choice}"
                yield from parsers(below, f"{name} {choice}")


# Each takes a second or seconds to import.
HEAVY = {
    "torch",
    "transformers",
    "jsonargparse",
    "huggingface_hub",
    "accelerate",
    "datasets",
    "scipy",
    "cv2",
    "matplotlib",
}


def test_no_verb_s_help_imports_what_only_its_work_needs() -> None:
    code = """
import sys
from flipscale.cli import VERBS, main
for verb in VERBS:
    try: main([verb, "--help"])
    except SystemExit as ended: assert not ended.code, verb
    print(verb, *(HEAVY & set(sys.modules)), file=sys.stderr)
"""
    command = [sys.executable, "-c", f"HEAVY = {HEAVY}\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.split("\n")[:-1] == list(VERBS)
    assert all(f"usage: flipscale {verb} " in done.stdout for verb in VERBS)


def parser_of(verb: str) -> argparse.ArgumentParser:
    """What prints the help of a verb."""
    if verb in TRAINING:
        return help_parser(verb)
    parser = argparse.ArgumentParser(description=VERBS[verb])
    module_of(verb).add_arguments(parser)
    return parser


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_argument_is_explained(verb: str) -> None:
    parser = parser_of(verb)
    for name, below in parsers(parser, f"flipscale {verb}"):
        texts = {"the command": below.description}
        texts |= {
            " ".join(action.option_strings) or action.dest: action.help
            for action in below._actions
            if not isinstance(action, (argparse._HelpAction, argparse._SubParsersAction))
        }
        for argument, text in texts.items():
            assert text, f"{name}: {argument} is not explained"
            assert text[0].isupper() or text[0] == "`", f"{name}: {argument}: {text}"
            assert text.endswith("."), f"{name}: {argument}: {text}"


def test_the_help_of_pretrain_has_every_flag_that_is_parsed_and_no_other() -> None:
    sections = {field.name for field in dataclasses.fields(Recipe) if field.default_factory is field.type}
    assert {"optim", "data"} <= sections
    sections.add("data.augment")
    parsed = {flag for action in build_parser()._actions for flag in action.option_strings}
    shown = {flag for action in help_parser()._actions for flag in action.option_strings}
    # A section is set field by field; lists are written whole; the dry run parses its flags itself.
    parsed -= {flag for flag in parsed if flag.removeprefix("--") in sections or flag.endswith(("+", ".help"))}
    assert shown - {"--dry_run"} == parsed


def test_the_help_of_pretrain_has_ranges_defaults_and_the_fields_of_lists() -> None:
    text = " ".join(help_parser().format_help().split())
    for said in (
        "--optim.adam_beta1 X The decay of AdamW's mean of gradients; 0.9 in the paper's Table 10. At least 0 and "
        "below 1. Default: 0.9.",
        "--data.micro_batch_size N How many pairs a process keeps activations of at a time; null is all of its part.",
        "--optim.name {adamw,muon} The optimiser:",
        "stages[].mask_ratio The fraction of the patches that is removed; at 0 the images are seen whole, once.",
        "data.sources[].weight The share of the samples,",
    ):
        assert said in text, said


def test_the_help_of_evaluate_names_every_kind() -> None:
    text = " ".join(parser_of("evaluate").format_help().split())
    assert f"The kinds are {', '.join(KINDS)}." in text
    *kinds, last = IMAGE_MASKS
    assert f"The kind of masks: {', '.join(kinds)} or {last}; random by default." in text


def test_the_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"{verb} {summary}" in printed for verb, summary in VERBS.items())
