"""List the recipes that come with the package, and the commands that train them: `flipscale recipes`."""

import re
import textwrap
from dataclasses import dataclass
from itertools import takewhile

import yaml

from flipscale.io.text_table import plain_table
from flipscale.recipe.files import RECIPES, read_recipes
from flipscale.recipe.recipe import Recipe


@dataclass(frozen=True)
class Recipes:
    """List the recipes of the package, and the commands that train them."""

    def run(self) -> None:
        """Print a line for each recipe, then the launch commands, the last lines of their first comments."""
        rows, launches = [["recipe", "size", "trains"]], dict[str, list[str]]()
        for file in sorted(RECIPES.glob("*.yaml")):
            lines = file.read_text(encoding="utf-8").splitlines()
            *sentences, command = [line[2:] for line in takewhile(lambda line: line.startswith("# "), lines)]
            model = yaml.safe_load(read_recipes([file.stem], Recipe))["model"]
            size = "own" if "hidden_size" in model.get("vision_config", {}) else model["size"]
            rows.append([file.stem, size, re.split(r"[:.;]( |$)", " ".join(sentences))[0]])
            launches.setdefault(command.replace(file.stem, "RECIPE"), []).append(file.stem)
        print(plain_table(rows, ()))
        for command, names in launches.items():
            print("\n" + textwrap.fill(", ".join(names) + ":", 100) + f"\n  {command}")
