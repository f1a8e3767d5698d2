"""The recipe's loss of a batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flipscale.model import FlipConfig
from flipscale.objectives.contrastive import contrastive_loss
from flipscale.objectives.exchange import EXCHANGES
from flipscale.objectives.sigmoid import sigmoid_loss

KINDS = ("infonce", "sigmoid")


@dataclass(frozen=True)
class LossRecipe:
    """What pulls pairs together and the rest of the batch apart.

    Args:
        kind: `infonce`, each pair against the rest of the batch in both directions (the paper's), or `sigmoid`, each
            image and text of the batch apart (SigLIP's); the model then has a `logit_bias`.
        exchange: how the texts of all processes meet the images of each: `gather`, or `ring` where all texts of the
            batch and their gradients are too many for one process. Does not change what is learned.
        reconstruction_weight: of the masked patches' reconstruction beside it (`flipscale.objectives.reconstruction`);
            0 leaves it out, the decoder too.
    """

    kind: str = "infonce"
    exchange: str = "gather"
    reconstruction_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"loss.kind is {self.kind!r}; use {' or '.join(map(repr, KINDS))}")
        if self.exchange not in EXCHANGES:
            raise ValueError(
                f"loss.exchange is {self.exchange!r}; use 'gather' or 'ring': the gradient is always that of the whole "
                "batch (a local loss without the other processes' gradients is another one)"
            )
        if self.reconstruction_weight < 0.0:
            raise ValueError(f"loss.reconstruction_weight is {self.reconstruction_weight}; it must be 0 (none) or more")

    def configure(self, config: FlipConfig) -> FlipConfig:
        """`config`, the temperature and the bias that this loss needs in it."""
        if self.kind == "sigmoid":
            # SigLIP's first values: what is not a pair, which is nearly everything, begins as such.
            config.logit_scale_init_value, config.logit_bias_init_value = math.log(10.0), -10.0
        return config


def pair_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, head: Sequence[torch.Tensor], recipe: LossRecipe
) -> torch.Tensor:
    """Collective. The loss of this process's part of a batch, fp32 `()`; its mean over processes is the batch's.

    Args:
        head: `logit_scale`, and `logit_bias` where the model has one.

    Raises:
        ValueError: the head is not one for this loss.
    """
    needed = ("logit_scale", "logit_bias") if recipe.kind == "sigmoid" else ("logit_scale",)
    if len(head) != len(needed):
        raise ValueError(
            f"loss.kind {recipe.kind!r} takes {' and '.join(needed)}, the model's head has {len(head)} of them; set "
            "logit_bias_init_value of FlipConfig for 'sigmoid', and leave it out for 'infonce'"
        )
    if recipe.kind == "sigmoid":
        return sigmoid_loss(image_embeds, text_embeds, head[0], head[1], recipe.exchange)
    return contrastive_loss(image_embeds, text_embeds, head[0], recipe.exchange)
