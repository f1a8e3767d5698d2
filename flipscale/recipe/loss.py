"""The recipe's section `loss`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from flipscale.io.options import Copies, Count, NonNegative, Positive, Share

# Losses of the two towers alone that compare pairs: they take captions and a second loss, as `infonce` does.
PAIR_LOSSES = ("infonce", "sigmoid")


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
            image's target evenly over them. `sigmoid` labels each as a match. A caption repeats only if the sample has
            fewer.
        prefix_dims: Only `[]`, for recipes of earlier runs.
        exchange: Only `gather`, for recipes of earlier runs. Does not change what is learned.
        reconstruction_weight: The weight of a second loss, the reconstruction of the masked patches
            (`flipscale.objectives.reconstruction`); 0 leaves out that loss and its decoder.
        teacher_weight: The share of the teachers' similarities in the targets of `infonce`, with `data.teachers`. The
            pairs have the rest (`flipscale.objectives.teachers`). Null is 0.75, as MobileCLIP-B has.
        teacher_temperature: The temperature of all teachers' similarities; null is 1 / `logit_scale` of each teacher.
        caption_weight: The weight of the caption loss (`flipscale.objectives.captioning`) that is added to `infonce` or
            `sigmoid`; 0 leaves out that loss and its decoder. CoCa has 2.
        caption_kind: How captions are predicted: `next_token`, `parallel` or `mixed`, as `prediction` of `captioning`.
    """

    kind: str = "infonce"
    options: dict[str, Any] = field(default_factory=dict)
    positives: Literal["pairs", "equal_captions"] = "pairs"
    captions_per_image: Copies = 1
    prefix_dims: list[Count] = field(default_factory=list)
    exchange: Literal["gather"] = field(default="gather", metadata={"learned": False})
    reconstruction_weight: NonNegative = 0.0
    teacher_weight: Share | None = None
    teacher_temperature: Positive | None = None
    caption_weight: NonNegative = 0.0
    caption_kind: Literal["next_token", "parallel", "mixed"] = "next_token"

    @property
    def compares_pairs(self) -> bool:
        return self.kind in PAIR_LOSSES

    @property
    def learns_captions(self) -> bool:
        return self.kind == "captioning" or self.caption_weight > 0.0
