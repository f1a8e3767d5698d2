"""Audit training data: its captions, its copies, and the images of test sets in it."""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flipscale.data.decode import decode_whole
from flipscale.data.samples import BadSample, Source
from flipscale.data.sources.tar import TarSource
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.io.files import check_writable
from flipscale.preparation.audit.duplicates import (
    LEAST_LIKENESS,
    MOST_BITS,
    MOST_DIFFERENCE,
    Overlap,
    Pair,
    exact_copies,
    near_copies,
    overlaps,
    place,
)
from flipscale.preparation.audit.report import audit_page
from flipscale.preparation.audit.scan import BLANK, LONGEST, SEEN, Faults, Scan, Workers, texts_of
from flipscale.preparation.audit.words import (
    LEAST_RATIO,
    LONG_LETTERS,
    country_figures,
    gender_figures,
    language_figures,
    lexicon,
)
from flipscale.preparation.inspection import TILE, contact_sheet

# Captions whose languages are looked at. Shares are then known to half a percent in three minutes on two cores; a
# million captions would take an hour.
MOST_LANGUAGES = 50_000
_COMMONEST = 20
_MAX_PAIRS = 24  # on a sheet
_PACKAGES = {"lingua": "lingua-language-detector", "pycountry": "pycountry"}


@dataclass(frozen=True)
class TestFolder:
    """A test set to look for in the training data."""

    name: str
    source: TarSource


def find_test_sets(folder: Path) -> list[TestFolder]:
    """Return the test sets in a folder: each folder in it with tars, `NAME/test` being called NAME.

    Raises:
        UserError: there is none, or two have one name.
    """
    folders: dict[str, Path] = {}
    for inner in sorted({tar.parent for tar in folder.rglob("*.tar")}):
        named = inner.parent if inner.name == "test" and inner != folder else inner
        name = "-".join(named.relative_to(folder).parts) or folder.resolve().name
        if name in folders:
            raise UserError(f"{folders[name]} and {inner} are both called {name}; rename one")
        folders[name] = inner
    if not folders:
        raise UserError(f"no test set in {folder}: no folder there has *.tar; name one set's folder, or one of several")
    return [TestFolder(name, TarSource(str(inner))) for name, inner in folders.items()]


def audit(
    shards: str,
    source: Source,
    test_sets: list[TestFolder],
    out_dir: Path,
    tokenizer: str | None = None,
    num_workers: int = 2,
) -> dict[str, Any]:
    """Return the figures of the training data, and write them with a page and its pictures to `out_dir`.

    Images are decoded once, and likely copies a second time. The audit keeps 27 bytes of each image; the search for
    near duplicates takes 30 more.

    Args:
        shards: name of the data.
        source: the data.
        test_sets: test sets to look for.
        out_dir: folder to write.
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
    sources: list[Source] = [source, *(test.source for test in test_sets)]
    with Workers(sources, num_workers, tokenizer) as workers:
        scan = workers.scan(0, "training data", min(1.0, MOST_LANGUAGES / len(source)))
        if not scan.num_captions.any():
            raise UserError(f"none of the {len(source)} samples of {shards} has a caption; an audit needs captions")
        copies, pairs = near_copies(scan, workers, 0)
        matches = {
            test.name: overlaps(workers, workers.scan(number, test.name), number, scan, 0)
            for number, test in enumerate(test_sets, 1)
        }
    num_exact = int((exact_copies(scan.digests, scan.states) != np.arange(len(scan))).sum())
    figures = {
        "shards": shards,
        "samples": len(source),
        "unusable": scan.faults.figures(),
        "captions": _caption_figures(scan, source),
        "languages": language_figures(scan.counts.sampled, len(source) > MOST_LANGUAGES)
        | {"long_letters": LONG_LETTERS, "least_ratio": LEAST_RATIO},
        "gender": gender_figures(scan.counts.words),
        "countries": {"rows": country_figures(scan.counts.words), "ambiguous": sorted(lexicon().ambiguous)},
        "images": {
            "decoded": int((scan.states > 0).sum()),
            "exact_copies": num_exact,
            "near_copies": len(copies),
            "near_pairs": len(pairs),
            "nearly_blank": int((scan.states == BLANK).sum()),
            "hashed": int((scan.states == SEEN).sum()),
            "most_bits": MOST_BITS,
            "least_likeness": LEAST_LIKENESS,
            "most_difference": MOST_DIFFERENCE,
        },
        "tests": [
            {"name": test.name, "images": len(test.source)}
            | {kind: sum(match.kind == kind for match in matches[test.name]) for kind in ("exact", "near")}
            for test in test_sets
        ],
    }
    _write(out_dir, figures, source, pairs, test_sets, matches)
    return figures


def _caption_figures(scan: Scan, source: Source) -> dict[str, Any]:
    total = scan.counts.words.captions
    commonest = []
    for count, row, number in scan.commonest(_COMMONEST):
        caption = texts_of(source.read(*place(source, row)), "", Faults())[number]
        commonest.append({"caption": caption[: LONGEST["characters"]], "count": count, "share": count / total})
    return {
        "captions": total,
        "distinct": scan.num_distinct_captions,
        "lengths": scan.counts.length_figures(),
        "longest_counted": LONGEST,
        "histogram": scan.counts.histogram(),
        "commonest": commonest,
    }


def _write(
    out_dir: Path,
    figures: dict[str, Any],
    source: Source,
    pairs: list[Pair],
    test_sets: list[TestFolder],
    matches: dict[str, list[Overlap]],
) -> None:
    (out_dir / "overlap").mkdir(parents=True, exist_ok=True)
    if pairs:
        _write_sheet(
            out_dir / "near_duplicates.png",
            [((source, p.first), (source, p.second), f"{p.likeness:.3f} alike") for p in sorted(pairs)],
        )
    shown = []
    for test in test_sets:
        overlap = _overlap_file(figures["shards"], source, test, matches[test.name])
        write_text(out_dir / "overlap" / f"{test.name}.json", json.dumps(overlap, indent=1) + "\n")
        for match in matches[test.name]:
            about = "same bytes" if match.kind == "exact" else f"{match.likeness:.3f} alike"
            shown.append(((test.source, match.row), (source, match.train_row), f"{test.name}, training: {about}"))
    if shown:
        _write_sheet(out_dir / "overlap.png", shown)
    page = audit_page(figures, has_pairs=bool(pairs), has_overlap=bool(shown))
    for name, text in (("audit.md", page), ("audit.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n")):
        # Names of shards may not be UTF-8.
        write_text(out_dir / name, text.encode("utf-8", "backslashreplace").decode())


def _write_sheet(file: Path, pairs: Sequence[tuple[tuple[Source, int], tuple[Source, int], str]]) -> None:
    """Draw at most 24 pairs side by side, each with a line about it and a caption of each image."""
    chosen = np.unique(np.linspace(0, len(pairs) - 1, _MAX_PAIRS).round().astype(int))
    tiles = []
    for number in chosen.tolist():
        (source, row), (other, other_row), about = pairs[number]
        tiles += [_tile(source, row, f"{about}: "), _tile(other, other_row, "")]
    contact_sheet(tiles).save(file)


def _tile(source: Source, row: int, about: str) -> tuple[Image.Image, str]:
    """Return the thumbnail and the first caption of an image."""
    try:
        sample = source.read(*place(source, row))
        tile = Image.fromarray(np.ascontiguousarray(decode_whole(sample.image)))
    except BadSample:  # it has changed since the scan
        return Image.new("RGB", (TILE, TILE), "#f2f2f2"), about
    tile.thumbnail((TILE, TILE))
    return tile, about + (sample.caption or b"").decode("utf-8", "replace").strip()


def _overlap_file(shards: str, source: Source, test: TestFolder, matches: list[Overlap]) -> dict[str, Any]:
    """Return the places of a test set's images in the training data; `contents` identifies the test set."""
    rows = []
    for match in matches:
        shard, number = place(test.source, match.row)
        train_shard, train_number = place(source, match.train_row)
        rows.append(
            {
                "shard": Path(test.source.shard_name(shard)).name,
                "number": number,
                "row": match.row,
                "training": f"{source.shard_name(train_shard)}#{train_number}",
                "kind": match.kind,
                "bits": match.bits,
                "likeness": round(match.likeness, 4),
            }
        )
    head = {"test": test.name, "images": len(test.source), "contents": test.source.contents_digest()}
    return {**head, "training": shards, "overlap": rows}
