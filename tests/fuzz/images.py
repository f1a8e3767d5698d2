"""The bytes of an image, which must be decoded to the same pixels again or be refused for the same cause."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from flipscale.data.decode import DRAWS_PER_CROP, decode_box, decode_small, decode_whole
from flipscale.data.samples import BadSample


def seeds() -> list[bytes]:
    """A small picture in every format that is decoded, and in the modes that take another way."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 28, 3)).astype(np.uint8)
    picture, exif = Image.fromarray(noise), Image.Exif()
    exif[0x0112] = 6
    found = [_saved(picture, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    found += [_saved(picture, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]
    found += [_saved(picture.convert("RGBA"), kind) for kind in ("PNG", "WEBP", "TIFF")]
    found += [_saved(picture.convert("CMYK"), kind) for kind in ("JPEG", "TIFF")]
    found += [_saved(picture.convert("I;16"), kind) for kind in ("PNG", "TIFF")]
    found += [_saved(picture.quantize(16), "PNG", transparency=3), _saved(picture, "TIFF", compression="tiff_lzw")]
    return [*found, _saved(picture, "JPEG", progressive=True)]


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _outcome(data: bytes) -> tuple[object, ...]:
    try:
        crop = decode_box(data, np.full(DRAWS_PER_CROP, 0.5), 16, (0.5, 1.0))
        whole, small = decode_whole(data), decode_small(data, 8)
    except BadSample as error:
        return (error.cause,)
    assert crop.shape == (16, 16, 3)
    return tuple(pixels.tobytes() for pixels in (crop, whole, small))


def attack(data: bytes, folder: Path) -> None:
    """Decode the image twice, in each of the ways."""
    assert _outcome(data) == _outcome(data)
