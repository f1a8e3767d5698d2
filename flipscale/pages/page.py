"""Parts of all pages: templates to one HTML file, pictures and short texts."""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from flipscale.io.paths import quoted
from flipscale.io.templates import render
from flipscale.io.text_table import duration, rounded

_TEMPLATES = Path(__file__).parent / "templates"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_QUALITY = 82  # of thumbnails, on WebP's scale


class Picture(NamedTuple):
    """A picture in a page: data URI, text for readers who cannot see it, and size in pixels."""

    uri: str
    alt: str
    width: int
    height: int


def rendered(template: str, **values: object) -> str:
    """Return the page that a template of `templates/` makes of `values`. HTML in the values is escaped."""
    filters = {"duration": duration, "rounded": rounded, "listed": listed, "number": "{:,}".format, "parts": _parts}
    filters["quoted"] = quoted
    text = render(_TEMPLATES / template, filters, **values)
    # File names may contain halves of surrogate pairs, which UTF-8 lacks, and control characters, which HTML lacks.
    return _CONTROL.sub("", text.encode("utf-8", "backslashreplace").decode())


def thumbnail(pixels: np.ndarray, alt: str, side: int) -> Picture:
    """Return an image, uint8 RGB or RGBA `(height, width, channels)`, with the longer side shrunk to `side` pixels."""
    image, content = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    image.thumbnail((side, side))
    image.save(content, "webp", quality=_QUALITY)
    return Picture(_data_uri(content.getvalue(), "webp"), alt, *image.size)


def drawing(file: Path, alt: str) -> Picture:
    """Return a figure from a PNG file."""
    with Image.open(file, formats=["PNG"]) as image:
        return Picture(_data_uri(file.read_bytes(), "png"), alt, *image.size)


def shortened(text: str, most: int) -> str:
    """Return a text in one line of at most `most` characters, cut between words if possible."""
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    head = text[: most - 1]
    at = head.rfind(" ")
    return f"{head[:at] if at > most // 2 else head}…"


def listed(names: Sequence[str]) -> str:
    """Return names joined for a sentence: `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _parts(name: str) -> list[str]:
    """Return the parts of a file name between which a line may break."""
    return re.split(r"(?<=[/_-])(?=\w)|(?=\.\w)", name)


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
