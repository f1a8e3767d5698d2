"""A recipe of samples under a time budget: its stages get shares of the time."""

from dataclasses import replace

from flipscale.training.recipe import Recipe
from flipscale.training.schedule import plan_stages


def in_shares(recipe: Recipe) -> Recipe:
    """Return a recipe with a time budget with shares in place of samples: the stages' shares of all operations.

    Recipes without a budget, or with shares, stay as they are.

    Raises:
        UserError: the recipe could not be run without its budget.
    """
    stages = recipe.stages
    is_counted = all(stage.samples and stage.share is None and not stage.warmup_share for stage in stages)
    if recipe.budget_minutes is None or not is_counted:
        return recipe
    plan_stages(stages, recipe.data.global_batch_size)
    flops = {stage.name: 1 for stage in stages}
    if len(stages) > 1:
        from flipscale.planning.flops import pair_flops  # runs a model, which takes seconds to import

        flops = pair_flops(recipe)
    work = [flops[stage.name] * (stage.samples or 0) for stage in stages]
    shares = [max(round(own / sum(work), 4), 0.0001) for own in work]
    longest = work.index(max(work))
    shares[longest] = round(shares[longest] + 1.0 - sum(shares), 4)  # it absorbs the rounding of the others
    timed = []
    for stage, share in zip(stages, shares, strict=True):
        warmup = round(share * stage.warmup_samples / (stage.samples or 1), 4)
        timed.append(replace(stage, samples=None, warmup_samples=0, share=share, warmup_share=warmup))
    return replace(recipe, stages=timed)
