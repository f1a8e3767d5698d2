"""The recipe's `data.augment` section."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from flipscale.io.errors import UserError
from flipscale.io.options import NonNegative, Range, Share

Magnification = Annotated[float, Range(at_least=0.1, at_most=10)]


@dataclass(frozen=True)
class AffineRecipe:
    """Random affine changes, as in torchvision's `RandomAffine`; off by default.

    Args:
        degrees: The largest rotation to either side.
        translate: The largest shift along each axis, as a fraction of the image's side.
        scale: The least and the most magnification.
        shear: The largest horizontal shear to either side, in degrees.
    """

    degrees: Annotated[float, Range(at_least=0, at_most=180)] = 0.0
    translate: Share = 0.0
    scale: tuple[Magnification, Magnification] = (1.0, 1.0)
    shear: Annotated[float, Range(at_least=0, at_most=60)] = 0.0

    def __post_init__(self) -> None:
        if not self.scale[0] <= self.scale[1]:
            raise UserError(f"data.augment.affine.scale is {list(self.scale)}; expected the smaller factor first")


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


@dataclass(frozen=True)
class AugmentRecipe:
    """Augmentation beyond crop and mirror; off by default. The first three fields are for `loss.kind` `classify`.

    Args:
        rand_augment: RandAugment (arXiv 1909.13719) in timm's words; `rand-m9-mstd0.5-inc1` in the paper.
        mixup_alpha: Mix images and labels of two samples by a share from Beta(alpha, alpha) (arXiv 1710.09412: 0.8).
        cutmix_alpha: Paste a box from another image and mix the labels by area (arXiv 1905.04899); 1.0 in the paper.
            With mixup on, each pair of images gets one of the two.
        affine: Random rotations, shifts, scales and shears of images.
        color_jitter: Random changes of the colours of images.
        grayscale_probability: The share of the images that are grey.
    """

    rand_augment: str | None = None
    mixup_alpha: NonNegative = 0.0
    cutmix_alpha: NonNegative = 0.0
    affine: AffineRecipe = field(default_factory=AffineRecipe)
    color_jitter: ColorJitterRecipe = field(default_factory=ColorJitterRecipe)
    grayscale_probability: Share = 0.0

    @property
    def changes(self) -> dict[str, Any]:
        """Affine and colour changes by field, for messages; false for those that are off."""
        return {
            "data.augment.affine": self.affine != AffineRecipe() and asdict(self.affine),
            "data.augment.color_jitter": self.color_jitter != ColorJitterRecipe() and asdict(self.color_jitter),
            "data.augment.grayscale_probability": self.grayscale_probability,
        }

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup_alpha > 0.0 or self.cutmix_alpha > 0.0
