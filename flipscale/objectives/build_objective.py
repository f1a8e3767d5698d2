"""The objective of a recipe, and the configuration of the model that it trains."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from flipscale.io.errors import UserError
from flipscale.io.options import check_ranges
from flipscale.recipe.loss import LossRecipe
from flipscale.recipe.recipe import Recipe

if TYPE_CHECKING:
    from flipscale.model.configuration_flip import FlipConfig
    from flipscale.objectives.objective import Objective

# The share of MobileCLIP-B on DataCompDR-1B (github.com/apple/ml-mobileclip, training/configs/run_datacompdr1b.sh).
_TEACHER_WEIGHT = 0.75


@functools.cache
def loss_kinds() -> dict[str, type["Objective"]]:
    """Return the class of every `loss.kind`. To add a kind, import its class here and name it."""
    # The classes import the models, which takes seconds.
    from flipscale.objectives.answer import Answer
    from flipscale.objectives.captioning import CaptionLoss
    from flipscale.objectives.classify import Classify
    from flipscale.objectives.contrastive import Contrastive
    from flipscale.objectives.sigmoid import Sigmoid

    return {
        "infonce": Contrastive,
        "sigmoid": Sigmoid,
        "captioning": CaptionLoss,
        "classify": Classify,
        "answer": Answer,
    }


def with_options(loss: LossRecipe) -> LossRecipe:
    """Return a section `loss` with all options of its kind, which the run directory records. Raise UserError if the
    kind or an option is unknown."""
    if (loss.kind, loss.options) == ("infonce", {}):
        return loss  # the imports below take seconds
    if loss.kind not in loss_kinds():
        raise UserError(f"loss.kind is {loss.kind!r}; use {' or '.join(map(repr, loss_kinds()))}")
    kind = loss_kinds()[loss.kind]
    from jsonargparse import ArgumentError, ArgumentParser

    from flipscale.objectives.objective import Objective

    shared = {f.name for f in dataclasses.fields(Objective)}
    known = [f.name for f in dataclasses.fields(kind) if f.name not in shared]
    for name in loss.options:
        if name not in known:
            rule = f"its options are {', '.join(known)}" if known else "it has none"
            raise UserError(f"loss.options.{name} is not an option of loss.kind {loss.kind!r}; {rule}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, skip=shared)
    try:
        return dataclasses.replace(loss, options=parser.parse_object(loss.options).as_dict())
    except ArgumentError as error:
        raise UserError(f"loss.options of loss.kind {loss.kind!r}: {' '.join(str(error).split())}") from None


def build_objective(recipe: Recipe) -> "Objective":
    """Return the training objective, with its `data.teachers`. Raise UserError if the kind or an option is wrong."""
    from flipscale.objectives.captioning import WithCaptions
    from flipscale.objectives.reconstruction import WithReconstruction
    from flipscale.objectives.teachers import Distilled

    loss = with_options(recipe.loss)
    shared: dict[str, Any] = {"positives": loss.positives, "captions_per_image": loss.captions_per_image}
    objective = loss_kinds()[loss.kind](**shared, **loss.options)
    check_ranges(objective, "loss.options")
    if recipe.data.teachers:
        weight = _TEACHER_WEIGHT if loss.teacher_weight is None else loss.teacher_weight
        objective = Distilled(teacher_weight=weight)
    second: dict[str, Any] = {"other": objective, "positives": loss.positives}
    if loss.caption_weight > 0.0:
        return WithCaptions(**second, weight=loss.caption_weight, prediction=loss.caption_kind)
    if loss.reconstruction_weight > 0.0:
        return WithReconstruction(**second, weight=loss.reconstruction_weight)
    return objective


def build_config(recipe: Recipe) -> "FlipConfig":
    """Return the model's configuration, with the loss parameters that the objective needs. Raise UserError if the
    section `model` is wrong, or does not fit the loss, the packing or a stage's image size."""
    from flipscale.model.configuration_flip import patches_along  # seconds to import

    model = recipe.model
    config = build_objective(recipe).model_config(model.config())
    if recipe.data.pack_captions and not config.packs_captions:
        fix = " or set model.text_config.attend_to_padding to false" if model.family == "flip" else ""
        raise UserError(
            f"data.pack_captions is true, and captions of this model.family {model.family!r} see their padding; "
            f"leave it out{fix}"
        )
    patch_size = config.vision_config.patch_size
    for stage in recipe.stages:
        try:
            patches_along(patch_size if stage.image_size is None else stage.image_size, patch_size)
        except ValueError as error:
            raise UserError(f"stage {stage.name!r}: {error}") from None
    return config
