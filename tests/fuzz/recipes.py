"""The bytes of a recipe."""

from contextlib import suppress
from pathlib import Path

from flipscale.training.recipe import RECIPES, parse_recipe


def seeds() -> list[bytes]:
    """The recipes of the package."""
    return [file.read_bytes() for file in sorted(RECIPES.glob("*.yaml"))]


def attack(data: bytes, folder: Path) -> None:
    """Parse the recipe."""
    file = folder / "recipe.yaml"
    file.write_bytes(data)
    with suppress(ValueError):
        parse_recipe(["--config", str(file)])
