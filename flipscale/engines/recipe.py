"""The recipe's `optim` and `save` sections, without torch, which `--help` does not import."""

from dataclasses import dataclass, field
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
class LoraRecipe:
    """Low-rank changes that are trained in place of the weights (LoRA, arXiv 2106.09685), by the package peft.

    Args:
        rank: The rank of the changes; null to train the weights themselves.
        alpha: The changes are multiplied by alpha / rank. Null is the rank, so that the factor is 1.
        towers: The towers that learn changes. All other weights stay fixed, the temperature too.
        modules: The linear layers of these towers' blocks that learn changes, by the last part of their names, such as
            q_proj, k_proj, v_proj, out_proj, fc1, fc2. The default is the paper's.
    """

    rank: Count | None = None
    alpha: Positive | None = None
    towers: tuple[str, ...] = ("vision_model", "text_model")
    modules: tuple[str, ...] = ("q_proj", "v_proj")

    @property
    def factor(self) -> float:
        """Factor of the changes."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class OptimRecipe:
    """The optimiser. Learning rates are in `stages`.

    Args:
        name: The optimiser: `adamw` (the paper's), or `muon` for the blocks' matrices with `adamw` for the others.
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
        part_lr_ratios: Learning rates of single parts relative to the others, by their names in the model, such as
            `{vision_model: 0.1, text_model: 0.5}`. The longest name that fits a weight counts.
        lora: Low-rank changes in place of the weights.
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
    part_lr_ratios: dict[str, Positive] = field(default_factory=dict)
    lora: LoraRecipe = field(default_factory=LoraRecipe)


@dataclass(frozen=True)
class SaveRecipe:
    """When checkpoints are written. Training goes on during the write.

    Args:
        every_samples: Samples between two checkpoints. At 0, they are written only at the end and on a stop signal.
        every_minutes: Also save every so many minutes; 0 turns this off.
        total_limit: Number of newest checkpoints to keep.
    """

    every_samples: SamplesOrZero = 0
    every_minutes: Minutes = 0.0
    total_limit: Count = 2
