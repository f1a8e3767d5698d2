"""A recipe from the command line, checked against the kinds of losses, masks and evaluations, and completed."""

import dataclasses
from collections.abc import Sequence

from flipscale.data.masks import IMAGE_MASKS, TEXT_MASKS, check_kind
from flipscale.evaluation.suite import planned_tasks
from flipscale.objectives.build_objective import with_options
from flipscale.recipe.recipe import Recipe, parse_fields
from flipscale.start.pretrained_fields import with_vocabulary


def parse_recipe(arguments: Sequence[str], is_saved: bool = False) -> Recipe:
    """Return the recipe of command-line `arguments`, see `parse_fields`.

    Args:
        is_saved: whether a run wrote the recipe. Its model is complete then, and the tokenizer's folder is not read.

    Raises:
        UserError: a field is wrong, or the tokenizer's folder cannot be loaded.
        SystemExit: `--help` was among the arguments and is printed.
    """
    recipe = parse_fields(arguments)
    check_kind(recipe.mask.kind, IMAGE_MASKS, "mask.kind")
    check_kind(recipe.mask.text_kind, TEXT_MASKS, "mask.text_kind")
    planned_tasks(recipe.eval)
    recipe = dataclasses.replace(recipe, loss=with_options(recipe.loss))
    return recipe if is_saved else with_vocabulary(recipe)
