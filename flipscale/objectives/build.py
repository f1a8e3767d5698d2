"""The objective of a recipe, and the configuration of the model that it trains."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from flipscale.io.errors import UserError
from flipscale.io.options import check_ranges, refuse_set
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
    kind or an option is unknown, or the kind does not take the matches."""
    if (loss.kind, loss.positives, loss.options) == ("infonce", "pairs", {}):
        return loss  # the imports below take seconds
    if loss.kind not in loss_kinds():
        raise UserError(f"loss.kind is {loss.kind!r}; use {' or '.join(map(repr, loss_kinds()))}")
    kind = loss_kinds()[loss.kind]
    if loss.positives != "pairs" and not kind.takes_equal_captions:
        raise UserError(
            f"loss.positives is {loss.positives!r} with loss.kind {loss.kind!r}; leave it out, or use loss.kind "
            "'sigmoid' (infonce learned the same with it as with 'pairs')"
        )
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
    """Return the training objective, with its `data.teachers`. Raise UserError if the section `loss` is wrong."""
    from flipscale.objectives.captioning import WithCaptions
    from flipscale.objectives.contrastive import Distilled, PairLoss
    from flipscale.objectives.objective import Objective
    from flipscale.objectives.reconstruction import WithReconstruction

    loss, mask, teachers = with_options(recipe.loss), recipe.mask, recipe.data.teachers
    dims = tuple(loss.prefix_dims)
    shared: dict[str, Any] = {"captions_per_image": loss.captions_per_image, "prefix_dims": dims}
    objective = loss_kinds()[loss.kind](positives=loss.positives, **shared, **loss.options)
    check_ranges(objective, "loss.options")
    if list(dims) != sorted(set(dims)):
        raise UserError(f"loss.prefix_dims is {loss.prefix_dims}; write each width once, the smallest first")
    if not isinstance(objective, PairLoss):
        refuse_set({"loss.prefix_dims": loss.prefix_dims}, f"loss.kind is {loss.kind!r}, which compares no pairs")
    if teachers:
        others: dict[str, Any] = {
            "loss.kind": None if loss.kind == "infonce" else loss.kind,
            "loss.captions_per_image": loss.captions_per_image - 1 and loss.captions_per_image,
        }
        refuse_set(others, f"data.teachers is {[*teachers]}, which is for infonce of pairs with one caption")
        weight = _TEACHER_WEIGHT if loss.teacher_weight is None else loss.teacher_weight
        objective = Distilled(teacher_weight=weight, prefix_dims=dims)
    for name in () if teachers else ("teacher_weight", "teacher_temperature"):
        if (value := getattr(loss, name)) is not None:
            raise UserError(f"loss.{name} is {value:g} and there are no teachers; set data.teachers, or leave it out")
    other_model = None if objective.model_class is Objective.model_class else loss.kind
    if loss.captions_per_image > 1:
        others = {
            "loss.kind": None if objective.takes_captions else loss.kind,
            "loss.positives": None if loss.positives == "pairs" else loss.positives,
            "loss.caption_weight": loss.caption_weight,
            "loss.reconstruction_weight": loss.reconstruction_weight,
            "mask.views": mask.views - 1 and mask.views,
        }
        reason = "which is for a contrastive loss alone, of pairs and one view"
        refuse_set(others, f"loss.captions_per_image is {loss.captions_per_image}, {reason}")
    if loss.caption_weight > 0.0:
        others = {"loss.kind": other_model, "loss.reconstruction_weight": loss.reconstruction_weight}
        refuse_set(others, f"loss.caption_weight is {loss.caption_weight:g}, and both train another model class")
        weight, prediction = loss.caption_weight, loss.caption_kind
        return WithCaptions(other=objective, positives=loss.positives, weight=weight, prediction=prediction)
    if loss.reconstruction_weight == 0.0:
        return objective
    words = f"loss.reconstruction_weight is {loss.reconstruction_weight:g}"
    refuse_set({"mask.views": mask.views - 1 and mask.views}, f"{words}, but views see each other's masked patches")
    refuse_set({"loss.kind": other_model}, f"{words}, and both train another model class")
    return WithReconstruction(other=objective, positives=loss.positives, weight=loss.reconstruction_weight)


def build_config(recipe: Recipe) -> "FlipConfig":
    """Return the model's configuration, with the loss parameters that the objective needs. Raise UserError if the
    section `model` or `loss` is wrong, or the patch does not divide a stage's image size."""
    from flipscale.model.configuration_flip import patches_along  # seconds to import

    model = recipe.model
    if model.decoder_config and not recipe.loss.learns_captions:
        raise UserError("model.decoder_config is set, but no loss learns captions; set loss.caption_weight too")
    if model.family != "flip":
        settings = {"model.drop_path_rate": model.drop_path_rate, **recipe.besides_contrastive()}
        refuse_set(settings, f"model.family is {model.family!r}, and only flip has it")
    objective = build_objective(recipe)
    config = objective.model_config(model.config())
    if recipe.loss.prefix_dims and recipe.loss.prefix_dims[-1] >= (width := int(config.projection_dim or 0)):
        raise UserError(
            f"loss.prefix_dims is {recipe.loss.prefix_dims} and the embeddings have {width} numbers; leave out widths "
            f"from {width} on: the loss has the whole width anyway"
        )
    if recipe.data.pack_captions:
        reason = "data.pack_captions is true, which is for the contrastive losses of whole captions"
        refuse_set(recipe.besides_contrastive(), reason)
        if not config.packs_captions:
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
        if stage.text_mask_ratio > 0.0 and objective.refuses_text_masks:
            words = f"stages.{stage.name}.text_mask_ratio is {stage.text_mask_ratio:g}; expected 0"
            raise UserError(f"{words}, because {objective.refuses_text_masks}. Fix: leave it out")
    return config
