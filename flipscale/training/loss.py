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
        reconstruction_weight: of the masked patches' reconstruction beside it (`flipscale.training.reconstruction`);
            0 leaves it out, the decoder too.
    """

    exchange: str = "gather"
    reconstruction_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.exchange not in EXCHANGES:
            raise ValueError(
                f"loss.exchange is {self.exchange!r}; use 'gather' or 'ring': the gradient is always that of the whole "
                "batch (a local loss without the other processes' gradients is another one)"
            )
        if self.reconstruction_weight < 0.0:
            raise ValueError(f"loss.reconstruction_weight is {self.reconstruction_weight}; it must be 0 (none) or more")


def pair_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor, recipe: LossRecipe
) -> torch.Tensor:
    """Collective. The loss of this process's part of a batch, fp32 `()`; its mean over processes is the batch's."""
    return contrastive_loss(image_embeds, text_embeds, logit_scale, recipe.exchange)
