"""Report on a set of shards: counts, sizes, captions, unusable samples, and a contact sheet to look at."""

import io
import textwrap
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from flipscale.data.captions import choose_caption
from flipscale.data.decode import decode_whole
from flipscale.data.samples import BadSample, Sample, Source
from flipscale.data.sources.tar import TarSource
from flipscale.io.errors import UserError
from flipscale.io.files import check_png_path

_CHUNK = 256  # samples read at a time
_MOST_CAPTIONED = 1_000_000  # more make no better vocabulary, and take memory
_PERCENTILES = {"min": 0, "median": 50, "p95": 95, "max": 100}
_EXAMPLES = 3
_COLUMNS, _ROWS, _TILE, _MARGIN, _TEXT_LINES, _LINE_HEIGHT = 6, 4, 176, 8, 3, 14
_TEXT_WIDTH = 29  # characters of the sheet's font that fit under a tile


@dataclass(frozen=True)
class Checked:
    """One sample. If it is unusable, `why` says so and the other fields are empty."""

    name: str
    why: BadSample | None = None
    kind: str = ""
    width: int = 0
    height: int = 0
    num_bytes: int = 0
    caption: str = ""
    thumbnail: Image.Image | None = None


def inspect_shards(
    source: Source, sheet: Path | None, tokenizer: PreTrainedTokenizerBase | None = None, max_samples: int = 0
) -> dict[str, Any]:
    """Return figures of the samples of `source`, ready for JSON, and draw 24 of them with captions as the PNG `sheet`.

    Args:
        tokenizer: counts tokens, special ones included.
        max_samples: how many samples are checked, evenly spread; 0 checks all.

    Raises:
        ValueError: there is no sample, or `sheet` cannot be written.
    """
    if sheet is not None:
        check_png_path(sheet, "--sheet")
    total = len(source)
    if not total:
        raise UserError(f"there is no sample in {len(source.shard_sizes)} shards")
    count = min(max_samples, total) if max_samples else total
    numbers = np.unique(np.linspace(0, total - 1, count).round().astype(np.int64))
    shown = set(np.linspace(0, len(numbers) - 1, min(_COLUMNS * _ROWS, len(numbers))).round().astype(int).tolist())
    found: list[Checked] = []
    bar = tqdm(total=len(numbers), unit="sample", desc="inspect", disable=None)
    with ThreadPoolExecutor() as pool, bar:
        places = _places(source, numbers)
        while chunk := list(islice(places, _CHUNK)):
            samples, first = [_read(source, *place) for place in chunk], len(found)
            found += pool.map(_check, samples, [first + row in shown for row in range(len(samples))])
            bar.update(len(chunk))
    good = [sample for sample in found if sample.why is None]
    if sheet is not None:
        contact_sheet([sample for sample in good if sample.thumbnail is not None]).save(sheet)
    return {
        "shards": len(source.shard_sizes),
        "samples": total,
        "checked": len(found),
        "good": len(good),
        "bad": _bad(found, source),
        "kinds": dict(Counter(sample.kind for sample in good).most_common()),
        **_figures(good, tokenizer),
    }


def read_captions(source: TarSource) -> list[str]:
    """Return the captions of the samples of `source`, of a million of them, evenly spread, where there are more. Those
    that cannot be used are left out.

    Raises:
        ValueError: there is none.
    """
    count = min(len(source), _MOST_CAPTIONED)
    numbers = np.unique(np.linspace(0, len(source) - 1, count).round().astype(np.int64))
    captions: list[str] = []
    for place in tqdm(_places(source, numbers), "captions", len(numbers), unit="sample", disable=None):
        with suppress(BadSample):
            stored = source.read_captions(*place)
            captions += [choose_caption((caption,), 0.0) for caption in stored if caption.strip()]
    if not captions:
        raise UserError(f"none of {len(source):,} samples has a caption that can be read")
    return captions


def _places(source: Source, numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """Shard and number within it of samples counted through all shards."""
    starts = np.concatenate([[0], np.cumsum(source.shard_sizes)])
    shards = np.searchsorted(starts, numbers, side="right") - 1
    yield from zip(shards.tolist(), (numbers - starts[shards]).tolist(), strict=True)


def _read(source: Source, shard: int, number: int) -> tuple[str, Sample | BadSample]:
    name = f"{source.shard_name(shard)}#{number}"
    try:
        return name, source.read(shard, number)
    except BadSample as error:
        return name, error


def _check(read: tuple[str, Sample | BadSample], is_shown: bool) -> Checked:
    name, sample = read
    if isinstance(sample, BadSample):
        return Checked(name, sample)
    try:
        caption = choose_caption(sample.captions, 0.0)
        pixels = decode_whole(sample.image)
    except BadSample as error:
        return Checked(name, error)
    height, width = pixels.shape[:2]
    thumbnail = Image.fromarray(np.ascontiguousarray(pixels)) if is_shown else None
    if thumbnail is not None:
        thumbnail.thumbnail((_TILE, _TILE))
    return Checked(name, None, _kind(sample.image), width, height, len(sample.image), caption, thumbnail)


def _kind(encoded: bytes) -> str:
    """Return the format and mode that Pillow sees in an image that can be decoded."""
    try:
        image = Image.open(io.BytesIO(encoded))
    except Exception:
        # Pillow is stricter with what is around the pixels than the decoder that read them.
        return "not known to Pillow"
    return f"{image.format} {image.mode}"


def _bad(found: list[Checked], source: Source) -> dict[str, dict[str, Any]]:
    """Return, by cause, the count of unusable samples and the first few, damaged shards included."""
    bad: dict[str, dict[str, Any]] = {}
    troubles = [(fault.cause, fault.shard, fault.detail) for fault in source.faults]
    troubles += [(sample.why.cause, sample.name, str(sample.why)) for sample in found if sample.why is not None]
    for cause, name, detail in troubles:
        entry = bad.setdefault(cause, {"count": 0, "examples": []})
        entry["count"] += 1
        if entry["count"] <= _EXAMPLES:
            entry["examples"].append(f"{name}: {detail}")
    return bad


def _figures(good: list[Checked], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, dict[str, float]]:
    """Return percentiles of sizes and lengths over the usable samples."""
    if not good:
        return {}
    values = {
        "width": [sample.width for sample in good],
        "height": [sample.height for sample in good],
        "short_side": [min(sample.width, sample.height) for sample in good],
        "image_bytes": [sample.num_bytes for sample in good],
        "caption_characters": [len(sample.caption) for sample in good],
    }
    if tokenizer is not None:
        encoded = tokenizer([sample.caption for sample in good], truncation=False, padding=False)
        values["caption_tokens"] = [len(ids) for ids in encoded["input_ids"]]
    return {
        name: {**{key: float(np.percentile(v, at)) for key, at in _PERCENTILES.items()}, "mean": float(np.mean(v))}
        for name, v in values.items()
    }


def contact_sheet(samples: list[Checked]) -> Image.Image:
    """Draw thumbnails with their captions below, six in a row."""
    font = ImageFont.load_default(size=11)
    cell = (_TILE + _MARGIN, _TILE + _TEXT_LINES * _LINE_HEIGHT + 2 * _MARGIN)
    rows = max(1, -(-len(samples) // _COLUMNS))
    sheet = Image.new("RGB", (_COLUMNS * cell[0] + _MARGIN, rows * cell[1] + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, sample in enumerate(samples):
        left, top = _MARGIN + number % _COLUMNS * cell[0], _MARGIN + number // _COLUMNS * cell[1]
        draw.rectangle((left, top, left + _TILE - 1, top + _TILE - 1), fill="#f2f2f2")
        assert sample.thumbnail is not None
        across, down = sample.thumbnail.size
        sheet.paste(sample.thumbnail, (left + (_TILE - across) // 2, top + (_TILE - down) // 2))
        lines = textwrap.wrap(
            sample.caption[: 2 * _TEXT_LINES * _TEXT_WIDTH], _TEXT_WIDTH, max_lines=_TEXT_LINES, placeholder=" …"
        )
        for line, text in enumerate(lines):
            draw.text((left, top + _TILE + 3 + line * _LINE_HEIGHT), text, fill="black", font=font)
    return sheet


def inspection_table(figures: dict[str, Any]) -> str:
    """Return the figures as text to print."""
    lines = [
        f"{figures['samples']:,} samples in {figures['shards']:,} shards; {figures['checked']:,} checked, "
        f"{figures['good']:,} can be used",
        "",
        f"{'':<20}" + "".join(f"{name:>12}" for name in (*_PERCENTILES, "mean")),
    ]
    for name, values in figures.items():
        if isinstance(values, dict) and "median" in values:
            lines.append(f"{name:<20}" + "".join(f"{value:>12,.0f}" for value in values.values()))
    lines += ["", *(f"{kind:<20}{count:>12,}" for kind, count in figures["kinds"].items())]
    for cause, entry in figures["bad"].items():
        lines += ["", f"{cause:<20}{entry['count']:>12,}", *(f"  {example}" for example in entry["examples"])]
    return "\n".join(lines)
