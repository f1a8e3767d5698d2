"""The recipe's `data.augment` section."""

from dataclasses import dataclass

from flipscale.io.options import NonNegative


@dataclass(frozen=True)
class AugmentRecipe:
    """How labelled images are varied beyond crop and mirror, for `loss.kind` `classify`; by default they are not.

    Args:
        rand_augment: RandAugment (arXiv 1909.13719) in timm's words; `rand-m9-mstd0.5-inc1` in the paper.
        mixup_alpha: Mix the images and labels of two samples (arXiv 1710.09412), by a share that is drawn from
            Beta(alpha, alpha); 0.8 in the paper.
        cutmix_alpha: Put a part of another image, and so much of its label, in the place of the image's own
            (arXiv 1905.04899), likewise; 1.0 in the paper. With both, each two samples have one or the other.
    """

    rand_augment: str | None = None
    mixup_alpha: NonNegative = 0.0
    cutmix_alpha: NonNegative = 0.0

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup_alpha > 0.0 or self.cutmix_alpha > 0.0
