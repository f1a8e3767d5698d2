"""The recipe's `data.augment` section."""

from dataclasses import asdict, dataclass, field
from typing import Annotated

from flipscale.io.options import NonNegative, Range, Share


@dataclass(frozen=True)
class ColorJitterRecipe:
    """Random changes of colour, as in torchvision's `ColorJitter`; off by default.

    Args:
        brightness: All values are multiplied by a factor between 1 - `brightness` and 1 + `brightness`.
        contrast: The same for the distance of a pixel from the image's mean grey.
        saturation: The same for the distance of a pixel from its own grey.
        hue: The largest turn of the hue to either side, as a fraction of the circle.
        probability: The share of the images that are changed.
    """

    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0
    hue: Annotated[float, Range(at_least=0, at_most=0.5)] = 0.0
    probability: Share = 1.0

    @property
    def changes(self) -> dict[str, float]:
        """The values above 0, without `probability`; false if nothing changes."""
        return {name: value for name, value in asdict(self).items() if value > 0.0 and name != "probability"}


@dataclass(frozen=True)
class AugmentRecipe:
    """Augmentation beyond crop and mirror; off by default. The first three fields are for `loss.kind` `classify`.

    Args:
        rand_augment: RandAugment (arXiv 1909.13719) in timm's words; `rand-m9-mstd0.5-inc1` in the paper.
        mixup_alpha: Mix images and labels of two samples by a share from Beta(alpha, alpha) (arXiv 1710.09412: 0.8).
        cutmix_alpha: Paste a box from another image and mix the labels by area (arXiv 1905.04899); 1.0 in the paper.
            With mixup on, each pair of images gets one of the two.
        color_jitter: Random changes of the colours of images.
    """

    rand_augment: str | None = None
    mixup_alpha: NonNegative = 0.0
    cutmix_alpha: NonNegative = 0.0
    color_jitter: ColorJitterRecipe = field(default_factory=ColorJitterRecipe)

    @property
    def mixes(self) -> bool:
        return self.mixup_alpha > 0.0 or self.cutmix_alpha > 0.0
