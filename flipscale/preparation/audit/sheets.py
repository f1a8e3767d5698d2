"""Sheets of the pairs of images that an audit found to be the same, to look at."""

import textwrap
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flipscale.data.decode import decode_whole
from flipscale.data.samples import BadSample, Source
from flipscale.preparation.audit.duplicates import place

_ACROSS, _MOST_PAIRS = 4, 24
_TILE, _MARGIN, _LINE, _LINES, _LETTERS = 96, 10, 13, 5, 32


class Shown(NamedTuple):
    """A pair on a sheet: rows of two sources, and a line about it."""

    first: tuple[Source, int]
    second: tuple[Source, int]
    about: str


def pair_sheet(pairs: list[Shown]) -> Image.Image:
    """Draw pairs side by side, four in a row, at most 24, each with its captions and its line."""
    pairs = [pairs[number] for number in np.unique(np.linspace(0, len(pairs) - 1, _MOST_PAIRS).round().astype(int))]
    font = ImageFont.load_default(size=10)
    width, height = 2 * _TILE + _MARGIN, _TILE + _LINES * _LINE + 2 * _MARGIN
    rows = -(-len(pairs) // _ACROSS)
    size = (min(_ACROSS, len(pairs)) * (width + _MARGIN) + _MARGIN, rows * height + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, pair in enumerate(pairs):
        left, top = _MARGIN + number % _ACROSS * (width + _MARGIN), _MARGIN + number // _ACROSS * height
        captions = []
        for side, (source, row) in enumerate((pair.first, pair.second)):
            tile, caption = _tile(source, row)
            captions.append(caption)
            corner = (left + side * _TILE + (_TILE - tile.width) // 2, top + (_TILE - tile.height) // 2)
            draw.rectangle((left + side * _TILE, top, left + (side + 1) * _TILE - 1, top + _TILE - 1), fill="#f2f2f2")
            sheet.paste(tile, corner)
        lines = [pair.about]
        for caption in dict.fromkeys(captions):
            lines += textwrap.wrap(caption[: 4 * _LETTERS], _LETTERS, max_lines=2, placeholder=" …")
        for line, text in enumerate(lines[:_LINES]):
            draw.text((left, top + _TILE + 3 + line * _LINE), text, fill="#666666" if line == 0 else "black", font=font)
    return sheet


def _tile(source: Source, row: int) -> tuple[Image.Image, str]:
    """Return an image's thumbnail and its first caption."""
    try:
        sample = source.read(*place(source, row))
        tile = Image.fromarray(np.ascontiguousarray(decode_whole(sample.image)))
    except BadSample:  # the pass over the data could read it
        return Image.new("RGB", (_TILE, _TILE), "#f2f2f2"), ""
    tile.thumbnail((_TILE, _TILE))
    return tile, (sample.caption or b"").decode("utf-8", "replace").strip()
