"""The recipe's `loss` section, and the objective that it describes."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from flipscale.data.recipe import MaskRecipe
from flipscale.io.errors import UserError
from flipscale.io.options import Copies, NonNegative, Positive, Share, check_ranges, refuse_set

if TYPE_CHECKING:
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


@dataclass(frozen=True)
class LossRecipe:
    """The loss: its kind, and how the processes compute it.

    Args:
        kind: `infonce` (the paper's) compares each pair with the rest of the batch in both directions. `sigmoid`
            (SigLIP's) classifies each combination of image and text separately as matching or not; the model then has a
            `logit_bias`. `captioning` replaces the text tower by a decoder, which predicts the tokens of captions.
            `classify` fine-tunes the image tower with a head, on images with class numbers. `answer` fine-tunes both
            towers and a transformer over them, on questions.
        options: Fields of the kind, such as `{num_classes: 1000}` of `classify`; `infonce` and `sigmoid` have none.
        positives: Matches within a batch. `pairs` (the paper's): an image and its own caption. `equal_captions`, of
            `sigmoid`: an image and all captions of the global batch with the same tokens as its own.
        captions_per_image: Number of captions of each image in a step, all positives of it. `infonce` spreads an
            image's target evenly over them. `sigmoid` labels each as a match. They differ if the sample has as many.
        exchange: Only `gather`, for recipes of earlier runs. Does not change what is learned.
        reconstruction_weight: The weight of a second loss, the reconstruction of the masked patches
            (`flipscale.objectives.reconstruction`); 0 leaves out that loss and its decoder.
        teacher_weight: The share of the teachers' similarities in the targets of `infonce`, with `data.teachers`. The
            rest is the pairs' (`flipscale.objectives.teacher`). Null is 0.75, as MobileCLIP-B has.
        teacher_temperature: The temperature of all teachers' similarities; null is 1 / `logit_scale` of each.
        caption_weight: The weight of the caption loss (`flipscale.objectives.captioning`) that is added to `infonce` or
            `sigmoid`; 0 leaves out that loss and its decoder. CoCa has 2.
        caption_kind: How captions are predicted: `next_token`, `parallel` or `mixed`, as `prediction` of `captioning`.
    """

    kind: str = "infonce"
    options: dict[str, Any] = field(default_factory=dict)
    positives: Literal["pairs", "equal_captions"] = "pairs"
    captions_per_image: Copies = 1
    exchange: Literal["gather"] = field(default="gather", metadata={"learned": False})
    reconstruction_weight: NonNegative = 0.0
    teacher_weight: Share | None = None
    teacher_temperature: Positive | None = None
    caption_weight: NonNegative = 0.0
    caption_kind: Literal["next_token", "parallel", "mixed"] = "next_token"

    @property
    def learns_captions(self) -> bool:
        """Whether the model has a decoder that learns to write captions."""
        return self.kind == "captioning" or self.caption_weight > 0.0

    def __post_init__(self) -> None:
        if (self.kind, self.positives, self.options) == ("infonce", "pairs", {}):
            return  # valid, and --help makes it: the imports below take seconds
        if self.kind not in loss_kinds():
            raise UserError(f"loss.kind is {self.kind!r}; use {' or '.join(map(repr, loss_kinds()))}")
        kind = loss_kinds()[self.kind]
        if self.positives != "pairs" and not kind.takes_equal_captions:
            raise UserError(
                f"loss.positives is {self.positives!r} with loss.kind {self.kind!r}; leave it out, or use loss.kind "
                "'sigmoid' (infonce learned the same with it as with 'pairs')"
            )
        from jsonargparse import ArgumentError, ArgumentParser

        from flipscale.objectives.objective import Objective

        shared = {f.name for f in fields(Objective)}
        known = [f.name for f in fields(kind) if f.name not in shared]
        for name in self.options:
            if name not in known:
                rule = f"its options are {', '.join(known)}" if known else "it has none"
                raise UserError(f"loss.options.{name} is not an option of loss.kind {self.kind!r}; {rule}")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(kind, skip=shared)
        try:
            # All options with their defaults, because the run directory's recipe records them.
            object.__setattr__(self, "options", parser.parse_object(self.options).as_dict())
        except ArgumentError as error:
            raise UserError(f"loss.options of loss.kind {self.kind!r}: {' '.join(str(error).split())}") from None


def build_objective(recipe: LossRecipe, mask: MaskRecipe, teachers: Sequence[str] = ()) -> "Objective":
    """Return the objective of a recipe, with its `data.teachers`."""
    from flipscale.objectives.captioning import WithCaptions
    from flipscale.objectives.objective import Objective
    from flipscale.objectives.reconstruction import WithReconstruction
    from flipscale.objectives.teacher import Distilled

    shared: dict[str, Any] = {"positives": recipe.positives, "captions_per_image": recipe.captions_per_image}
    objective = loss_kinds()[recipe.kind](**shared, **recipe.options)
    check_ranges(objective, "loss.options")
    if teachers:
        others: dict[str, Any] = {
            "loss.kind": None if recipe.kind == "infonce" else recipe.kind,
            "loss.captions_per_image": recipe.captions_per_image - 1 and recipe.captions_per_image,
        }
        refuse_set(others, f"data.teachers is {[*teachers]}, which is for infonce of pairs with one caption")
        weight = _TEACHER_WEIGHT if recipe.teacher_weight is None else recipe.teacher_weight
        objective = Distilled(teacher_weight=weight)
    for name in () if teachers else ("teacher_weight", "teacher_temperature"):
        if (value := getattr(recipe, name)) is not None:
            raise UserError(f"loss.{name} is {value:g} and there are no teachers; set data.teachers, or leave it out")
    other_model = None if objective.model_class is Objective.model_class else recipe.kind
    if recipe.captions_per_image > 1:
        others = {
            "loss.kind": None if objective.takes_captions else recipe.kind,
            "loss.positives": None if recipe.positives == "pairs" else recipe.positives,
            "loss.caption_weight": recipe.caption_weight,
            "loss.reconstruction_weight": recipe.reconstruction_weight,
            "mask.views": mask.views - 1 and mask.views,
        }
        reason = "which is for a contrastive loss alone, of pairs and one view"
        refuse_set(others, f"loss.captions_per_image is {recipe.captions_per_image}, {reason}")
    if recipe.caption_weight > 0.0:
        others = {"loss.kind": other_model, "loss.reconstruction_weight": recipe.reconstruction_weight}
        refuse_set(others, f"loss.caption_weight is {recipe.caption_weight:g}, and both train another model class")
        weight, prediction = recipe.caption_weight, recipe.caption_kind
        return WithCaptions(other=objective, positives=recipe.positives, weight=weight, prediction=prediction)
    if recipe.reconstruction_weight == 0.0:
        return objective
    words = f"loss.reconstruction_weight is {recipe.reconstruction_weight:g}"
    refuse_set({"mask.views": mask.views - 1 and mask.views}, f"{words}, but views see each other's masked patches")
    refuse_set({"loss.kind": other_model}, f"{words}, and both train another model class")
    return WithReconstruction(other=objective, positives=recipe.positives, weight=recipe.reconstruction_weight)
