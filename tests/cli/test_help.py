"""The help of every verb: each argument is explained in a sentence."""

import argparse
import importlib
from collections.abc import Iterator

import pytest

from flipscale.cli import VERBS, main
from flipscale.training.recipe import build_parser


def parsers(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """A parser and those below it, by their command."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help for choice in action._choices_actions}
            for choice, below in action.choices.items():
                assert below.description == summaries[choice], f"{name} {choice}"
                yield from parsers(below, f"{name} {choice}")


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - {"pretrain"}))
def test_every_argument_is_explained(verb: str) -> None:
    parser = argparse.ArgumentParser(description=VERBS[verb])
    importlib.import_module(f"flipscale.{verb}").add_arguments(parser)
    for name, below in parsers(parser, f"flipscale {verb}"):
        texts = {"the command": below.description}
        texts |= {
            " ".join(action.option_strings) or action.dest: action.help
            for action in below._actions
            if not isinstance(action, (argparse._HelpAction, argparse._SubParsersAction))
        }
        for argument, text in texts.items():
            assert text, f"{name}: {argument} is not explained"
            assert text[0].isupper(), f"{name}: {argument}: {text}"
            assert text.endswith("."), f"{name}: {argument}: {text}"


def test_every_field_of_a_recipe_is_explained() -> None:
    for action in build_parser()._actions:
        assert action.help, action.dest


def test_the_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"{verb} {summary}" in printed for verb, summary in VERBS.items())
