"""The help of every verb: each argument is explained in a sentence, and nothing heavy is imported for it."""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from flipscale import cli
from flipscale.cli import TRAINING, VERBS, main
from flipscale.data.masks import IMAGE_MASKS
from flipscale.evaluation.suite import KINDS
from flipscale.recipe.recipe import build_parser as recipe_parser


def parsers(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield a parser and its subparsers with their commands."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help for choice in action._choices_actions}
            for choice, below in action.choices.items():
                assert below.description == summaries[choice], f"{name} {choice}"
                yield from parsers(below, f"{name} {choice}")


# Each takes a second or seconds to import.
HEAVY = {*["torch", "transformers", "huggingface_hub", "accelerate", "datasets", "scipy", "cv2", "matplotlib"]}


def test_no_verb_s_help_imports_what_only_its_work_needs() -> None:
    code = f"""
import sys
from flipscale.cli import VERBS, main
for verb in VERBS:
    try: main([verb, "--help"])
    except SystemExit as ended: assert not ended.code, verb
    print(verb, *({HEAVY} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == list(VERBS)
    assert all(f"usage: flipscale {verb} " in done.stdout for verb in VERBS)


def parser_of(verb: str) -> argparse.ArgumentParser:
    """Return the parser with the help of a verb."""
    if verb in TRAINING:
        return recipe_parser(verb)
    return cli.build_parser(verb)._subparsers._group_actions[0].choices[verb]


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_argument_is_explained(verb: str) -> None:
    for name, below in parsers(parser_of(verb), f"flipscale {verb}"):
        texts = {"the command": below.description}
        texts |= {
            " ".join(action.option_strings) or action.dest: action.help
            for action in below._actions
            if not isinstance(action, (argparse._HelpAction, argparse._SubParsersAction))
        }
        for argument, text in texts.items():
            assert re.fullmatch(r"[A-Z`].*\.", text or "", re.DOTALL), f"{name}: {argument}: {text}"


def test_the_help_has_ranges_defaults_and_every_kind() -> None:
    text = " ".join(recipe_parser().format_help().split())
    for words in (
        r"--optim.adam_beta1 ADAM_BETA1 The decay of AdamW's .* at least 0 and below 1\], default: 0.9\)",
        r"--optim.name \{adamw,muon\} ",
        r"--stages.help ",
        r"--data.sources.help ",
        r"--data.augment MAPPING ",
        r"--print_config Print the whole recipe",
    ):
        assert re.search(words, text), words
    text, (*kinds, last) = " ".join(parser_of("evaluate").format_help().split()), IMAGE_MASKS
    assert f"The kinds are {', '.join(KINDS)}." in text
    assert f"Kind of masks: {', '.join(kinds)} or {last}. Default: random." in text


def test_the_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"{verb} {summary}" in printed for verb, summary in VERBS.items())
