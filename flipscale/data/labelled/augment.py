"""RandAugment, mixup and cutmix of uint8 images by timm, with draws that are keyed by the samples' positions.

timm is the library that the paper's fine-tuning, and MAE's before it, is written with. It draws from the global
generators of `random` and NumPy, which are set to a sample's own number for the call and put back after it: so a sample
is varied in the same way in any worker, at any number of processes, and after a resume.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image

from flipscale.data.labelled.recipe import AugmentRecipe
from flipscale.data.randomness import keyed_uniform
from flipscale.io.errors import UserError
from flipscale.model.configuration_flip import IMAGENET_MEAN

_TRANSLATE = 0.45  # of an image's side at most, as timm's `create_transform` has it


class Mixed(NamedTuple):
    """Two images of which each has a part of the other, uint8 `(height, width, 3)`, and the share that is its own."""

    one: np.ndarray
    other: np.ndarray
    share: float


class Augment:
    """A recipe's variations of images.

    Raises:
        ValueError: timm is not installed, or does not know the words of `rand_augment`.
    """

    def __init__(self, recipe: AugmentRecipe, seed: int, image_size: int):
        self.recipe = recipe
        self.seed = seed
        self._rand_augment: Callable[[Image.Image], Image.Image] | None = None
        if recipe.rand_augment is not None:
            self._rand_augment = _rand_augment(recipe.rand_augment, image_size)
        if recipe.cutmix_alpha > 0.0:
            _require_timm("cutmix_alpha", recipe.cutmix_alpha)

    def varied(self, image: np.ndarray, position: int) -> np.ndarray:
        """Return an image, uint8 RGB `(height, width, 3)`, varied as its position in the run says."""
        if self._rand_augment is None:
            return image
        with _drawing(self.seed, "augment", position):
            return np.asarray(self._rand_augment(Image.fromarray(image)))

    def mixed(self, one: np.ndarray, other: np.ndarray, position: int) -> Mixed:
        """Return two images mixed with each other, as the position of the first says."""
        mixup, cutmix = self.recipe.mixup_alpha, self.recipe.cutmix_alpha
        with _drawing(self.seed, "mix", position):
            cuts = cutmix > 0.0 and (mixup == 0.0 or random.random() < 0.5)
            alpha = cutmix if cuts else mixup
            share = random.betavariate(alpha, alpha)
            if cuts:
                return _cut(one, other, share)
        first, second = one.astype(np.float32), other.astype(np.float32)
        blend, rest = share * first + (1.0 - share) * second, share * second + (1.0 - share) * first
        return Mixed(np.rint(blend).astype(np.uint8), np.rint(rest).astype(np.uint8), share)


def _cut(one: np.ndarray, other: np.ndarray, share: float) -> Mixed:
    """Return two images that have exchanged a box; the share that is their own is counted in pixels."""
    from timm.data.mixup import cutmix_bbox_and_lam

    (top, bottom, left, right), share = cutmix_bbox_and_lam(one.shape[:2], share)
    results = one.copy(), other.copy()
    results[0][top:bottom, left:right] = other[top:bottom, left:right]
    results[1][top:bottom, left:right] = one[top:bottom, left:right]
    return Mixed(*results, float(share))


def _rand_augment(words: str, image_size: int) -> Callable[[Image.Image], Image.Image]:
    _require_timm("rand_augment", words)
    from timm.data.auto_augment import rand_augment_transform

    options = {
        "translate_const": int(image_size * _TRANSLATE),
        "img_mean": tuple(min(255, round(255 * mean)) for mean in IMAGENET_MEAN),
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        return rand_augment_transform(words, options)
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"data.augment.rand_augment is {words!r}, which timm does not know ({' '.join(str(error).split())}); use "
            "such as 'rand-m9-mstd0.5-inc1'"
        ) from error


def _require_timm(field: str, value: object) -> None:
    try:
        import timm.data  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"data.augment.{field} is {value!r} and timm, which does it, is not installed; "
            "pip install 'flipscale[finetune]'"
        ) from error


@contextmanager
def _drawing(seed: int, purpose: str, position: int) -> Iterator[None]:
    """Have the global generators draw what belongs to a position meanwhile."""
    before, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    number = int(keyed_uniform(seed, purpose, np.array([position]), 1)[0, 0] * 2**32)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(of_numpy)  # noqa: NPY002
