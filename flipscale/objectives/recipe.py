"""The recipe's `loss` section, and the objective that it describes."""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from flipscale.data.masks.recipe import MaskRecipe
from flipscale.io.errors import UserError
from flipscale.io.options import NonNegative, check_ranges

if TYPE_CHECKING:
    from flipscale.objectives.objective import Objective


@dataclass(frozen=True)
class LossRecipe:
    """What pulls pairs together and pushes the rest of the batch apart.

    Args:
        kind: `infonce`, each pair against the rest of the batch in both directions (the paper's), or `sigmoid`, each
            image and text of the batch by itself (SigLIP's); the model then has a `logit_bias`. `captioning` predicts
            the tokens of captions, by a decoder in place of the text tower. `classify` fine-tunes the image tower with
            a head, on images that have class numbers, and `answer` both towers with a transformer over them, on
            questions.
        options: Fields of the kind's own, such as `{num_classes: 1000, label_smoothing: 0.1}` of `classify`; `infonce`
            and `sigmoid` have none.
        exchange: How the texts of all processes meet the images of each: `gather`, in as many messages in any world, or
            `ring` where all texts of the batch and their gradients (0.5 GB for 65,536 of width 1,024) are too many for
            one process. It passes them from one process to the next, waiting for four messages for each process of the
            world: a thousand at 256. Does not change what is learned.
        reconstruction_weight: The weight of a second loss, the reconstruction of the masked patches
            (`flipscale.objectives.reconstruction`); 0 leaves out that loss and its decoder.
        caption_weight: The weight of a second loss beside `infonce` or `sigmoid`, the captions' tokens
            (`flipscale.objectives.own_models.captioning`); 0 leaves out that loss and its decoder. CoCa has 2.
        caption_kind: How that loss predicts tokens, as `options.prediction` of `captioning` does: `next_token`,
            `parallel` or `mixed`.
    """

    kind: str = "infonce"
    options: dict[str, Any] = field(default_factory=dict)
    exchange: str = field(default="gather", metadata={"learned": False})
    reconstruction_weight: NonNegative = 0.0
    caption_weight: NonNegative = 0.0
    caption_kind: Literal["next_token", "parallel", "mixed"] = "next_token"

    @property
    def learns_captions(self) -> bool:
        """Whether the model has a decoder that learns to write captions."""
        return self.kind == "captioning" or self.caption_weight > 0.0

    def __post_init__(self) -> None:
        from flipscale.objectives.exchange import EXCHANGES
        from flipscale.objectives.kinds import KINDS  # with the models, which take seconds to import

        if self.kind not in KINDS:
            raise UserError(f"loss.kind is {self.kind!r}; use {' or '.join(map(repr, KINDS))}")
        if self.exchange not in EXCHANGES:
            raise UserError(
                f"loss.exchange is {self.exchange!r}; use 'gather' or 'ring': the gradient is always that of the whole "
                "batch (a local loss without the other processes' gradients is another one)"
            )
        # Resolved, so that the run directory's recipe says them all.
        object.__setattr__(self, "options", _checked_options(self.kind, self.options))


def build_objective(recipe: LossRecipe, mask: MaskRecipe) -> "Objective":
    """Return the objective of a recipe.

    Raises:
        ValueError: a reconstruction with several views, or two losses that each train a model class of their own.
    """
    from flipscale.objectives.kinds import KINDS  # as above
    from flipscale.objectives.objective import Objective
    from flipscale.objectives.own_models.captioning import WithCaptions
    from flipscale.objectives.reconstruction import WithReconstruction

    objective = KINDS[recipe.kind](exchange=recipe.exchange, **recipe.options)
    check_ranges(objective, "loss.options")
    if recipe.caption_weight > 0.0:
        if objective.model_class is not Objective.model_class or recipe.reconstruction_weight > 0.0:
            other = f"loss.kind {recipe.kind!r}"
            if recipe.reconstruction_weight > 0.0:
                other = f"loss.reconstruction_weight {recipe.reconstruction_weight:g}"
            raise UserError(
                f"loss.caption_weight {recipe.caption_weight:g} does not go with {other}, which trains a model of its "
                "own; leave one of them out"
            )
        return WithCaptions(other=objective, weight=recipe.caption_weight, prediction=recipe.caption_kind)
    if recipe.reconstruction_weight == 0.0:
        return objective
    if mask.views > 1:
        raise UserError(
            f"loss.reconstruction_weight {recipe.reconstruction_weight:g} does not go with mask.views {mask.views}, "
            "each of which masks what another sees; use 1 view, or weight 0"
        )
    if objective.model_class is not Objective.model_class or objective.columns:
        raise UserError(
            f"loss.reconstruction_weight {recipe.reconstruction_weight:g} does not go with loss.kind {recipe.kind!r}, "
            "which trains a model of its own; use another kind, or weight 0"
        )
    return WithReconstruction(other=objective, weight=recipe.reconstruction_weight)


def _checked_options(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return all options of a kind, with the given values and otherwise the defaults."""
    from jsonargparse import ArgumentError, ArgumentParser

    from flipscale.objectives.kinds import KINDS  # as above
    from flipscale.objectives.objective import Objective

    shared = {f.name for f in fields(Objective)}
    known = [f.name for f in fields(KINDS[kind]) if f.name not in shared]
    for name in options:
        if name not in known:
            has = f"its options are {', '.join(known)}" if known else "it has none"
            raise UserError(f"loss.options.{name} is not an option of loss.kind {kind!r}; {has}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(KINDS[kind], skip=shared)
    try:
        return parser.parse_object(options).as_dict()
    except ArgumentError as error:
        raise UserError(f"loss.options of loss.kind {kind!r}: {' '.join(str(error).split())}") from None
