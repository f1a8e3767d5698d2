"""Audit training data: its captions, its copies, and the images of test sets in it."""

import importlib.util
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flipscale.data.decode import decode_whole
from flipscale.data.samples import BadSample, SampleNumbers, Source, evenly
from flipscale.data.sources.tar import TarSource
from flipscale.data.tokenizers import load_tokenizer
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.io.files import check_writable
from flipscale.io.templates import render
from flipscale.preparation.audit.duplicates import LEAST_LIKENESS, MOST_BITS, MOST_DIFFERENCE, exact_copies
from flipscale.preparation.audit.scan import (
    BLANK,
    SEEN,
    Match,
    commonest_captions,
    near_copies,
    overlaps,
    scan_source,
)
from flipscale.preparation.audit.words import (
    LEAST_RATIO,
    NO_LETTERS,
    UNSURE,
    country_figures,
    gender_figures,
    language_figures,
    lexicon,
)
from flipscale.preparation.inspection import TILE, contact_sheet, percentiles, tile
from flipscale.preparation.worker_pool import worker_pool

# Captions whose languages are looked at. Shares are then known to half a percent in three minutes on two cores; a
# million captions would take an hour.
MOST_LANGUAGES = 50_000
_COMMONEST, _MOST_ROWS = 20, 20  # rows of the page's tables
_MAX_PAIRS = 24  # on a sheet
_PACKAGES = {"lingua": "lingua-language-detector", "pycountry": "pycountry"}
_PAGE = Path(__file__).with_name("audit.md.jinja")


def find_test_sets(folder: Path) -> dict[str, TarSource]:
    """Return the test sets in a folder by name: each folder in it with tars, `NAME/test` being called NAME. Raise
    UserError if there is none, or two have one name."""
    folders: dict[str, Path] = {}
    for inner in sorted({tar.parent for tar in folder.rglob("*.tar")}):
        named = inner.parent if inner.name == "test" and inner != folder else inner
        name = "-".join(named.relative_to(folder).parts) or folder.resolve().name
        if name in folders:
            raise UserError(f"{folders[name]} and {inner} are both called {name}; rename one")
        folders[name] = inner
    if not folders:
        raise UserError(f"no test set in {folder}: no folder there has *.tar; name one set's folder, or one of several")
    return {name: TarSource(str(inner)) for name, inner in folders.items()}


def audit(
    shards: str,
    source: Source,
    test_sets: dict[str, TarSource],
    out_dir: Path,
    tokenizer: str | None = None,
    num_workers: int = 2,
) -> dict[str, Any]:
    """Return the figures of the training data, and write them with a page and its pictures to `out_dir`.

    Images are decoded once, and likely copies a second time. The audit keeps 17 bytes of each image and 28 of each
    caption; the search for near duplicates takes 30 more of each image.

    Args:
        shards: name of the data.
        tokenizer: tokenizer that counts tokens, named as in a recipe.
        num_workers: number of processes that read and decode.

    Raises:
        UserError: a package is missing, there is no sample or no caption, or `out_dir` cannot be written.
        OSError: a shard cannot be read.
    """
    for module, package in _PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{package}, which audits need, is not installed; run: pip install 'flipscale[audit]'")
    check_writable(out_dir, "--output_dir")
    if not len(source):
        raise UserError(f"there is no sample in {len(source.shard_sizes)} shards of {shards}")
    counter = load_tokenizer(tokenizer, 10**9) if tokenizer else None
    with worker_pool(num_workers, ([source, *test_sets.values()], counter)) as pool:
        scan = scan_source(pool, source, 0, "training data", min(1.0, MOST_LANGUAGES / len(source)))
        if not len(scan.captions):
            raise UserError(f"none of the {len(source)} samples of {shards} has a caption; an audit needs captions")
        num_near, pairs = near_copies(pool, scan.images)
        matches = {}
        for number, (name, test) in enumerate(test_sets.items(), 1):
            matches[name] = overlaps(pool, scan_source(pool, test, number, name).images, number, scan.images)
    states, lengths = scan.images["state"], ("characters", "words", *(["tokens"] if tokenizer else []))
    figures = {
        "shards": shards,
        "samples": len(source),
        "unusable": scan.faults,
        "captions": {
            "captions": len(scan.captions),
            "distinct": len(np.unique(scan.captions["digest"])),
            "lengths": {kind: percentiles(scan.captions[kind]) for kind in lengths},
            "commonest": commonest_captions(scan, source, _COMMONEST),
        },
        "languages": language_figures(scan.sampled, len(source) > MOST_LANGUAGES),
        "gender": gender_figures(scan.words),
        "countries": {"rows": country_figures(scan.words), "ambiguous": sorted(lexicon().spelling.values())},
        "images": {
            "decoded": int((states > 0).sum()),
            "exact_copies": int((exact_copies(scan.images["digest"], states > 0) != np.arange(len(states))).sum()),
            "near_copies": num_near,
            "near_pairs": len(pairs),
            "nearly_blank": int((states == BLANK).sum()),
            "hashed": int((states == SEEN).sum()),
        },
        "tests": [
            {"name": name, "images": len(test)}
            | {kind: sum(match.kind == kind for match in matches[name]) for kind in ("exact", "near")}
            for name, test in test_sets.items()
        ],
    }
    _write(out_dir, figures, source, pairs, test_sets, matches)
    return figures


def summary(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the names and values of the figures that matter most."""
    captions, images = figures["captions"], figures["images"]
    counts = {
        "samples": figures["samples"],
        "unusable samples": sum(fault["count"] for fault in figures["unusable"].values()),
        "captions": captions["captions"],
        "different captions": captions["distinct"],
        "images with the bytes of an earlier one": images["exact_copies"],
        "other images that are nearly an earlier one": images["near_copies"],
        "nearly blank images": images["nearly_blank"],
    }
    rows = [(name, f"{count:,}") for name, count in counts.items()]
    named = [row for row in figures["languages"]["long"]["languages"] if row["language"] not in (UNSURE, NO_LETTERS)]
    rows += [(f"{row['language']}, of captions of 25 letters and more", f"{row['share']:.1%}") for row in named[:1]]
    for test in figures["tests"]:
        name = f"images of {test['name']} that are in the data, of {test['images']:,}"
        rows.append((name, f"{test['exact'] + test['near']:,}"))
    return rows


def _write(
    out_dir: Path,
    figures: dict[str, Any],
    source: Source,
    pairs: list[Match],
    test_sets: dict[str, TarSource],
    matches: dict[str, list[Match]],
) -> None:
    (out_dir / "overlap").mkdir(parents=True, exist_ok=True)
    if pairs:
        shown = [((source, one.row), (source, one.other), f"{one.likeness:.3f} alike") for one in sorted(pairs)]
        _write_sheet(out_dir / "near_duplicates.png", shown)
    shown = []
    for name, test in test_sets.items():
        rows = [_overlap(test, source, match) for match in matches[name]]
        about = {"test": name, "images": len(test), "contents": test.contents_digest(), "training": figures["shards"]}
        write_text(out_dir / "overlap" / f"{name}.json", json.dumps({**about, "overlap": rows}, indent=1) + "\n")
        for match in matches[name]:
            how = "same bytes" if match.kind == "exact" else f"{match.likeness:.3f} alike"
            shown.append(((test, match.row), (source, match.other), f"{name}, training: {how}"))
    if shown:
        _write_sheet(out_dir / "overlap.png", shown)
    page = render(
        _PAGE,
        {},
        **figures,
        summary=summary(figures),
        overlapping=bool(shown),
        least_ratio=LEAST_RATIO,
        most_rows=_MOST_ROWS,
        most_bits=MOST_BITS,
        least_likeness=LEAST_LIKENESS,
        most_difference=MOST_DIFFERENCE,
        n="{:,}".format,
        share="{:.2%}".format,
        cell=_cell,
    )
    for name, text in (("audit.md", page), ("audit.json", json.dumps(figures, indent=1, ensure_ascii=False))):
        # Names of shards may not be UTF-8.
        write_text(out_dir / name, text.encode("utf-8", "backslashreplace").decode() + "\n")


def _overlap(test: Source, source: Source, match: Match) -> dict[str, Any]:
    """Return the places of a test set's image and of the training image that it matches."""
    (shard, number), (train_shard, train_number) = SampleNumbers(test)[match.row], SampleNumbers(source)[match.other]
    return {
        "shard": Path(test.shard_name(shard)).name,
        "number": number,
        "row": match.row,
        "training": f"{source.shard_name(train_shard)}#{train_number}",
        "kind": match.kind,
        "likeness": round(match.likeness, 4),
    }


def _write_sheet(file: Path, pairs: Sequence[tuple[tuple[Source, int], tuple[Source, int], str]]) -> None:
    """Draw at most 24 pairs side by side, each with a line about it and a caption of each image."""
    tiles = []
    for number in evenly(len(pairs), _MAX_PAIRS):
        (source, row), (other, other_row), about = pairs[number]
        tiles += [_tile(source, row, f"{about}: "), _tile(other, other_row, "")]
    contact_sheet(tiles).save(file)


def _tile(source: Source, row: int, about: str) -> tuple[Image.Image, str]:
    """Return the thumbnail and the first caption of an image."""
    try:
        sample = source.read(*SampleNumbers(source)[row])
        image = tile(decode_whole(sample.image))
    except BadSample:  # `decode_small` reads some images that `decode_whole` refuses
        return Image.new("RGB", (TILE, TILE), "#f2f2f2"), about
    return image, about + (sample.caption or b"").decode("utf-8", "replace").strip()


def _cell(text: str) -> str:
    """Return at most 100 characters of a text as a cell of a table."""
    plain = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return "".join(textwrap.wrap(plain, 100, max_lines=1, placeholder=" …"))
