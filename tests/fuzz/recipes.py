"""The bytes of a recipe."""

from contextlib import suppress
from pathlib import Path

from flipscale.training.recipe import RECIPES, parse_recipe, to_yaml
from flipscale.training.schedule import plan_stages


def seeds() -> list[bytes]:
    """The recipes of the package."""
    return [file.read_bytes() for file in sorted(RECIPES.glob("*.yaml"))]


def attack(data: bytes, folder: Path) -> None:
    """Parse the recipe, and ask of it what is asked before any data is opened."""
    file = folder / "recipe.yaml"
    file.write_bytes(data)
    with suppress(ValueError):
        recipe = parse_recipe(["--config", str(file)])
        recipe.model_config()
        plan_stages(recipe.stages, recipe.data.global_batch_size, recipe.budget_minutes)
        to_yaml(recipe)
