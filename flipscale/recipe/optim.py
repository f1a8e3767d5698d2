"""The recipe's sections `optim` and `stages`."""

from dataclasses import dataclass, field
from typing import Literal

from flipscale.io import options
from flipscale.io.errors import UserError


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

    rank: options.Count | None = None
    alpha: options.Positive | None = None
    towers: tuple[str, ...] = ("vision_model", "text_model")
    modules: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        for name, values in (("towers", self.towers), ("modules", self.modules)):
            for value in values:
                if values.count(value) > 1:
                    raise UserError(f"optim.lora.{name} has {value!r} twice; leave one of them out")

    @property
    def factor(self) -> float:
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
    weight_decay: options.NonNegative = 0.2
    adam_beta1: options.ShareBelowOne = 0.9
    adam_beta2: options.ShareBelowOne = 0.95
    adam_epsilon: options.Positive = 1e-8
    muon_lr_ratio: options.NonNegative = 10.0
    muon_momentum: options.ShareBelowOne = 0.95
    max_grad_norm: options.Positive | None = None
    ema_decay: options.OpenShare | None = None
    layer_decay: options.ShareAboveZero | None = None
    tower_lr_ratio: options.Positive = 1.0
    part_lr_ratios: dict[str, options.Positive] = field(default_factory=dict)
    lora: LoraRecipe = field(default_factory=LoraRecipe)


@dataclass(frozen=True)
class StageRecipe:
    """A part of the run. The paper's recipe has two stages: masked pre-training and unmasked tuning.

    Args:
        name: The name of the stage in the log, unique in the run.
        samples: Number of pairs, rounded down to whole steps; with a time budget, the stages' proportion.
        mask_ratio: Fraction of the patches to remove; 0 for whole images.
        text_mask_ratio: Fraction of all caption tokens to remove, padding included.
        base_lr: Peak learning rate per 256 samples of the batch. It starts a new schedule (warm-up, then `schedule`)
            and a new optimiser, like the original's tuning. Without it, the previous stage's continue.
        schedule: The learning rate after the warm-up. `cosine`, the default, falls to 0 at the end of the schedule.
            `constant` stays, so that the stage can be made longer at any time. A `cooldown` after it lets the rate fall
            to 0, by 1 - sqrt(s) of the share s of the stage that is done; a `linear_cooldown` by 1 - s (arXiv
            2405.18392).
        warmup_samples: Samples of linear warm-up at the start of the schedule.
        share: Share of `budget_minutes`, instead of `samples`. The shares of all stages add up to 1.
        warmup_share: Share of `budget_minutes` for the warm-up, instead of `warmup_samples`.
        image_size: Side of the images in pixels, a multiple of the patch; null for the model's own. Position
            coordinates are rescaled to the new grid of patches.
        captions: Weights of the kinds of captions, in place of `data.captions`.
        frozen: Parts whose weights stay fixed in this stage, besides those of `model.frozen`, such as
            `[vision_model, text_model]` to train only the projections. A stage with other frozen parts than the
            previous stage needs a base_lr.
        gradient_checkpointing: `model.gradient_checkpointing` of this stage, as masked images may fit without it. Null
            is the model's. Does not change what is learned.
    """

    name: str
    samples: options.Samples | None = None
    mask_ratio: options.ShareBelowOne = 0.0
    base_lr: options.NonNegative | None = None
    warmup_samples: options.SamplesOrZero = 0
    text_mask_ratio: options.ShareBelowOne = 0.0
    share: options.ShareAboveZero | None = None
    warmup_share: options.ShareBelowOne = 0.0
    image_size: options.Pixels | None = None
    captions: dict[str, options.NonNegative] | None = field(default=None, hash=False)
    frozen: tuple[str, ...] = ()
    schedule: Literal["cosine", "constant", "cooldown", "linear_cooldown"] | None = None
    gradient_checkpointing: bool | None = field(default=None, metadata={"learned": False})
