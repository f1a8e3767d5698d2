"""From an encoded image to the uint8 patches that the model sees.

Every kind of image becomes the RGB that Pillow would show: turned as its EXIF block says, grey, CMYK, palette and
16-bit images converted, transparent pixels on white. Plain JPEGs are decoded by libjpeg-turbo (`simplejpeg`), plain
PNGs and WebPs by OpenCV, 1.2 to 4 times faster than by Pillow, which decodes all others.

Images are resized with Pillow's antialiased bicubic filter, which open_clip and the processor of a released model use
too. The implementation is torch's vectorised one: four times faster, and at most 3 of 255 away. The original's bicubic
takes four taps at any scale, so it aliases. `tests/data/test_decode.py` measures both differences.
"""

import io
import math
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from flipscale.data.faults import BadSample

# The workers already use all cores; OpenCV's own threads would compete with them.
cv2.setNumThreads(0)
# A damaged file raises an exception; OpenCV would also print a message for each.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# A random crop has ten tries of four numbers each; one more number decides the flip.
CROP_TRIES = 10
DRAWS_PER_CROP = 4 * CROP_TRIES + 1

# Pillow's own limit, 256 MiB of RGB. A file that decodes to more is a mistake or an attack.
MAX_PIXELS = 1024**3 // 4 // 3


class Box(NamedTuple):
    """A crop window in pixels of the whole image."""

    top: int
    left: int
    height: int
    width: int


class UndecodableImage(BadSample):
    """The bytes are not a readable image."""

    cause = "undecodable_image"


class OversizedImage(UndecodableImage):
    """The image has more than `MAX_PIXELS` pixels; it was not decoded."""

    cause = "image_too_large"


def centre_box(height: int, width: int, image_size: int, padding: int = 0) -> Box:
    """Return the centred square of the original's evaluation; at padding 0 it spans the short side."""
    side = int(image_size / (image_size + padding) * min(height, width))
    return Box((height - side + 1) // 2, (width - side + 1) // 2, side, side)


def random_box(height: int, width: int, draws: np.ndarray, image_size: int, crop_scale: tuple[float, float]) -> Box:
    """Return the original's random resized crop: the first of ten tries that fits the image, else a centred square.

    Each try draws the area uniformly from `crop_scale` of the image's, and the aspect ratio log-uniformly from 3/4 to
    4/3.

    Args:
        draws: the `DRAWS_PER_CROP` uniform numbers of the sample.
    """
    log_ratio = math.log(4 / 3)
    for attempt in range(CROP_TRIES):
        area_draw, ratio_draw, top_draw, left_draw = draws[4 * attempt : 4 * attempt + 4].tolist()
        area = (crop_scale[0] + (crop_scale[1] - crop_scale[0]) * area_draw) * height * width
        ratio = math.exp((2 * ratio_draw - 1) * log_ratio)
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = int(top_draw * (height - box_height + 1)), int(left_draw * (width - box_width + 1))
            return Box(top, left, box_height, box_width)
    return centre_box(height, width, image_size, padding=32)


def decode_box(
    encoded: bytes, draws: np.ndarray | None, image_size: int, crop_scale: tuple[float, float]
) -> np.ndarray:
    """Return the image, cropped and resized: uint8 RGB `(image_size, image_size, 3)`, contiguous.

    For a random crop, a JPEG is decoded at half, a quarter or an eighth of its size if the crop still has `image_size`
    pixels across.

    Args:
        draws: `DRAWS_PER_CROP` uniform numbers for a random crop and flip; None for the centred square.

    Raises:
        UndecodableImage: the bytes are no image or a damaged one.
        OversizedImage: the image has more than `MAX_PIXELS` pixels.
    """
    jpeg_size = _plain_jpeg_size(encoded)
    if jpeg_size is None:
        image = _decode_other(encoded)
        height, width = image.shape[:2]
    else:
        height, width = jpeg_size
        orientation = _exif_orientation(encoded)
        if orientation >= _FIRST_SIDEWAYS:
            height, width = width, height
    if draws is None:
        box = centre_box(height, width, image_size)
    else:
        box = random_box(height, width, draws, image_size, crop_scale)
    if jpeg_size is not None:
        # A scaled crop is rounded to whole pixels. A random crop may be; a test image is decoded at full size.
        eighths = 8 if draws is None else _fewest_eighths(box, image_size)
        image = _upright(_decode_jpeg(encoded, jpeg_size, eighths), orientation)
        box = Box(*(round(side * eighths / 8) for side in box))
    crop = resize(image[box.top : box.top + box.height, box.left : box.left + box.width], image_size)
    if draws is not None and draws[-1] < 0.5:
        crop = cv2.flip(crop, 1)
    return crop


def decode_whole(encoded: bytes) -> np.ndarray:
    """Return the whole image, upright: uint8 RGB `(height, width, 3)`.

    Raises:
        UndecodableImage: as for `decode_box`.
    """
    jpeg_size = _plain_jpeg_size(encoded)
    if jpeg_size is None:
        return _decode_other(encoded)
    return _upright(_decode_jpeg(encoded, jpeg_size, eighths=8), _exif_orientation(encoded))


def decode_small(encoded: bytes, least_side: int) -> np.ndarray:
    """Return the whole image, upright: uint8 RGB `(height, width, 3)`, and of a JPEG the smallest of half, a quarter
    and an eighth of its size that still has `least_side` pixels across.

    Raises:
        UndecodableImage: as for `decode_box`.
    """
    jpeg_size = _plain_jpeg_size(encoded)
    if jpeg_size is None:
        return _decode_other(encoded)
    eighths = _fewest_eighths(Box(0, 0, *jpeg_size), least_side)
    return _upright(_decode_jpeg(encoded, jpeg_size, eighths), _exif_orientation(encoded))


def resize(crop: np.ndarray, image_size: int) -> np.ndarray:
    """Resize a crop `(height, width, 3)` to `(image_size, image_size, 3)`, both uint8, by Pillow's BICUBIC."""
    import torch  # which takes seconds, and whoever only decodes has no need of it

    # In this order (unsqueeze, then permute) torch recognises channels-last memory and copies nothing.
    planes = torch.from_numpy(np.ascontiguousarray(crop)).unsqueeze(0).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(planes, (image_size, image_size), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def visible_patches(image: np.ndarray, patch_size: int, patch_index: np.ndarray | None) -> np.ndarray:
    """Return the patches `patch_index` of an image `(size, size, 3)`, or all patches if that is None.

    An index `(kept,)` gives uint8 `(kept, 3 * p * p)`, an index `(views, kept)` gives `(views, kept, 3 * p * p)`. A
    patch is laid out channel by channel, as a flattened convolution kernel.
    """
    side = image.shape[0] // patch_size
    grid = image.reshape(side, patch_size, side, patch_size, 3).transpose(0, 2, 4, 1, 3)
    if patch_index is None:
        return grid.reshape(side * side, -1)
    rows, columns = np.divmod(patch_index, side)
    return grid[rows, columns].reshape(*patch_index.shape, -1)


def _fewest_eighths(box: Box, image_size: int) -> int:
    """Return the smallest scale, in eighths (1, 2, 4 or 8), at which `box` still has `image_size` pixels across.

    libjpeg-turbo has vector code for these scales only; at 5 to 7 eighths it is slower than at 8.
    """
    least = 8 * image_size / min(box.height, box.width)
    return next((eighths for eighths in (1, 2, 4) if eighths >= least), 8)


def _plain_jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Return height and width, as stored, of a JPEG in colour or grey; None for all that Pillow must decode."""
    if encoded[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colourspace, _ = simplejpeg.decode_jpeg_header(encoded, strict=False)
    except (ValueError, KeyError):
        return None
    _check_size(height, width)
    return None if colourspace in ("CMYK", "YCCK") else (height, width)


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise OversizedImage(f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded")


def _decode_jpeg(encoded: bytes, size: tuple[int, int], eighths: int) -> np.ndarray:
    """Return the RGB as stored, at `eighths` of its `size`, rounded up."""
    min_height, min_width = (-(-side * eighths // 8) for side in size)
    try:
        return simplejpeg.decode_jpeg(encoded, colorspace="RGB", min_height=min_height, min_width=min_width)
    except (ValueError, KeyError):
        # The file is damaged. Pillow skips stray bytes, but refuses a file that was cut short.
        whole = _pixels(_open(encoded), upright=False)
        return whole if eighths == 8 else cv2.resize(whole, (min_width, min_height), interpolation=cv2.INTER_AREA)


_FIRST_SIDEWAYS = 5  # EXIF orientations 5 to 8 swap width and height


def _exif_orientation(encoded: bytes) -> int:
    """Return the orientation, 1 to 8, in a JPEG's EXIF block; 1 if there is no such block or a damaged one."""
    if not _has_exif(encoded):
        return 1
    try:
        orientation = Image.open(io.BytesIO(encoded)).getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # Pillow raises many kinds of exceptions for a damaged EXIF block. The pixels may be intact.
        return 1
    return orientation if orientation in range(1, 9) else 1


def _has_exif(encoded: bytes) -> bool:
    """Return whether one of the APPn blocks at the start of a JPEG is EXIF; most images in shards have none."""
    start = 2
    while encoded[start : start + 1] == b"\xff" and 0xE0 <= encoded[start + 1] <= 0xEF:
        if encoded.startswith(b"Exif\0", start + 4):
            return True
        start += 2 + int.from_bytes(encoded[start + 2 : start + 4], "big")
    return False


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Return a view of `image`, turned and mirrored as its EXIF `orientation` says."""
    if orientation in (3, 4, 6, 7):
        image = image[::-1]
    if orientation in (2, 3, 7, 8):
        image = image[:, ::-1]
    return image.swapaxes(0, 1) if orientation >= _FIRST_SIDEWAYS else image


def _open(encoded: bytes) -> Image.Image:
    """Open an image with Pillow, which reads only its header."""
    try:
        image = Image.open(io.BytesIO(encoded))
    except Image.DecompressionBombError as error:
        raise OversizedImage(str(error)) from error
    except UnidentifiedImageError as error:
        raise UndecodableImage(f"{len(encoded)} bytes starting {encoded[:8]!r} are no image Pillow knows") from error
    except Exception as error:
        raise UndecodableImage(f"{len(encoded)} bytes starting {encoded[:8]!r}: {error}") from error
    _check_size(image.height, image.width)
    return image


def _decode_other(encoded: bytes) -> np.ndarray:
    """Return the upright RGB of anything that Pillow reads."""
    image = _open(encoded)
    plain = image.mode in ("L", "RGB") and not {"transparency", "exif", "xmp"} & image.info.keys()
    if plain and image.format in ("PNG", "WEBP"):
        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is not None:
            return pixels
    return _pixels(image, upright=True)


def _pixels(image: Image.Image, upright: bool) -> np.ndarray:
    """Return the RGB of an image of any mode, transparent pixels on white, turned `upright` or as stored."""
    try:
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            # 16-bit grey; Pillow's conversion would clip it at 255.
            grey = (np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))
    except Exception as error:
        raise UndecodableImage(f"an image in mode {image.mode}: {error}") from error
