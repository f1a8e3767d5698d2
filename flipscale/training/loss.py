"""The recipe's loss of a batch."""

from dataclasses import dataclass

import torch

from flipscale.training.contrastive import contrastive_loss
from flipscale.training.exchange import EXCHANGES


@dataclass(frozen=True)
class LossRecipe:
    """What pulls pairs together and the rest of the batch apart.

    Args:
        exchange: how the texts of all processes meet the images of each: `gather`, or `ring` where all texts of the
            batch and their gradients are too many for one process. Does not change what is learned.
    """

    exchange: str = "gather"

    def __post_init__(self) -> None:
        if self.exchange not in EXCHANGES:
            raise ValueError(
                f"loss.exchange is {self.exchange!r}; use 'gather' or 'ring': the gradient is always that of the whole "
                "batch (a local loss without the other processes' gradients is another one)"
            )


def pair_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor, recipe: LossRecipe
) -> torch.Tensor:
    """Collective. The loss of this process's part of a batch, fp32 `()`; its mean over processes is the batch's."""
    return contrastive_loss(image_embeds, text_embeds, logit_scale, recipe.exchange)
