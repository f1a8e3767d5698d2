"""Random colour changes, RandAugment, mixup and cutmix of training pictures, keyed by the samples' positions.

The colour changes are those of torchvision's `ColorJitter`. For 64 (224) pixels, they take 2 (20) us in OpenCV, 90
(600) in Pillow and 115 (640) in torchvision, because all changes of a picture are one matrix.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import cv2
import numpy as np
from PIL import Image

from flipscale.data.randomness import keyed_uniform
from flipscale.io.errors import UserError, needed
from flipscale.model.configuration_flip import IMAGENET_MEAN
from flipscale.recipe.augment import AugmentRecipe, ColorJitterRecipe

# Luma and two colour differences of RGB (YIQ, NTSC 1953). A change of hue turns the two, as in NVIDIA DALI's `Hue`.
_LUMA = (0.299, 0.587, 0.114)
_YIQ = np.array([_LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_TRANSLATE = 0.45  # largest shift as a fraction of an image's side, as in timm's `create_transform`
_FINETUNE = "'flipscale[finetune]'"


def draw_colors(jitter: ColorJitterRecipe, seed: int, where: np.ndarray) -> np.ndarray:
    """Return the colour changes of the pictures at global positions `where`, `(batch,)`, as functions of the seed:
    factors of red, green, blue and the picture's mean grey, float64 `(batch, 3, 4)`."""
    applies, *draws = keyed_uniform(seed, "color", where, 5).T
    most = np.array([jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue])[:, None]
    changes = most * (2.0 * np.array(draws) - 1.0)
    bright, contrast, saturation, hue = np.where(applies < jitter.probability, changes, 0.0)
    cos, sin = (1.0 + saturation) * np.cos(2 * np.pi * hue), (1.0 + saturation) * np.sin(2 * np.pi * hue)
    one, zero = np.ones_like(cos), np.zeros_like(cos)
    turned = np.array([[one, zero, zero], [zero, cos, -sin], [zero, sin, cos]]).transpose(2, 0, 1)
    # Without clips in between, the changes commute.
    factors = (1.0 + contrast)[:, None, None] * (np.linalg.inv(_YIQ) @ turned @ _YIQ)
    offsets = np.broadcast_to(-contrast[:, None, None], (len(contrast), 3, 1))
    return (1.0 + bright)[:, None, None] * np.concatenate([factors, offsets], axis=2)


def recolored(image: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Return a picture, uint8 RGB `(height, width, 3)`, with its colour changes `(3, 4)` of `draw_colors`."""
    red, green, blue, _ = cv2.mean(image)
    grey = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
    return cv2.transform(image, np.column_stack([colors[:, :3], grey * colors[:, 3]]))


class Augment:
    """A recipe's variations of uint8 images, by timm, with draws keyed by the samples' positions.

    The paper's fine-tuning, like MAE's, uses timm, which draws from the global generators of `random` and NumPy. They
    are seeded with a sample's own number for the call and restored after it. So a sample is varied in the same way in
    any worker, at any number of processes, and after a resume. Raise UserError if timm is not installed, or does not
    know the words of `rand_augment`.
    """

    def __init__(self, recipe: AugmentRecipe, seed: int, image_size: int):
        self.recipe = recipe
        self.seed = seed
        self._image_size = image_size
        self._rand_augment = None if recipe.rand_augment is None else _rand_augment(recipe.rand_augment, image_size)
        if recipe.cutmix_alpha > 0.0:
            needed("timm.data", f"data.augment.cutmix_alpha is {recipe.cutmix_alpha}, which needs timm", _FINETUNE)

    def varied(self, image: np.ndarray, position: int) -> np.ndarray:
        """Return an image, uint8 RGB `(height, width, 3)`, after RandAugment with the draws of its position."""
        if self._rand_augment is None:
            return image
        with _seeded(self.seed, "augment", position):
            return np.asarray(self._rand_augment(Image.fromarray(image)))

    def mixed(self, one: np.ndarray, other: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Return two images, each with a part of the other, and the share of its own, by the draws of the first one."""
        share, box = draw_mix(self.recipe, self.seed, self._image_size, position)
        if box is not None:
            top, bottom, left, right = box
            mixed, rest = one.copy(), other.copy()
            mixed[top:bottom, left:right] = other[top:bottom, left:right]
            rest[top:bottom, left:right] = one[top:bottom, left:right]
            return mixed, rest, share
        first, second = one.astype(np.float32), other.astype(np.float32)
        mixed, rest = share * first + (1.0 - share) * second, share * second + (1.0 - share) * first
        return np.rint(mixed).astype(np.uint8), np.rint(rest).astype(np.uint8), share


def draw_mix(
    recipe: AugmentRecipe, seed: int, image_size: int, position: int
) -> tuple[float, tuple[int, int, int, int] | None]:
    """Return the share of its own that each of the two images from `position` on keeps, and the box that they exchange:
    top, bottom, left and right. Without a box, they are blended; with one, the share is counted in pixels."""
    with _seeded(seed, "mix", position):
        cuts = recipe.cutmix_alpha > 0.0 and (recipe.mixup_alpha == 0.0 or random.random() < 0.5)
        alpha = recipe.cutmix_alpha if cuts else recipe.mixup_alpha
        share = random.betavariate(alpha, alpha)
        if not cuts:
            return share, None
        from timm.data.mixup import cutmix_bbox_and_lam

        box, share = cutmix_bbox_and_lam((image_size, image_size), share)
        return float(share), box


def _rand_augment(policy: str, image_size: int) -> Callable[[Image.Image], Image.Image]:
    timm_data = needed("timm.data", f"data.augment.rand_augment is {policy!r}, which needs timm", _FINETUNE)
    options = {
        "translate_const": int(image_size * _TRANSLATE),
        "img_mean": tuple(min(255, round(255 * mean)) for mean in IMAGENET_MEAN),
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        return timm_data.rand_augment_transform(policy, options)
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"data.augment.rand_augment is {policy!r}, which timm does not know ({' '.join(str(error).split())}); use "
            "such as 'rand-m9-mstd0.5-inc1'"
        ) from error


@contextmanager
def _seeded(seed: int, purpose: str, position: int) -> Iterator[None]:
    """Seed the global generators with a position's own number, and restore them afterwards."""
    before, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    number = int(keyed_uniform(seed, purpose, np.array([position]), 1)[0, 0] * 2**32)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(of_numpy)  # noqa: NPY002
