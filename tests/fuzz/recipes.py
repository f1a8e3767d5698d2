"""The bytes of a recipe."""

from contextlib import suppress
from pathlib import Path

from flipscale.objectives.build_objective import build_config, build_objective
from flipscale.recipe.files import RECIPES
from flipscale.recipe.recipe import to_yaml
from flipscale.recipe.schedule import schedule_stages
from flipscale.start.complete_recipe import parse_recipe

_EXAMPLES = Path(__file__).parents[2] / "examples"
# Fields that no recipe there has.
_OTHERS = b"""
model: {init_from: runs/start, text_positions: longclip, text_config: {max_position_embeddings: 248}}
data: {teachers: [a], sources: [{shards: a, weights: w, weight: 2}, {dataset: b, caption_columns: [txt], weight: 1}]}
optim: {lora: {rank: 8, alpha: 16, towers: [vision_model], modules: [q_proj, fc1]}, part_lr_ratios: {vision_model: 0.1}}
stages: [{name: one, share: 1.0, warmup_share: 0.1, base_lr: 1e-3, captions: {alt: 1}}]
budget_minutes: 3
"""


def seeds() -> list[bytes]:
    """The recipes of the package and of the examples, and further fields."""
    return [*(file.read_bytes() for file in sorted([*RECIPES.glob("*.yaml"), *_EXAMPLES.rglob("*.yaml")])), _OTHERS]


def attack(data: bytes, folder: Path) -> None:
    """Parse the recipe, and ask of it what is asked before any data is opened."""
    file = folder / "recipe.yaml"
    file.write_bytes(data)
    with suppress(ValueError, OSError):
        recipe = parse_recipe(["--config", str(file)])
        build_config(recipe)
        build_objective(recipe)
        schedule_stages(recipe.stages, recipe.data.global_batch_size, recipe.budget_minutes)
        to_yaml(recipe)
