"""The recipe's `optim` and `save` sections."""

from dataclasses import dataclass
from typing import Literal

from flipscale.io.ranges import (
    Count,
    Minutes,
    NotNegative,
    Positive,
    SamplesOrNone,
    ShareAboveNone,
    ShareBelowAll,
    ShareBetween,
)


@dataclass(frozen=True)
class OptimRecipe:
    """How the weights move. The learning rate is each stage's (`stages`).

    Args:
        name: The optimiser: `adamw` (the paper's), or `muon` for the matrices of the blocks with `adamw` for everything
            else.
        weight_decay: The decoupled weight decay, which is multiplied by the learning rate; 0.2 in the paper's Table 10.
        adam_beta1: The decay of AdamW's mean of gradients; 0.9 in the paper's Table 10.
        adam_beta2: The decay of AdamW's mean of squares; 0.95 in the paper's Table 10.
        adam_epsilon: What is added to the root of AdamW's mean of squares; 1e-8 in the original's code.
        muon_lr_ratio: Muon's rate as a multiple of AdamW's. Muon's update of a matrix has a spectral norm of about the
            rate, times sqrt(rows / columns) for tall ones.
        muon_momentum: The Nesterov momentum of Muon.
        ema_decay: Keep averages of the weights, each step's new weights mixed in with 1 - ema_decay; they are what is
            evaluated and exported. Left out, there are no averages.
        layer_decay: Multiply the rate of each block of a tower by this once more than that of the block after it, and
            the embeddings' once more than the first block's; final norms, projections and heads have the whole rate.
            0.75 in the paper's fine-tuning; left out, all have the same rate.
        tower_lr_ratio: The learning rate of the two towers relative to that of all else, such as a new decoder's or
            head's; 0.1 in the paper's captioning and question answering.
        max_grad_norm: Clip the gradients' global norm to this; left out, nothing is clipped, as in the paper.
    """

    name: Literal["adamw", "muon"] = "adamw"
    weight_decay: NotNegative = 0.2
    adam_beta1: ShareBelowAll = 0.9
    adam_beta2: ShareBelowAll = 0.95
    adam_epsilon: Positive = 1e-8
    muon_lr_ratio: NotNegative = 10.0
    muon_momentum: ShareBelowAll = 0.95
    max_grad_norm: Positive | None = None
    ema_decay: ShareBetween | None = None
    layer_decay: ShareAboveNone | None = None
    tower_lr_ratio: Positive = 1.0


@dataclass(frozen=True)
class SaveRecipe:
    """When checkpoints are written. Training goes on while they are.

    Args:
        every_samples: How many samples lie between two checkpoints; at 0, there is one only at the end and on a stop
            signal.
        every_minutes: How many minutes lie between two checkpoints, in addition; at 0, the clock is not looked at.
        total_limit: How many of the newest checkpoints are kept.
    """

    every_samples: SamplesOrNone = 0
    every_minutes: Minutes = 0.0
    total_limit: Count = 2
