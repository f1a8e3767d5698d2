"""Report on shards: counts, sizes, captions, unusable samples, and a contact sheet."""

import io
import textwrap
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from transformers import PreTrainedTokenizerBase

from flipscale.data.captions import choose_caption
from flipscale.data.decode import decode_whole
from flipscale.data.samples import BadSample, Sample, SampleNumbers, Source, evenly
from flipscale.io.atomic import atomic_write
from flipscale.io.errors import UserError
from flipscale.io.paths import check_png_path
from flipscale.io.progress import Progress, each

TILE = 176  # pixels of a side
_CHUNK = 256  # samples read at a time
_MAX_CAPTIONS = 1_000_000  # for a tokenizer; more improve no vocabulary
_PERCENTILES = {"min": 0, "median": 50, "p95": 95, "max": 100}
_EXAMPLES = 3
_COLUMNS, _ROWS, _MARGIN, _TEXT_LINES, _LINE_HEIGHT = 6, 4, 8, 3, 14
_TEXT_WIDTH = 29  # characters of the sheet's font under a tile


class Checked(NamedTuple):
    """A usable sample; `thumbnail` is None unless the contact sheet shows it."""

    kind: str
    width: int
    height: int
    num_bytes: int
    caption: str
    thumbnail: Image.Image | None


def inspect_shards(
    source: Source, sheet: Path | None, tokenizer: PreTrainedTokenizerBase | None = None, max_samples: int = 0
) -> dict[str, Any]:
    """Return figures of the samples as JSON values, and draw 24 samples with their captions. Raise UserError if there
    is not a sample, or `sheet` cannot be written.

    Args:
        sheet: PNG file to draw; None draws none.
        tokenizer: tokenizer that counts tokens, special ones included.
        max_samples: number of samples to check, evenly spread; 0 checks all.
    """
    if sheet is not None:
        check_png_path(sheet, "--sheet")
    total = len(source)
    if not total:
        raise UserError(f"there is no sample in {len(source.shard_sizes)} shards")
    numbers, samples = evenly(total, max_samples or total), SampleNumbers(source)
    shown = set(evenly(len(numbers), _COLUMNS * _ROWS))
    good: list[Checked] = []
    faults = Faults()
    for fault in source.faults:
        faults.add(fault.cause, f"{fault.shard}: {fault.detail}")
    with ThreadPoolExecutor() as pool, Progress(len(numbers), "inspecting", "samples") as progress:
        places = enumerate(samples[number] for number in numbers)
        while chunk := list(islice(places, _CHUNK)):
            read = [_read(source, *place) for _, place in chunk]
            results = pool.map(_check, read, [row in shown for row, _ in chunk])
            for (_, (shard, number)), result in zip(chunk, results, strict=True):
                if isinstance(result, BadSample):
                    faults.add(result.cause, f"{source.shard_name(shard)}#{number}: {result}")
                else:
                    good.append(result)
            progress.update(len(chunk))
    if sheet is not None:
        write_contact_sheet(sheet, [(sample.thumbnail, sample.caption) for sample in good if sample.thumbnail])
    return {
        "shards": len(source.shard_sizes),
        "samples": total,
        "checked": len(numbers),
        "good": len(good),
        "bad": faults,
        "kinds": dict(Counter(sample.kind for sample in good).most_common()),
        **_figures(good, tokenizer),
    }


def read_captions(source: Source) -> list[str]:
    """Return the usable captions of the samples, or of a million samples, evenly spread. Raise UserError if there is
    none."""
    samples = SampleNumbers(source)
    captions: list[str] = []
    for number in each(evenly(len(source), _MAX_CAPTIONS), "captions", "samples"):
        with suppress(BadSample):
            stored = source.read_captions(*samples[number])
            captions += [choose_caption((caption,), 0.0) for caption in stored if caption.strip()]
    if not captions:
        raise UserError(f"none of {len(source):,} samples has a caption that can be read")
    return captions


def _read(source: Source, shard: int, number: int) -> Sample | BadSample:
    try:
        return source.read(shard, number)
    except BadSample as error:
        return error


def _check(sample: Sample | BadSample, is_shown: bool) -> Checked | BadSample:
    if isinstance(sample, BadSample):
        return sample
    try:
        caption = choose_caption(sample.captions, 0.0)
        pixels = decode_whole(sample.image)
    except BadSample as error:
        return error
    height, width = pixels.shape[:2]
    return Checked(_kind(sample.image), width, height, len(sample.image), caption, tile(pixels) if is_shown else None)


def tile(pixels: np.ndarray) -> Image.Image:
    """Return an image, uint8 RGB `(height, width, 3)`, shrunk for a contact sheet."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((TILE, TILE))
    return image


def _kind(encoded: bytes) -> str:
    """Return Pillow's format and mode of an image that can be decoded."""
    try:
        image = Image.open(io.BytesIO(encoded))
    except (OSError, ValueError, Image.DecompressionBombError):  # Pillow may be stricter than the decoder
        return "not known to Pillow"
    return f"{image.format} {image.mode}"


def _figures(good: list[Checked], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, dict[str, float]]:
    """Return percentiles of sizes and lengths of the usable samples."""
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
    return {name: percentiles(lengths) for name, lengths in values.items()}


def percentiles(values: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Return `min`, `median`, `p95`, `max` and `mean`."""
    figures = {name: np.percentile(values, at) for name, at in _PERCENTILES.items()}
    return {name: float(figure) for name, figure in {**figures, "mean": np.mean(values)}.items()}


class Faults(dict[str, dict[str, Any]]):
    """Unusable samples by cause: their `count` and the first few `examples`."""

    def add(self, cause: str, *examples: str, count: int = 1) -> None:
        """Count samples of one cause."""
        entry = self.setdefault(cause, {"count": 0, "examples": []})
        entry["count"] += count
        entry["examples"] = [*entry["examples"], *examples][:_EXAMPLES]

    def merge(self, later: "Faults") -> None:
        """Add the faults of later samples."""
        for cause, entry in later.items():
            self.add(cause, *entry["examples"], count=entry["count"])


def write_contact_sheet(file: Path, tiles: Sequence[tuple[Image.Image, str]]) -> None:
    """Write a PNG file of thumbnails of at most `TILE` pixels with their captions below, six in a row."""
    font = ImageFont.load_default(size=11)
    cell = (TILE + _MARGIN, TILE + _TEXT_LINES * _LINE_HEIGHT + 2 * _MARGIN)
    rows = max(1, -(-len(tiles) // _COLUMNS))
    sheet = Image.new("RGB", (_COLUMNS * cell[0] + _MARGIN, rows * cell[1] + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (tile, caption) in enumerate(tiles):
        left, top = _MARGIN + number % _COLUMNS * cell[0], _MARGIN + number // _COLUMNS * cell[1]
        draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill="#f2f2f2")
        across, down = tile.size
        sheet.paste(tile, (left + (TILE - across) // 2, top + (TILE - down) // 2))
        text = caption[: 2 * _TEXT_LINES * _TEXT_WIDTH]
        lines = textwrap.wrap(text, _TEXT_WIDTH, max_lines=_TEXT_LINES, placeholder=" …")
        for line, words in enumerate(lines):
            draw.text((left, top + TILE + 3 + line * _LINE_HEIGHT), words, fill="black", font=font)
    with atomic_write(file) as partial:
        sheet.save(partial, "PNG")


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
