"""The recipe's `optim` and `save` sections, without torch, which `--help` does not import."""

from dataclasses import dataclass
from typing import Literal

from flipscale.io.options import (
    Count,
    Minutes,
    NonNegative,
    OpenShare,
    Positive,
    SamplesOrZero,
    ShareAboveZero,
    ShareBelowOne,
)


@dataclass(frozen=True)
class OptimRecipe:
    """The optimiser. Learning rates are in `stages`.

    Args:
        name: The optimiser: `adamw` (the paper's), or `muon` for the matrices of the blocks with `adamw` for everything
            else.
        weight_decay: The decoupled weight decay, which is multiplied by the learning rate; 0.2 in the paper's Table 10.
        adam_beta1: The decay of AdamW's mean of gradients; 0.9 in the paper's Table 10.
        adam_beta2: The decay of AdamW's mean of squares; 0.95 in the paper's Table 10.
        adam_epsilon: The constant added to the root of AdamW's mean of squares; 1e-8 in the original's code.
        muon_lr_ratio: Muon's rate as a multiple of AdamW's. An update's spectral norm is about the rate. For tall
            matrices it is sqrt(rows / columns) times larger.
        muon_momentum: The Nesterov momentum of Muon.
        ema_decay: The decay of an exponential moving average (EMA) of the weights. Each step sets average = ema_decay *
            average + (1 - ema_decay) * weights. Evaluations and exports use the average. By default there is none.
        layer_decay: Learning rates shrink by this factor per block, from the last block of a tower down to its
            embeddings. The last block has the rate times this factor. Final norms, projections and heads keep the full
            rate. 0.75 in the paper's fine-tuning; by default all rates are equal.
        tower_lr_ratio: The learning rate of the two towers relative to other parts, such as a new decoder or head; 0.1
            in the paper's captioning and question answering.
        max_grad_norm: Gradients are clipped to this global norm. By default they are not clipped, as in the paper.
    """

    name: Literal["adamw", "muon"] = "adamw"
    weight_decay: NonNegative = 0.2
    adam_beta1: ShareBelowOne = 0.9
    adam_beta2: ShareBelowOne = 0.95
    adam_epsilon: Positive = 1e-8
    muon_lr_ratio: NonNegative = 10.0
    muon_momentum: ShareBelowOne = 0.95
    max_grad_norm: Positive | None = None
    ema_decay: OpenShare | None = None
    layer_decay: ShareAboveZero | None = None
    tower_lr_ratio: Positive = 1.0


@dataclass(frozen=True)
class SaveRecipe:
    """When checkpoints are written. Training goes on during the write.

    Args:
        every_samples: Number of samples between two checkpoints. At 0, checkpoints are written only at the end and on a
            stop signal.
        every_minutes: Also save every so many minutes; 0 turns this off.
        total_limit: Number of newest checkpoints to keep.
    """

    every_samples: SamplesOrZero = 0
    every_minutes: Minutes = 0.0
    total_limit: Count = 2
