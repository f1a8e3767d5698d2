"""From an encoded image to the uint8 patches that the model sees.

Every kind of image becomes the RGB that Pillow would show: turned as its EXIF block says, grey, CMYK, palette and
16-bit images converted, transparent pixels on white. Plain JPEGs are decoded by libjpeg-turbo (`simplejpeg`), plain
PNGs and WebPs by OpenCV, 1.2 to 4 times faster than by Pillow, which decodes all others.

Nothing but the formats that sets of pairs hold is opened, and no image takes more than about 800 MB and a few seconds:
`MAX_IMAGE_BYTES` and `MAX_PIXELS` bound what is decoded, `MAX_SCANS` how often, and `_Metered` what Pillow, whose
parsers are written in Python, reads before. All of these count bytes, pixels and calls and no seconds, so that the same
sample is refused on every machine and after every restart. Whatever else a decoder raises is an `UndecodableImage`.

Images are resized with Pillow's antialiased bicubic filter, which open_clip and the processor of a released model use
too. The implementation is torch's vectorised one: four times faster, and at most 3 of 255 away. The original's bicubic
takes four taps at any scale, so it aliases. `tests/data/test_decode.py` measures both differences.
"""

import io
import math
import warnings
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from flipscale.data import image_headers
from flipscale.data.samples import MAX_IMAGE_BYTES, BadSample, wrap_errors

# The workers already use all cores; OpenCV's own threads would compete with them.
cv2.setNumThreads(0)
# A damaged file raises an exception; OpenCV and Pillow would also print a message for each.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
warnings.filterwarnings("ignore", module=r"PIL\.")

# A random crop has ten tries of four numbers each; one more number decides the flip.
CROP_TRIES = 10
DRAWS_PER_CROP = 4 * CROP_TRIES + 1

# What crawls of the web hold, and what `flipscale prepare` takes from cameras and scanners. Of the others that Pillow
# knows, PostScript starts Ghostscript, FITS and others decode in loops of Python, and none is common.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# 8192 x 8192, 192 MiB of RGB; fewer of more than three channels. A file of more is a mistake or an attack.
MAX_PIXELS = 1 << 26
# Whole passes over `MAX_PIXELS` pixels that the scans of a JPEG make at most. Progressive ones have about ten; a scan
# of a dozen bytes takes as long as any other.
MAX_SCANS = 16

# A file that was not cut short has at least a bit for each 8 x 8 pixels of a JPEG.
_MOST_JPEG_PIXELS_PER_BYTE = 8 * 8 * 8
_STRIP_PIXELS = 1 << 20
_SMALL = 1 << 16  # bytes of decoded images that may wait to be resized


class Box(NamedTuple):
    """A crop window in pixels of the whole image."""

    top: int
    left: int
    height: int
    width: int


class Crop(NamedTuple):
    """A crop as it was decoded, uint8 RGB `(height, width, 3)`, and whether it is yet to be mirrored."""

    pixels: np.ndarray
    is_mirrored: bool

    def fitted(self, image_size: int) -> np.ndarray:
        """Return it in the model's size: uint8 RGB `(image_size, image_size, 3)`, contiguous."""
        is_fitted = self.pixels.shape[:2] == (image_size, image_size) and self.pixels.flags.c_contiguous
        pixels = self.pixels if is_fitted else resize(self.pixels, image_size)
        return cv2.flip(pixels, 1) if self.is_mirrored else pixels


class UndecodableImage(BadSample):
    """The bytes are not a readable image."""

    cause = "undecodable_image"


class OversizedImage(UndecodableImage):
    """The image, or decoding it, would take more than the limits of this module; it was not decoded."""

    cause = "image_too_large"


def centre_box(height: int, width: int, image_size: int, padding: int = 0) -> Box:
    """Return the centred square of the original's evaluation; at padding 0 it spans the short side. It has a pixel at
    least."""
    side = max(1, int(image_size / (image_size + padding) * min(height, width)))
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
    """Return the image, cropped and resized: uint8 RGB `(image_size, image_size, 3)`, contiguous; as `decode_crop`."""
    return decode_crop(encoded, draws, image_size, crop_scale).fitted(image_size)


@wrap_errors(UndecodableImage)
def decode_crop(encoded: bytes, draws: np.ndarray | None, image_size: int, crop_scale: tuple[float, float]) -> Crop:
    """Return the crop of an image. That of a large image is `fitted` already, so that no other memory is held.

    For a random crop, a JPEG is decoded at half, a quarter or an eighth of its size if the crop still has `image_size`
    pixels across.

    Args:
        draws: `DRAWS_PER_CROP` uniform numbers for a random crop, mirrored if the last is below 0.5; None: the centre.

    Raises:
        UndecodableImage: the bytes are no image or a damaged one.
        OversizedImage: it is larger than the limits of this module.
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
        box = _scaled(box, eighths)
    pixels = image[box.top : box.top + box.height, box.left : box.left + box.width]
    crop = Crop(pixels, draws is not None and bool(draws[-1] < 0.5))
    return crop if image.nbytes <= _SMALL else Crop(crop.fitted(image_size), False)


@wrap_errors(UndecodableImage)
def decode_whole(encoded: bytes) -> np.ndarray:
    """Return the whole image, upright: uint8 RGB `(height, width, 3)`.

    Raises:
        UndecodableImage: as for `decode_box`.
    """
    jpeg_size = _plain_jpeg_size(encoded)
    if jpeg_size is None:
        return _decode_other(encoded)
    return _upright(_decode_jpeg(encoded, jpeg_size, eighths=8), _exif_orientation(encoded))


@wrap_errors(UndecodableImage)
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


def _scaled(box: Box, eighths: int) -> Box:
    """Return a box in an image at `eighths` of its size, rounded to whole pixels and at least one."""
    top, left, height, width = (round(side * eighths / 8) for side in box)
    return Box(top, left, max(1, height), max(1, width))


def _plain_jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Return height and width, as stored, of a JPEG in colour or grey; None for all that Pillow must decode."""
    if len(encoded) > MAX_IMAGE_BYTES:
        raise OversizedImage(f"{len(encoded):,} bytes; at most {MAX_IMAGE_BYTES:,} are decoded")
    if encoded[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colourspace, _ = simplejpeg.decode_jpeg_header(encoded, strict=False)
    except (ValueError, KeyError):
        return None
    _check_size(height, width)
    _check_scans(encoded, height * width)
    return None if colourspace in ("CMYK", "YCCK") else (height, width)


def _check_size(height: int, width: int, channels: int = 3) -> None:
    most = MAX_PIXELS * 3 // max(channels, 3)
    if height * width > most:
        raise OversizedImage(f"{width} x {height} pixels; at most {most:,} are decoded")


def _check_scans(encoded: bytes, pixels: int) -> None:
    if pixels > _MOST_JPEG_PIXELS_PER_BYTE * len(encoded):
        raise UndecodableImage(f"{len(encoded)} bytes are too few for a JPEG of {pixels:,} pixels")
    most = MAX_SCANS * MAX_PIXELS // max(pixels, 1)
    # Counting takes a twentieth of decoding, and few files are long enough to have as many and have several at all.
    if len(encoded) <= most * 10 or image_headers.has_one_scan(encoded):
        return
    if (scans := encoded.count(b"\xff\xda")) > most:
        raise OversizedImage(f"{scans} scans of {pixels:,} pixels; at most {most} are decoded")


def _decode_jpeg(encoded: bytes, size: tuple[int, int], eighths: int) -> np.ndarray:
    """Return the RGB as stored, at `eighths` of its `size`, rounded up."""
    min_height, min_width = (-(-side * eighths // 8) for side in size)
    try:
        return simplejpeg.decode_jpeg(encoded, colorspace="RGB", min_height=min_height, min_width=min_width)
    except (ValueError, KeyError):
        # The file is damaged. Pillow skips stray bytes, but refuses a file that was cut short.
        whole = _pixels(open_image(encoded), upright=False)
        return whole if eighths == 8 else cv2.resize(whole, (min_width, min_height), interpolation=cv2.INTER_AREA)


_FIRST_SIDEWAYS = 5  # EXIF orientations 5 to 8 swap width and height


def _exif_orientation(encoded: bytes) -> int:
    """Return the orientation, 1 to 8, in a JPEG's EXIF block; 1 if there is no such block or a damaged one."""
    if (has_exif := image_headers.has_exif(encoded)) is None:
        raise OversizedImage(f"more than {image_headers.MOST_APP_BLOCKS} APPn blocks")
    return _orientation(open_image(encoded)) if has_exif else 1


def _orientation(image: Image.Image) -> int:
    """Return the orientation, 1 to 8, in an image's EXIF block; 1 if there is no such block or a damaged one."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # Pillow raises many kinds of exceptions for a damaged EXIF block. The pixels may be intact.
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Return a view of `image`, turned and mirrored as its EXIF `orientation` says."""
    if orientation in (3, 4, 6, 7):
        image = image[::-1]
    if orientation in (2, 3, 7, 8):
        image = image[:, ::-1]
    return image.swapaxes(0, 1) if orientation >= _FIRST_SIDEWAYS else image


class _Metered(io.BytesIO):
    """The bytes of an image as a file that Pillow may read so often, and so much before the first pixel, and no more.

    Pillow's parsers take a call or several for each block of a file, and some join all blocks that they have read anew
    for each.
    """

    MOST_READS = 300_000
    MOST_JOINED = 1 << 32

    def __init__(self, encoded: bytes):
        super().__init__(encoded)
        self.reads = self.seen = self.joined = 0
        self.is_opened = False

    def read(self, size: int | None = -1) -> bytes:
        """Return the next `size` bytes.

        Raises:
            OversizedImage: it was read too often or too much.
        """
        content = super().read(size)
        self.reads += 1
        if not self.is_opened:
            self.seen += len(content)
            self.joined += self.seen
        if self.reads > self.MOST_READS or self.joined > self.MOST_JOINED:
            raise OversizedImage(f"a header of {self.seen:,} bytes or more, read in {self.reads:,} pieces")
        return content


def open_image(encoded: bytes) -> Image.Image:
    """Open an image with Pillow, which reads only its header.

    Raises:
        UndecodableImage: as for `decode_box`.
    """
    if (complaint := image_headers.complaint(encoded, MAX_PIXELS)) is not None:
        raise OversizedImage(complaint)
    file = _Metered(encoded)
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise OversizedImage(str(error)) from error
    except UnidentifiedImageError as error:
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise UndecodableImage(
            f"{len(encoded)} bytes starting {encoded[:8]!r} are no {kinds} that can be read"
        ) from error
    except BadSample:
        raise
    except Exception as error:
        raise UndecodableImage(f"{len(encoded)} bytes starting {encoded[:8]!r}: {error}") from error
    file.is_opened = True
    # A value of the modes I and F has four bytes.
    _check_size(image.height, image.width, 4 if image.mode in ("I", "F") else len(image.getbands()))
    return image


def _decode_other(encoded: bytes) -> np.ndarray:
    """Return the upright RGB of anything that Pillow reads."""
    is_whole = image_headers.is_png_whole(encoded)
    if is_whole and (size := image_headers.plain_png_size(encoded)) is not None:
        _check_size(*size)
        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is not None and pixels.shape[:2] == size:
            return pixels
    image = open_image(encoded)
    plain = image.mode in ("L", "RGB") and not {"transparency", "exif", "xmp"} & image.info.keys()
    if is_whole and plain and image.format in ("PNG", "WEBP"):
        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is not None and pixels.shape[:2] == (image.height, image.width):
            return pixels
    return _pixels(image, upright=True)


def _pixels(image: Image.Image, upright: bool) -> np.ndarray:
    """Return the RGB of an image of any mode, transparent pixels on white, turned `upright` or as stored."""
    with wrap_errors(UndecodableImage):
        image.load()
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        # A strip at a time: conversions would hold several copies of the whole.
        height = max(1, _STRIP_PIXELS // image.width)
        for top in range(0, image.height, height):
            strip = image.crop((0, top, image.width, min(top + height, image.height)))
            pixels[top : top + height] = _rgb(strip)
    return _upright(pixels, _orientation(image)) if upright else pixels


def _rgb(image: Image.Image) -> np.ndarray:
    """Return the RGB of a part of an image of any mode, transparent pixels on white."""
    if image.mode.startswith("I"):
        # 16-bit grey; Pillow's conversion would clip it at 255.
        grey = (np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8)
        return grey[:, :, None]
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
