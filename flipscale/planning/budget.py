"""A recipe of samples under a time budget: its stages get shares of the time."""

from dataclasses import replace

from flipscale.io.errors import UserError
from flipscale.recipe.recipe import Recipe
from flipscale.recipe.rules import check_rules


def with_time_shares(recipe: Recipe) -> Recipe:
    """Return a recipe with a time budget with shares in place of samples: the stages' shares of all operations. Other
    recipes stay. Raise UserError if it could not be run without its budget, or a stage is below a 10,000th of it."""
    stages = recipe.stages
    if recipe.budget_minutes is None or not recipe.counts_samples:
        return recipe
    check_rules(recipe)
    from flipscale.planning.flops import pair_flops  # runs a model, which takes seconds to import

    flops = pair_flops(recipe)
    work = [flops[stage.name] * (stage.samples or 0) for stage in stages]
    shares = [round(own / sum(work), 4) for own in work]
    longest = work.index(max(work))
    shares[longest] = round(shares[longest] + 1.0 - sum(shares), 4)  # it absorbs the rounding of the others
    timed = []
    for stage, share in zip(stages, shares, strict=True):
        if share <= 0.0:
            raise UserError(f"stage {stage.name!r}: {stage.samples} samples have no share of time; give it more")
        warmup = round(share * stage.warmup_samples / (stage.samples or 1), 4)
        timed.append(replace(stage, samples=None, warmup_samples=0, share=share, warmup_share=warmup))
    return replace(recipe, stages=timed)
