"""The checks of a recipe's fields, which each start, `--dry_run` and `flipscale check` make before they open data."""

from pathlib import Path

from flipscale.engines.build_engine import engine_class
from flipscale.engines.launch import Launch
from flipscale.hub.card import read_audit
from flipscale.hub.push import target_of
from flipscale.io.errors import UserError
from flipscale.io.model_folder import is_path
from flipscale.recipe.recipe import Recipe
from flipscale.start.evaluations import tasks_of
from flipscale.start.setup import check_settings, open_tokenizer


def check_recipe(recipe: Recipe, launch: Launch, reads_files: bool = False, reads_start: bool = False) -> None:
    """Raise UserError if a start in `launch` would refuse the recipe. A start reads its files later.

    Args:
        reads_files: whether to read the audit, and a tokenizer on this machine.
        reads_start: whether to read the start weights, and to compare their vocabulary.
    """
    objective, config, _ = check_settings(recipe, (0, launch.num_processes))
    tasks_of(recipe, objective, config)
    target_of(recipe.hub)
    model, tokenizer, rows = recipe.model, recipe.data.tokenizer, None
    if refusal := engine_class(launch).refusal(launch, recipe.optim.name, bool(model.compile)):
        raise UserError(refusal)
    if reads_files and recipe.hub.audit:
        read_audit(recipe.hub.audit)
    if reads_files and (is_path(tokenizer) or Path(tokenizer).is_dir()):
        _, rows = open_tokenizer(recipe, objective, config, reads_start)
    if reads_start and not (model.text_rows and rows is None):
        from flipscale.engines.first_weights import initial_weights  # imports the models

        kind = objective.trained_class(config)
        initial_weights(model.start, config, recipe.seed, kind, model.text_positions, rows=rows)
