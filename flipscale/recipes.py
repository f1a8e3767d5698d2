"""List the recipes that come with the package, and the commands that train them: `flipscale recipes`."""

import argparse
import re
import textwrap
from pathlib import Path

import yaml

from flipscale.io.text_table import plain_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing, because `flipscale recipes` has no arguments."""


def run(args: argparse.Namespace) -> None:
    """Print a line for each recipe, then the launch commands. The last line of a recipe's first comment is its own."""
    rows, launches = [["recipe", "size", "trains"]], dict[str, list[str]]()
    for file in sorted((Path(__file__).parent / "recipes").glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        *sentences, command = re.findall(r"^# (.*)", text.partition("\nmodel:")[0], re.MULTILINE)
        model = yaml.safe_load(text)["model"]
        size = "own" if "hidden_size" in model.get("vision_config", {}) else model["size"]
        rows.append([file.stem, size, re.split(r"[:.;]( |$)", " ".join(sentences))[0]])
        launches.setdefault(command.replace(file.stem, "RECIPE"), []).append(file.stem)
    print(plain_table(rows, ()))
    for command, names in launches.items():
        print("\n" + textwrap.fill(", ".join(names) + ":", 100) + f"\n  {command}")
