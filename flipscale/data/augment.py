"""Random affine and colour changes of training pictures, by OpenCV, with draws keyed by the samples' positions.

The changes are those of torchvision's `RandomAffine`, `ColorJitter` and `RandomGrayscale`. For 64 (224) pixels, a warp
takes 26 (300) us in OpenCV, 120 (1,350) in Pillow and 150 (1,290) in torchvision. Colours take 2 (20), 90 (600) and 115
(640) us, because all changes of a picture's colours are one matrix.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from flipscale.data.randomness import keyed_uniform
from flipscale.recipe.augment import AffineRecipe, AugmentRecipe, ColorJitterRecipe

# Luma and two colour differences of RGB (YIQ, NTSC 1953). A change of hue turns the two, as in NVIDIA DALI's `Hue`.
_LUMA = (0.299, 0.587, 0.114)
_YIQ = np.array([_LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_BILINEAR = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP


@dataclass(frozen=True)
class PictureChanges:
    """The drawn changes of a batch's pictures. None stands for no changes.

    Args:
        warps: affine maps from a pixel of the result to the picture's, float64 `(batch, 2, 3)`.
        colors: factors of red, green, blue and the picture's mean grey, float64 `(batch, 3, 4)`.
    """

    warps: np.ndarray | None = None
    colors: np.ndarray | None = None

    @classmethod
    def drawn(cls, recipe: AugmentRecipe, seed: int, where: np.ndarray, image_size: int) -> "PictureChanges":
        """Return the changes of the pictures at global positions `where`, `(batch,)`, as functions of the seed."""
        warps = colors = None
        if recipe.affine != AffineRecipe():
            warps = _warps(recipe.affine, keyed_uniform(seed, "affine", where, 5).T, image_size)
        if recipe.color_jitter != ColorJitterRecipe() or recipe.grayscale_probability > 0.0:
            colors = _colors(recipe, keyed_uniform(seed, "color", where, 6).T)
        return cls(warps, colors)

    def applied(self, image: np.ndarray, row: int) -> np.ndarray:
        """Return a picture, uint8 RGB `(image_size, image_size, 3)`, with the changes of a row of the batch. Its mirror
        image continues it beyond its border."""
        if self.warps is not None:
            image = cv2.warpAffine(image, self.warps[row], image.shape[:2], None, _BILINEAR, cv2.BORDER_REFLECT_101)
        if self.colors is not None:
            matrix = self.colors[row].copy()
            red, green, blue, _ = cv2.mean(image)
            matrix[:, 3] *= _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
            image = cv2.transform(image, matrix)
        return image


def _warps(affine: AffineRecipe, draws: np.ndarray, image_size: int) -> np.ndarray:
    size, (angle, shear, *shifts) = draws[0], 2.0 * draws[1:] - 1.0
    angle, tan = np.radians(affine.degrees * angle), np.tan(np.radians(affine.shear * shear))
    size = affine.scale[0] + (affine.scale[1] - affine.scale[0]) * size
    cos, sin = np.cos(angle), np.sin(angle)
    # Scale * rotation * shear, as in torchvision, around the centre of the picture.
    turned = size * np.array([[cos, -sin - cos * tan], [sin, cos - sin * tan]])
    inverse = np.linalg.inv(turned.transpose(2, 0, 1))
    centre = np.full((len(size), 2, 1), (image_size - 1) / 2)
    shift = affine.translate * image_size * np.stack(shifts, axis=1)[:, :, None]
    return np.concatenate([inverse, centre - inverse @ (centre + shift)], axis=2)


def _colors(recipe: AugmentRecipe, draws: np.ndarray) -> np.ndarray:
    jitter, (applies, greys), signed = recipe.color_jitter, draws[:2], 2.0 * draws[2:] - 1.0
    most = np.array([jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue])[:, None]
    bright, contrast, saturation, hue = np.where(applies < jitter.probability, most * signed, 0.0)
    chroma = np.where(greys < recipe.grayscale_probability, 0.0, 1.0 + saturation)
    cos, sin = chroma * np.cos(2 * np.pi * hue), chroma * np.sin(2 * np.pi * hue)
    one, zero = np.ones_like(cos), np.zeros_like(cos)
    turned = np.array([[one, zero, zero], [zero, cos, -sin], [zero, sin, cos]]).transpose(2, 0, 1)
    # Without clips in between, the changes commute.
    factors = (1.0 + contrast)[:, None, None] * (np.linalg.inv(_YIQ) @ turned @ _YIQ)
    offsets = np.broadcast_to(-contrast[:, None, None], (len(contrast), 3, 1))
    return (1.0 + bright)[:, None, None] * np.concatenate([factors, offsets], axis=2)
