"""The audit of training data: what its captions say, which images are copies, and which lie in the test sets."""

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flipscale.data.samples import Source
from flipscale.data.sources.tar import TarSource
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.preparation.audit.captions import LONGEST
from flipscale.preparation.audit.duplicates import (
    LEAST_LIKENESS,
    MOST_BITS,
    Overlap,
    Pair,
    exact_copies,
    near_copies,
    overlaps,
    place,
)
from flipscale.preparation.audit.figure import draw_audit
from flipscale.preparation.audit.hashes import MOST_DIFFERENCE
from flipscale.preparation.audit.languages import LEAST_RATIO, LONG_LETTERS, language_figures
from flipscale.preparation.audit.report import audit_page
from flipscale.preparation.audit.scan import BLANK, SEEN, Faults, Scan, Workers, texts_of
from flipscale.preparation.audit.sheets import Shown, pair_sheet
from flipscale.preparation.audit.words import country_figures, gender_figures, lexicon

AUDIT_FILE, PAGE_FILE, FIGURE_FILE = "audit.json", "audit.md", "audit.png"
COPIES_SHEET, OVERLAP_SHEET, OVERLAP_FOLDER = "near_duplicates.png", "overlap.png", "overlap"
# Captions whose languages are looked at: a share is then known to half a percent, and it takes three minutes on two
# cores where a million captions would take an hour.
MOST_LANGUAGES = 50_000
_COMMONEST = 20
_NEEDED = {"lingua": "lingua-language-detector", "pycountry": "pycountry", "matplotlib": "matplotlib"}


@dataclass(frozen=True)
class TestFolder:
    """A test set to look for in the training data."""

    name: str
    source: TarSource


def check_packages() -> None:
    """Raise if a package that audits need is not installed.

    Raises:
        ValueError: with the command that installs it.
    """
    for module, package in _NEEDED.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{package}, which audits need, is not installed; run: pip install 'flipscale[audit]'")


def find_test_sets(folder: Path) -> list[TestFolder]:
    """Return the test sets in a folder and below it: each folder that has tars. One called `test`, as CLIP_benchmark
    lays them out, has the name of the folder above it.

    Raises:
        ValueError: there is none, or two of one name.
    """
    found: dict[str, Path] = {}
    for inner in sorted({tar.parent for tar in folder.rglob("*.tar")}):
        named = inner.parent if inner.name == "test" and inner != folder else inner
        path = named.relative_to(folder)
        name = "-".join(path.parts) or folder.resolve().name
        if name in found:
            raise UserError(f"{found[name]} and {inner} are both called {name}; rename one")
        found[name] = inner
    if not found:
        raise UserError(f"no test set in {folder}: no folder there has *.tar; name one set's folder, or one of several")
    return [TestFolder(name, TarSource(str(inner))) for name, inner in found.items()]


def audit(
    shards: str,
    source: Source,
    test_sets: list[TestFolder],
    out_dir: Path,
    tokenizer: str | None = None,
    num_workers: int = 2,
) -> dict[str, Any]:
    """Return the figures of the training data `source`, and write them and their page with its pictures to `out_dir`.

    The images are decoded once, those that seem to be copies a second time. What is kept of each is 27 bytes; the
    search for near duplicates takes 30 more.

    Args:
        shards: the data's name.
        tokenizer: as a recipe names it; counts tokens.
        num_workers: processes that read and decode.

    Raises:
        ValueError: a package is missing, there is no sample or no caption, or `out_dir` cannot be written.
        OSError: a shard cannot be read, or `out_dir` not written.
    """
    check_packages()
    there = next(parent for parent in (out_dir, *out_dir.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{there} is no folder that can be written to; name another with --output_dir")
    if not len(source):
        raise UserError(f"there is no sample in {len(source.shard_sizes)} shards of {shards}")
    sources: list[Source] = [source, *(test.source for test in test_sets)]
    with Workers(sources, num_workers, tokenizer) as workers:
        found = workers.scan(0, "training data", min(1.0, MOST_LANGUAGES / len(source)))
        if not found.num_captions.any():
            raise UserError(f"none of the {len(source)} samples of {shards} has a caption; an audit is of captions too")
        copies = exact_copies(found.digests, found.states)
        groups, pairs = near_copies(found, workers, 0)
        in_tests = {}
        for number, test in enumerate(test_sets, 1):
            scanned = workers.scan(number, test.name)
            in_tests[test.name] = overlaps(workers, scanned, number, found, 0)
    figures = {
        "shards": shards,
        "samples": len(source),
        "unusable": found.faults.figures(),
        "captions": _caption_figures(found, source),
        "languages": language_figures(found.counts.sampled, len(source) > MOST_LANGUAGES)
        | {"long_letters": LONG_LETTERS, "least_ratio": LEAST_RATIO},
        "gender": gender_figures(found.counts.words),
        "countries": {"rows": country_figures(found.counts.words), "ambiguous": sorted(lexicon().ambiguous)},
        "images": _image_figures(found, copies, groups.copies(), pairs),
        "tests": [
            {"name": test.name, "images": len(test.source), **_overlap_counts(in_tests[test.name])}
            for test in test_sets
        ],
    }
    _write(out_dir, figures, source, pairs, test_sets, in_tests)
    return figures


def _caption_figures(found: Scan, source: Source) -> dict[str, Any]:
    total = found.counts.words.captions
    commonest = []
    for count, row, number in found.commonest(_COMMONEST):
        caption = texts_of(source.read(*place(source, row)), "", Faults())[number]
        commonest.append({"caption": caption[: LONGEST["characters"]], "count": count, "share": count / total})
    return {
        "captions": total,
        "distinct": found.num_distinct_captions,
        "lengths": found.counts.length_figures(),
        "longest_counted": LONGEST,
        "histogram": found.counts.histogram(),
        "commonest": commonest,
    }


def _image_figures(found: Scan, copies: np.ndarray, near: list[int], pairs: list[Pair]) -> dict[str, Any]:
    return {
        "decoded": int((found.states > 0).sum()),
        "exact_copies": int((copies != np.arange(len(copies))).sum()),
        "near_copies": len(near),
        "near_pairs": len(pairs),
        "nearly_blank": int((found.states == BLANK).sum()),
        "hashed": int((found.states == SEEN).sum()),
        "most_bits": MOST_BITS,
        "least_likeness": LEAST_LIKENESS,
        "most_difference": MOST_DIFFERENCE,
    }


def _overlap_counts(found: list[Overlap]) -> dict[str, int]:
    return {kind: sum(one.kind == kind for one in found) for kind in ("exact", "near")}


def _write(
    out_dir: Path,
    figures: dict[str, Any],
    source: Source,
    pairs: list[Pair],
    test_sets: list[TestFolder],
    in_tests: dict[str, list[Overlap]],
) -> None:
    (out_dir / OVERLAP_FOLDER).mkdir(parents=True, exist_ok=True)
    pictures = [FIGURE_FILE]
    draw_audit(figures, out_dir / FIGURE_FILE)
    if pairs:
        shown = [Shown((source, p.first), (source, p.second), f"{p.likeness:.3f} alike") for p in sorted(pairs)]
        pair_sheet(shown).save(out_dir / COPIES_SHEET)
        pictures.append(COPIES_SHEET)
    shown = []
    for test in test_sets:
        matches = in_tests[test.name]
        write_text(
            out_dir / OVERLAP_FOLDER / f"{test.name}.json", overlap_file(figures["shards"], source, test, matches)
        )
        for m in matches:
            about = "same bytes" if m.kind == "exact" else f"{m.likeness:.3f} alike"
            shown.append(Shown((test.source, m.row), (source, m.train_row), f"{test.name}, training: {about}"))
    if shown:
        pair_sheet(shown).save(out_dir / OVERLAP_SHEET)
        pictures.append(OVERLAP_SHEET)
    for name, text in (
        (PAGE_FILE, audit_page(figures, pictures)),
        (AUDIT_FILE, json.dumps(figures, indent=1, ensure_ascii=False) + "\n"),
    ):
        # Names of shards may be no UTF-8.
        write_text(out_dir / name, text.encode("utf-8", "backslashreplace").decode())


def overlap_file(shards: str, source: Source, test: TestFolder, matches: list[Overlap]) -> str:
    """Return the JSON of a test set's images that lie in the training data: where they are in both, and how they were
    found. `contents` tells the test set from others, wherever it lies."""
    rows = []
    for match in matches:
        shard, number = place(test.source, match.row)
        train_shard, train_number = place(source, match.train_row)
        rows.append(
            {
                "shard": os.path.basename(test.source.shard_name(shard)),
                "number": number,
                "row": match.row,
                "training": f"{source.shard_name(train_shard)}#{train_number}",
                "kind": match.kind,
                "bits": match.bits,
                "likeness": round(match.likeness, 4),
            }
        )
    head = {
        "test": test.name,
        "images": len(test.source),
        "contents": test.source.contents_digest(),
        "training": shards,
    }
    return json.dumps({**head, "overlap": rows}, indent=1) + "\n"
