"""Decoding of an image into the uint8 patches of the model.

Every kind of image becomes the RGB that Pillow shows. It is upright by its EXIF block, and transparent pixels are
white. Grey, CMYK, palette and 16-bit images are converted. libjpeg-turbo (`simplejpeg`) decodes plain JPEGs, and OpenCV
plain PNGs and WebPs, 1.2 to 4 times faster than Pillow. Pillow decodes all others.

Only the formats of image-text sets are opened, and no image takes more than about 800 MB and a few seconds.
`MAX_IMAGE_BYTES` and `MAX_PIXELS` limit the decoded image, `MAX_SCANS` its passes, and `_MeteredFile` the reads of
Pillow's parsers, which are written in Python. These limits count bytes, pixels and calls instead of seconds, so that
every machine and every restart refuses the same samples. Any other error of a decoder is an `UndecodableImage`.

Images are resized with Pillow's antialiased bicubic filter, as by open_clip and the processor of a released model. The
implementation is torch's: four times faster, and at most 3 of 255 off. The original's bicubic takes four taps at any
scale, so it aliases. `tests/data/test_decode.py` measures both differences.
"""

import io
import math
import re
import struct
import warnings
import zlib
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from flipscale.data.samples import MAX_IMAGE_BYTES, BadSample, wrap_errors

# The workers already use all cores, and OpenCV's threads would compete with them.
cv2.setNumThreads(0)
# A damaged file raises an exception. OpenCV and Pillow would print a message, too.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
warnings.filterwarnings("ignore", module=r"PIL\.")

# A random crop has ten tries of four numbers each; the last number decides the flip.
CROP_TRIES = 10
DRAWS_PER_CROP = 4 * CROP_TRIES + 1

# Formats of web crawls, cameras and scanners. Among Pillow's other formats, PostScript starts Ghostscript, and FITS and
# others decode in loops of Python. None of them is common.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# 8192 x 8192, 192 MiB of RGB; fewer with more than three channels. Larger files are mistakes or attacks.
MAX_PIXELS = 1 << 26
# Passes over `MAX_PIXELS` pixels by the scans of a JPEG. Progressive files have about ten. A scan of a dozen bytes
# takes as long as any other.
MAX_SCANS = 16
# A whole JPEG has at least a bit for each 8 x 8 pixels.
_MOST_JPEG_PIXELS_PER_BYTE = 8 * 8 * 8
_STRIP_PIXELS = 1 << 20
_MOST_SIDES = 8  # times the short side of an image in its long side
_SMALL_BYTES = 1 << 16  # size of a decoded image that may wait for its resize

# Limits of headers. Each row of a TIFF may be its own strip, with an offset and a length. A TIFF's tile is decoded
# whole, however small the image is. Encoders write PNG chunks of 8 KiB and more.
_MOST_TIFF_VALUES = 1 << 16
_MOST_TILE_PIXELS = 1 << 24
_MOST_APP_BLOCKS = 1000
_MOST_PNG_CHUNKS = 100_000

_TIFF_BYTE_TYPES = (1, 2, 7)  # BYTE, ASCII and UNDEFINED, whose values Pillow keeps as one string
_TIFF_SHORT, _TIFF_TILE_SIZES, _TIFF_ENTRY_BYTES = 3, (322, 323), 12
_JPEG_MARKER = re.compile(rb"\xff+([\xc0-\xfe])")
_TURNING = (b"Exif\0", b"http://ns.adobe.com/xap/1.0/\0")
# PNG chunks and texts with which OpenCV shows another picture than Pillow.
_ODD_CHUNKS = re.compile(rb"eXIf|acTL|tRNS|[ziT][TE]Xt(Raw profile type exif|XML:com\.adobe\.xmp)\0")
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_AND_HEADER = _PNG + b"\0\0\0\rIHDR"
# Bits, colour type (grey or RGB), compression, filter and interlacing of a plain PNG.
_PLAIN_PNGS = (b"\x08\0\0\0\0", b"\x08\x02\0\0\0")


class Box(NamedTuple):
    """A crop window in pixels of the whole image."""

    top: int
    left: int
    height: int
    width: int


class Crop(NamedTuple):
    """A decoded crop, uint8 RGB `(height, width, 3)`, and whether it must still be mirrored."""

    pixels: np.ndarray
    is_mirrored: bool

    def fitted(self, image_size: int) -> np.ndarray:
        """Return the crop in the model's size: uint8 RGB `(image_size, image_size, 3)`, contiguous."""
        is_fitted = self.pixels.shape[:2] == (image_size, image_size) and self.pixels.flags.c_contiguous
        pixels = self.pixels if is_fitted else resize(self.pixels, image_size)
        return cv2.flip(pixels, 1) if self.is_mirrored else pixels


class UndecodableImage(BadSample):
    """The bytes are not a readable image."""

    cause = "undecodable_image"


class OversizedImage(UndecodableImage):
    """The image, or its decoding, exceeds the limits of this module; it was not decoded."""

    cause = "image_too_large"


def centre_box(height: int, width: int, image_size: int, padding: int = 0) -> Box:
    """Return the centred square of the original's evaluation, at least one pixel. At padding 0 it spans the short
    side."""
    side = max(1, int(image_size / (image_size + padding) * min(height, width)))
    return Box((height - side + 1) // 2, (width - side + 1) // 2, side, side)


def random_box(height: int, width: int, draws: np.ndarray, image_size: int, crop_scale: tuple[float, float]) -> Box:
    """Return the original's random resized crop: the first of ten tries that fits the image, else a centred square.

    Each try draws the area uniformly from `crop_scale`, and the aspect ratio log-uniformly from 3/4 to 4/3.

    Args:
        draws: `DRAWS_PER_CROP` uniform numbers of the sample.
        image_size: size of the fallback, a centred square.
        crop_scale: least and most area of the crop as fractions of the image's.
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
    """Return the image, cropped and resized: uint8 RGB `(image_size, image_size, 3)`, contiguous. See `decode_crop`."""
    return decode_crop(encoded, draws, image_size, crop_scale).fitted(image_size)


@wrap_errors(UndecodableImage)
def decode_crop(
    encoded: bytes,
    draws: np.ndarray | None,
    image_size: int,
    crop_scale: tuple[float, float],
    fallback_size: int | None = None,
) -> Crop:
    """Return the crop of an image. A crop of a large image is `fitted` already, so that it holds no other memory.

    For a random crop, a JPEG is decoded at half, a quarter or an eighth of its size if the crop still has `image_size`
    pixels across. Raise UndecodableImage if the bytes are no image, or a damaged or an oversized one.

    Args:
        draws: `DRAWS_PER_CROP` uniform numbers for a random crop, mirrored if the last is below 0.5; None for the
            centre.
        crop_scale: least and most area of a random crop as fractions of the image's.
        fallback_size: size in place of `image_size` for the fallback of `random_box`.
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
        box = random_box(height, width, draws, fallback_size or image_size, crop_scale)
    if jpeg_size is not None:
        # Test images are decoded at full size, because a crop of a scaled image is rounded to whole pixels.
        eighths = 8 if draws is None else _fewest_eighths(box, image_size)
        image = _upright(_decode_jpeg(encoded, jpeg_size, eighths), orientation)
        top, left, *sides = (round(side * eighths / 8) for side in box)
        box = Box(top, left, *(max(1, side) for side in sides))
    pixels = image[box.top : box.top + box.height, box.left : box.left + box.width]
    crop = Crop(pixels, draws is not None and bool(draws[-1] < 0.5))
    return crop if image.nbytes <= _SMALL_BYTES else Crop(crop.fitted(image_size), False)


def decode_whole(encoded: bytes) -> np.ndarray:
    """Return the whole image, upright: uint8 RGB `(height, width, 3)`."""
    return decode_small(encoded, MAX_PIXELS)


@wrap_errors(UndecodableImage)
def decode_small(encoded: bytes, least_side: int) -> np.ndarray:
    """Return the whole image, upright: uint8 RGB `(height, width, 3)`.

    A JPEG is decoded at the smallest of half, a quarter and an eighth of its size that still has `least_side` pixels
    across.
    """
    jpeg_size = _plain_jpeg_size(encoded)
    if jpeg_size is None:
        return _decode_other(encoded)
    eighths = _fewest_eighths(Box(0, 0, *jpeg_size), least_side)
    return _upright(_decode_jpeg(encoded, jpeg_size, eighths), _exif_orientation(encoded))


def decode_processed(encoded: bytes, image_size: int, squash: bool = False) -> np.ndarray:
    """Return an image, upright, as the processor of an exported model gives it: uint8 `(image_size, image_size, 3)`.

    The short side is resized to `image_size`, and the centre is cut out. With `squash`, the whole image takes its
    place. Raise UndecodableImage for bytes that are no image."""
    image = decode_whole(encoded)
    if squash:
        return resize(image, image_size)
    # The ends of a strip are outside of the centre, and resized they could fill the memory.
    most = _MOST_SIDES * min(image.shape[:2])
    image = image[tuple(slice(max(0, side - most) // 2, side - max(0, side - most) // 2) for side in image.shape[:2])]
    height, width = (image_size * side // min(image.shape[:2]) for side in image.shape[:2])
    top, left = (height - image_size) // 2, (width - image_size) // 2
    return resize(image, (height, width))[top : top + image_size, left : left + image_size]


def resize(crop: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Resize a crop `(height, width, 3)` to a square or a height and width, both uint8, by Pillow's BICUBIC."""
    import torch  # here, because its import takes seconds and decoding alone does not need it

    # Views by numpy, because each call of torch runs code that decoding has evicted from the cache. With the strides of
    # `reshape`, torch recognises channels-last memory and copies nothing.
    planes = torch.from_numpy(np.ascontiguousarray(crop).reshape(1, *crop.shape).transpose(0, 3, 1, 2))
    resized = torch.nn.functional.interpolate(planes, size, mode="bicubic", antialias=True)
    return resized.numpy()[0].transpose(1, 2, 0)


def visible_patches(image: np.ndarray, patch_size: int, patch_index: np.ndarray | None) -> np.ndarray:
    """Return the patches `patch_index` of an image `(size, size, 3)`; all patches for None.

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
    """Return the smallest scale, in eighths, that leaves `box` at least `image_size` pixels across. Only 1, 2, 4 and 8,
    for which libjpeg-turbo has vector code."""
    least = 8 * image_size / min(box.height, box.width)
    return next((eighths for eighths in (1, 2, 4) if eighths >= least), 8)


def _plain_jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Return the stored height and width of a JPEG in colour or grey; None for images that Pillow must decode."""
    if len(encoded) > MAX_IMAGE_BYTES:
        raise OversizedImage(f"{len(encoded):,} bytes; at most {MAX_IMAGE_BYTES:,} are decoded")
    if encoded[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colourspace, _ = simplejpeg.decode_jpeg_header(encoded, strict=False)
    except (ValueError, KeyError):
        return None
    _check_size(height, width)
    if (pixels := height * width) > _MOST_JPEG_PIXELS_PER_BYTE * len(encoded):
        raise UndecodableImage(f"{len(encoded)} bytes are too few for a JPEG of {pixels:,} pixels")
    most = MAX_SCANS * MAX_PIXELS // max(pixels, 1)
    # Skipped for most files, because counting takes a twentieth of decoding.
    counts = len(encoded) > most * 10 and not _has_one_scan(encoded)
    if counts and (scans := encoded.count(b"\xff\xda")) > most:
        raise OversizedImage(f"{scans} scans of {pixels:,} pixels; at most {most} are decoded")
    return None if colourspace in ("CMYK", "YCCK") else (height, width)


def _check_size(height: int, width: int, channels: int = 3) -> None:
    most = MAX_PIXELS * 3 // max(channels, 3)
    if height * width > most:
        raise OversizedImage(f"{width} x {height} pixels; at most {most:,} are decoded")


def _decode_jpeg(encoded: bytes, size: tuple[int, int], eighths: int) -> np.ndarray:
    """Return the RGB as stored, at `eighths` of `size`, rounded up."""
    min_height, min_width = (-(-side * eighths // 8) for side in size)
    try:
        return simplejpeg.decode_jpeg(encoded, colorspace="RGB", min_height=min_height, min_width=min_width)
    except (ValueError, KeyError):
        # In a damaged file, Pillow skips stray bytes. It refuses a file that was cut short.
        whole = rgb_pixels(open_image(encoded), upright=False)
        return whole if eighths == 8 else cv2.resize(whole, (min_width, min_height), interpolation=cv2.INTER_AREA)


_FIRST_SIDEWAYS = 5  # EXIF orientations 5 to 8 swap width and height


def _exif_orientation(encoded: bytes) -> int:
    return _orientation(open_image(encoded)) if _has_exif(encoded) else 1


def _orientation(image: Image.Image) -> int:
    """Return the orientation, 1 to 8, in an image's EXIF block; 1 if there is no such block or a damaged one."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises many kinds for a damaged block, and the pixels may be intact
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Return a view of `image`, turned and mirrored by its EXIF `orientation`."""
    if orientation in (3, 4, 6, 7):
        image = image[::-1]
    if orientation in (2, 3, 7, 8):
        image = image[:, ::-1]
    return image.swapaxes(0, 1) if orientation >= _FIRST_SIDEWAYS else image


class _MeteredFile(io.BytesIO):
    """The bytes of an image as a file with a limit of reads, and of bytes before the first pixel.

    Pillow's parsers make one or more calls for each block of a file, and some join all earlier blocks at each call.
    """

    MOST_READS = 300_000
    MOST_JOINED = 1 << 32

    def __init__(self, encoded: bytes):
        super().__init__(encoded)
        self.reads = self.seen = self.joined = 0
        self.is_opened = False

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self.reads += 1
        if not self.is_opened:
            self.seen += len(content)
            self.joined += self.seen
        if self.reads > self.MOST_READS or self.joined > self.MOST_JOINED:
            raise OversizedImage(f"a header of {self.seen:,} bytes or more, read in {self.reads:,} pieces")
        return content


def open_image(encoded: bytes) -> Image.Image:
    """Open an image with Pillow, which reads only its header."""
    _check_tiff(encoded)
    file = _MeteredFile(encoded)
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise OversizedImage(str(error)) from error
    except BadSample:
        raise
    except Exception as error:  # Pillow raises many kinds
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        reason = f" are no {kinds} that can be read" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise UndecodableImage(f"{len(encoded)} bytes starting {encoded[:8]!r}{reason}") from error
    file.is_opened = True
    # A value of the modes I and F has four bytes.
    _check_size(image.height, image.width, 4 if image.mode in ("I", "F") else len(image.getbands()))
    return image


def _decode_other(encoded: bytes) -> np.ndarray:
    """Return the upright RGB of any image that Pillow reads."""
    if (size := _plain_png_size(encoded)) is not None and _is_plain_or_no_png(encoded):
        _check_size(*size)
        if (pixels := _decode_by_opencv(encoded, size)) is not None:
            return pixels
    image = open_image(encoded)
    if _is_plain(encoded, image):
        pixels = _decode_by_opencv(encoded, (image.height, image.width))
        if pixels is not None:
            return pixels
    return rgb_pixels(image)


def _is_plain(encoded: bytes, image: Image.Image) -> bool:
    """Return whether OpenCV shows a PNG or a WebP as Pillow does."""
    plain = image.mode in ("L", "RGB") and not {"transparency", "exif", "xmp"} & image.info.keys()
    return plain and image.format in ("PNG", "WEBP") and _is_plain_or_no_png(encoded)


@wrap_errors(UndecodableImage)
def is_shown_alike(encoded: bytes, pixels: np.ndarray) -> bool:
    """Return whether Pillow's plain RGB of an image is `pixels`, those of `decode_whole`; True for all JPEGs.

    It differs for transparent parts, 16 bits, a hidden frame, and an image that its EXIF turns."""
    image = open_image(encoded)
    alike = encoded.startswith(b"\xff\xd8") or _is_plain(encoded, image)
    return alike or np.array_equal(np.asarray(image.convert("RGB")), pixels)


def _decode_by_opencv(encoded: bytes, size: tuple[int, int]) -> np.ndarray | None:
    pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    return pixels if pixels is not None and pixels.shape[:2] == size else None


def rgb_pixels(image: Image.Image, upright: bool = True) -> np.ndarray:
    """Return an image's RGB, transparent pixels on white, upright or as stored. Raise UndecodableImage if damaged."""
    with wrap_errors(UndecodableImage):
        image.load()
        if getattr(image, "default_image", False):
            image.seek(1)  # because players of an animated PNG do not show this one
            image.load()
        white = _white(image) if image.mode in ("I", "F") else 0.0
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        # Strip by strip, because conversions hold several copies of their input.
        height = max(1, _STRIP_PIXELS // image.width)
        for top in range(0, image.height, height):
            strip = image.crop((0, top, image.width, min(top + height, image.height)))
            pixels[top : top + height] = _rgb(strip, white)
    return _upright(pixels, _orientation(image)) if upright else pixels


def _white(image: Image.Image) -> float:
    """Return the value of white in an image of 32 bits, which no file tells: the usual one that no pixel exceeds."""
    values = np.asarray(image)
    highest = float(values.max(initial=0, where=np.isfinite(values)))
    usual = (255.0, 65535.0) if image.mode == "I" else (1.0, 255.0, 65535.0)
    return next((white for white in usual if highest <= white), highest)


def _rgb(image: Image.Image, white: float) -> np.ndarray:
    """Return the RGB of a part of an image of any mode, transparent pixels on white. `white` is the value of white in
    the modes of 32 bits."""
    if white:
        grey = np.nan_to_num(np.asarray(image, np.float32) * (255 / white), posinf=255, neginf=0)
        return grey.round().clip(0, 255).astype(np.uint8)[:, :, None]
    if image.mode.startswith("I"):
        # Pillow's conversion of 16-bit grey would clip it at 255.
        grey = (np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8)
        return grey[:, :, None]
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _check_tiff(encoded: bytes) -> None:
    """Raise if Pillow should not open a TIFF: it makes a Python object of each value of many tags before it knows the
    size of the image.
    """
    if encoded[:2] not in (b"II", b"MM") or not {42, 43} & set(encoded[2:4]):
        return
    if 43 in encoded[2:4]:
        raise OversizedImage("a BigTIFF, which is made for files of more than 4 GB")
    order = "<" if encoded[:2] == b"II" else ">"
    try:
        (first,) = struct.unpack_from(f"{order}L", encoded, 4)
        (count,) = struct.unpack_from(f"{order}H", encoded, first)
        entries = encoded[first + 2 : first + 2 + _TIFF_ENTRY_BYTES * count]
        tile = 1
        for tag, kind, values, long in struct.iter_unpack(f"{order}HHLL", entries):
            if values > _MOST_TIFF_VALUES and kind not in _TIFF_BYTE_TYPES:
                raise OversizedImage(
                    f"a TIFF whose tag {tag} has {values:,} values; at most {_MOST_TIFF_VALUES:,} are read"
                )
            if tag in _TIFF_TILE_SIZES:
                short = long >> 16 if order == ">" else long & 0xFFFF
                tile *= short if kind == _TIFF_SHORT else long
    except struct.error:
        return  # a file that was cut short, which Pillow refuses
    if tile > _MOST_TILE_PIXELS:
        raise OversizedImage(f"a TIFF with tiles of {tile:,} pixels; at most {_MOST_TILE_PIXELS:,} are decoded")


def _plain_png_size(encoded: bytes) -> tuple[int, int] | None:
    """Return the height and width of a plain PNG; None for all other images.

    A plain PNG has grey or RGB of 8 bits, and no chunk between its header and its pixels. Most PNGs are plain, and for
    small ones opening with Pillow takes a quarter of the time of decoding. Source: PNG, third edition, 5 and 11.2.1.
    """
    if not encoded.startswith(_PNG_AND_HEADER) or encoded[37:41] != b"IDAT" or encoded[24:29] not in _PLAIN_PNGS:
        return None
    if zlib.crc32(encoded[12:29]) != int.from_bytes(encoded[29:33], "big"):
        return None
    return int.from_bytes(encoded[20:24], "big"), int.from_bytes(encoded[16:20], "big")


def _is_plain_or_no_png(encoded: bytes) -> bool:
    """Return whether all chunks of a PNG lie within its bytes, and none turns, hides or animates it; True for other
    formats.

    OpenCV allocates the size that a chunk declares, up to 4 GB, before it compares it with the file. Source: PNG, third
    edition, 5.3.
    """
    if not encoded.startswith(_PNG):
        return True
    start = len(_PNG)
    for _ in range(_MOST_PNG_CHUNKS):
        end = start + 12 + int.from_bytes(encoded[start : start + 4], "big")
        if end > len(encoded) or _ODD_CHUNKS.match(encoded, start + 4):
            return False
        if encoded[start + 4 : start + 8] == b"IEND":
            return True
        start = end
    return False


def _has_one_scan(encoded: bytes) -> bool:
    """Return whether a JPEG is sequential with all channels in its first scan, which then ends the decoding."""
    start, channels = 2, b"none"
    for _ in range(_MOST_APP_BLOCKS):
        if encoded[start : start + 1] != b"\xff" or encoded[start + 1 : start + 2] == b"\xda":
            break
        if encoded[start + 1 : start + 2] in (b"\xc0", b"\xc1"):
            channels = encoded[start + 9 : start + 10]
        start += 2 + int.from_bytes(encoded[start + 2 : start + 4], "big")
    return encoded.startswith(b"\xff\xda", start) and encoded[start + 4 : start + 5] == channels


def _has_exif(encoded: bytes) -> bool:
    """Return whether a segment before a JPEG's first scan is EXIF or XMP, which may turn the image.

    As Pillow does, skip fill bytes and stray bytes between the segments. Most images in shards have neither."""
    marker = _JPEG_MARKER.search(encoded, 2)
    for _ in range(_MOST_APP_BLOCKS):
        if marker is None or marker[1] == b"\xda":
            return False
        start = marker.end()
        if marker[1] == b"\xe1" and encoded.startswith(_TURNING, start + 2):
            return True
        if not b"\xd0" <= marker[1] <= b"\xd9":  # these have no length
            start += int.from_bytes(encoded[start : start + 2], "big")
        marker = _JPEG_MARKER.search(encoded, start)
    raise OversizedImage(f"more than {_MOST_APP_BLOCKS} blocks before the first scan")
