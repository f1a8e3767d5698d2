"""From an encoded image to the uint8 patches that the model sees.

What Pillow would show is what comes out, for every kind of image: turned as its EXIF says, grey, CMYK, palette and 16
bits as RGB, transparent pixels laid on white. Pillow itself reads the odd ones; plain JPEGs go through libjpeg-turbo
(`simplejpeg`) and plain PNGs and WebPs through OpenCV, 1.2 to 4 times faster.

Images are resized with Pillow's antialiased bicubic (torch's vectorised one: at most 3 of 255 away, four times
faster): the filter of open_clip, and of the processor that a released model ships with. The original's bicubic takes
four taps at any scale and so aliases. `tests/data/test_decode.py` measures both differences.
"""

import io
import math
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from flipscale.data.faults import BadSample

# Workers are the parallelism: OpenCV's own threads would only fight over their cores.
cv2.setNumThreads(0)
# A damaged file is an exception here; OpenCV would also print each one.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# Four numbers for each of the ten tries of a random crop, and one for the flip.
CROP_TRIES = 10
DRAWS_PER_CROP = 4 * CROP_TRIES + 1

# Pillow's own limit, 256 MiB of RGB; a file that decodes to more is a mistake or an attack.
MAX_PIXELS = 1024**3 // 4 // 3


class Box(NamedTuple):
    """A crop window in pixels of the whole image."""

    top: int
    left: int
    height: int
    width: int


class UndecodableImage(BadSample):
    """The bytes are not an image that can be read."""

    cause = "undecodable_image"


class OversizedImage(UndecodableImage):
    """The image has more than `MAX_PIXELS` pixels; it was not decoded."""

    cause = "image_too_large"


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
    """The cropped, resized image: uint8 RGB `(image_size, image_size, 3)`, contiguous.

    For a random crop a JPEG is decoded at half, a quarter or an eighth of its size where that leaves `image_size`
    pixels across the crop.

    Args:
        draws: `DRAWS_PER_CROP` uniform numbers for a random crop and flip; None for the centred square.

    Raises:
        UndecodableImage: no image, a damaged one, or (OversizedImage) one of more than `MAX_PIXELS` pixels.
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
        # A scaled crop is rounded to whole pixels: no matter for a random one, but a test image is decoded whole.
        eighths = 8 if draws is None else _fewest_eighths(box, image_size)
        image = _upright(_decode_jpeg(encoded, jpeg_size, eighths), orientation)
        box = Box(*(round(side * eighths / 8) for side in box))
    crop = resize(image[box.top : box.top + box.height, box.left : box.left + box.width], image_size)
    if draws is not None and draws[-1] < 0.5:
        crop = cv2.flip(crop, 1)
    return crop


def resize(crop: np.ndarray, image_size: int) -> np.ndarray:
    """A crop `(height, width, 3)` as `(image_size, image_size, 3)`, both uint8: Pillow's BICUBIC."""
    # Unsqueezed before it is permuted: only then does torch see that the channels come last, and copies nothing.
    planes = torch.from_numpy(np.ascontiguousarray(crop)).unsqueeze(0).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(planes, (image_size, image_size), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


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


def _fewest_eighths(box: Box, image_size: int) -> int:
    """The smallest scale that leaves `image_size` pixels across `box`, in eighths: 1, 2, 4 or 8.

    libjpeg-turbo has vector code for these scales alone; at 5 to 7 eighths it is slower than at 8.
    """
    least = 8 * image_size / min(box.height, box.width)
    return next((eighths for eighths in (1, 2, 4) if eighths >= least), 8)


def _plain_jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Height and width as stored of a JPEG in colour or grey, from its header; None for all that Pillow must judge."""
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
    """RGB as stored, at `eighths` of its `size`, rounded up."""
    min_height, min_width = (-(-side * eighths // 8) for side in size)
    try:
        return simplejpeg.decode_jpeg(encoded, colorspace="RGB", min_height=min_height, min_width=min_width)
    except (ValueError, KeyError):
        # Damaged. Pillow reads on over stray bytes, but not past the end of a file that was cut short.
        whole = _pixels(_open(encoded), upright=False)
        return whole if eighths == 8 else cv2.resize(whole, (min_width, min_height), interpolation=cv2.INTER_AREA)


_FIRST_SIDEWAYS = 5  # EXIF orientations 5 to 8 swap width and height


def _exif_orientation(encoded: bytes) -> int:
    """1 to 8, as the EXIF block of a JPEG says; 1 where it has none or a damaged one."""
    if not _has_exif(encoded):
        return 1
    try:
        orientation = Image.open(io.BytesIO(encoded)).getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # Pillow meets a damaged EXIF block with whatever its parser stumbled over; the pixels may be sound.
        return 1
    return orientation if orientation in range(1, 9) else 1


def _has_exif(encoded: bytes) -> bool:
    """Whether one of the APPn blocks at the start of a JPEG is EXIF; most images of shards have none."""
    start = 2
    while encoded[start : start + 1] == b"\xff" and 0xE0 <= encoded[start + 1] <= 0xEF:
        if encoded.startswith(b"Exif\0", start + 4):
            return True
        start += 2 + int.from_bytes(encoded[start + 2 : start + 4], "big")
    return False


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """A view of `image` as its EXIF `orientation` says to show it."""
    if orientation in (3, 4, 6, 7):
        image = image[::-1]
    if orientation in (2, 3, 7, 8):
        image = image[:, ::-1]
    return image.swapaxes(0, 1) if orientation >= _FIRST_SIDEWAYS else image


def _open(encoded: bytes) -> Image.Image:
    """The image by Pillow, its header read."""
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
    """RGB of anything that Pillow reads, upright."""
    image = _open(encoded)
    plain = image.mode in ("L", "RGB") and not {"transparency", "exif", "xmp"} & image.info.keys()
    if plain and image.format in ("PNG", "WEBP"):
        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is not None:
            return pixels
    return _pixels(image, upright=True)


def _pixels(image: Image.Image, upright: bool) -> np.ndarray:
    """RGB of an image of any mode, on white where it is transparent; turned `upright` or as stored."""
    try:
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            # 16 bits of grey, which Pillow would clip at 255.
            grey = (np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))
    except Exception as error:
        raise UndecodableImage(f"an image in mode {image.mode}: {error}") from error
