"""Random crops of a set's images as a set of their own, which any embedder takes."""

import dataclasses

import cv2
import numpy as np

from flipscale.data.decode import DRAWS_PER_CROP, UndecodableImage, decode_box
from flipscale.data.randomness import keyed_uniform
from flipscale.data.samples import Sample
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.images import ChosenRows
from flipscale.io.errors import UserError


class RandomCrops(ChosenRows):
    """Random crops of rows of a source, resized to the model's square, half of them mirrored.

    A crop is handed on as an encoded image, so that whatever the embedder does to whole images is done to it: its size
    is right already, so nothing is resized or cut again. Encoding costs about a millisecond at 224 px.

    Args:
        source: of the whole images.
        order: the rows of `source` that are the samples here.
        epoch: of the training; with the seed and the row, it draws the crop.
        image_size: of the model, in pixels.
        crop_scale: the least and the largest share of the area.
        seed: of the draws.
    """

    def __init__(
        self,
        source: TarSource,
        order: np.ndarray,
        epoch: int,
        image_size: int,
        crop_scale: tuple[float, float],
        seed: int,
    ):
        super().__init__(source, order)
        self._first_draw = epoch * len(source)
        self._image_size = image_size
        self._crop_scale = crop_scale
        self._seed = seed

    def read(self, shard: int, number: int) -> Sample:
        """Return the crop that is sample `number`.

        Raises:
            ValueError: the image cannot be decoded.
            OSError: its shard cannot be read.
        """
        sample = super().read(shard, number)
        position = self._first_draw + int(self.rows[number])
        draws = keyed_uniform(self._seed, "probe crop", np.array([position]), DRAWS_PER_CROP)[0]
        try:
            crop = decode_box(sample.image, draws, self._image_size, self._crop_scale)
        except UndecodableImage as error:
            raise UserError(f"training image {sample.name} cannot be decoded: {error}") from error
        return dataclasses.replace(sample, image=_encoded(crop))


def _encoded(crop: np.ndarray) -> bytes:
    """Return a PNG, hardly compressed."""
    bgr = cv2.cvtColor(crop, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
