"""From an encoded image to the uint8 patches that the model sees.

Differs from the original on purpose: images are shrunk with an area filter (antialiased), where the original's bicubic
takes four taps at any scale and so aliases; enlarging is bicubic in both. `tests/data/test_decode.py` measures the
difference on the original's own inputs and outputs.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

# Workers are the parallelism: OpenCV's own threads would only fight over their cores.
cv2.setNumThreads(0)

# Four numbers for each of the ten tries of a random crop, and one for the flip.
CROP_TRIES = 10
DRAWS_PER_CROP = 4 * CROP_TRIES + 1


class Box(NamedTuple):
    """A crop window in pixels of the whole image."""

    top: int
    left: int
    height: int
    width: int


class UndecodableImage(Exception):
    """The bytes are not an image that can be read."""


def centre_box(height: int, width: int, image_size: int, padding: int = 0) -> Box:
    """The centred square of the original's evaluation: the whole short side at padding 0."""
    side = int(image_size / (image_size + padding) * min(height, width))
    return Box((height - side + 1) // 2, (width - side + 1) // 2, side, side)


def random_box(height: int, width: int, draws: np.ndarray, image_size: int, crop_scale: tuple[float, float]) -> Box:
    """The original's random resized crop: area uniform in `crop_scale` of the image, aspect log-uniform in 3/4..4/3,
    the first of ten tries that fits, else a centred square.

    Args:
        draws: `DRAWS_PER_CROP` uniform numbers of this sample.
    """
    log_ratio = math.log(4 / 3)
    for area_draw, ratio_draw, top_draw, left_draw in draws[: 4 * CROP_TRIES].reshape(CROP_TRIES, 4).tolist():
        area = (crop_scale[0] + (crop_scale[1] - crop_scale[0]) * area_draw) * height * width
        ratio = math.exp((2 * ratio_draw - 1) * log_ratio)
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = int(top_draw * (height - box_height + 1)), int(left_draw * (width - box_width + 1))
            return Box(top, left, box_height, box_width)
    return centre_box(height, width, image_size, padding=32)


def _jpeg_dimensions(encoded: bytes) -> tuple[int, int]:
    """Height and width from the header alone."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(encoded, strict=False)
    except (ValueError, KeyError) as error:
        raise UndecodableImage(str(error)) from error
    return height, width


def _decode_other(encoded: bytes) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise UndecodableImage(str(error)) from error
    if image is None:
        raise UndecodableImage(f"{len(encoded)} bytes starting {encoded[:8]!r} are no image that OpenCV reads")
    return image


def decode_box(
    encoded: bytes, draws: np.ndarray | None, image_size: int, crop_scale: tuple[float, float]
) -> np.ndarray:
    """The cropped, resized image: uint8 RGB `(image_size, image_size, 3)`.

    For a random crop a JPEG is decoded at the smallest DCT scale that still has `image_size` pixels across it.

    Args:
        draws: `DRAWS_PER_CROP` uniform numbers for a random crop and flip; None for the centred square.

    Raises:
        UndecodableImage
    """
    is_jpeg = encoded[:2] == b"\xff\xd8"
    if is_jpeg:
        height, width = _jpeg_dimensions(encoded)
    else:
        image = _decode_other(encoded)
        height, width = image.shape[:2]
    if draws is None:
        box = centre_box(height, width, image_size)
    else:
        box = random_box(height, width, draws, image_size, crop_scale)
    if is_jpeg:
        # A scaled crop is rounded to whole pixels: no matter for a random one, but a test image is decoded whole.
        least = max(image_size / box.height, image_size / box.width) if draws is not None else 1.0
        image = _decode_jpeg(encoded, min(math.ceil(height * least), height), min(math.ceil(width * least), width))
        # The decoder scales by eighths and rounds the size up, so the sizes' own ratio would be off.
        scale = round(8 * image.shape[0] / height) / 8
        box = Box(*(round(side * scale) for side in box))
    crop = image[box.top : box.top + box.height, box.left : box.left + box.width]
    crop = resize(crop, image_size)
    if draws is not None and draws[-1] < 0.5:
        crop = crop[:, ::-1]
    return crop


def resize(crop: np.ndarray, image_size: int) -> np.ndarray:
    """A crop `(height, width, 3)` as `(image_size, image_size, 3)`: area-filtered to shrink, bicubic to enlarge."""
    shrinks = min(crop.shape[:2]) >= image_size
    return cv2.resize(crop, (image_size, image_size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def _decode_jpeg(encoded: bytes, min_height: int, min_width: int) -> np.ndarray:
    try:
        return simplejpeg.decode_jpeg(
            encoded, colorspace="RGB", min_height=min_height, min_width=min_width, strict=False
        )
    except (ValueError, KeyError) as error:
        raise UndecodableImage(str(error)) from error


def visible_patches(image: np.ndarray, patch_size: int, patch_index: np.ndarray | None) -> np.ndarray:
    """The patches `patch_index` `(kept,)` or `(views, kept)` of an image `(size, size, 3)`, or all: uint8
    `(kept, 3 * p * p)` or `(views, kept, 3 * p * p)`, each laid out channel by channel as a flattened convolution
    kernel."""
    side = image.shape[0] // patch_size
    grid = image.reshape(side, patch_size, side, patch_size, 3).transpose(0, 2, 4, 1, 3)
    if patch_index is None:
        return grid.reshape(side * side, -1)
    rows, columns = np.divmod(patch_index, side)
    return grid[rows, columns].reshape(*patch_index.shape, -1)
