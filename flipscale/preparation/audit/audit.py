"""Audit training data: its captions, its copies, and the images of test sets in it.

Worker processes pass over the sources. A pass keeps a few bytes of each image and caption, and counts of words.
"""

import hashlib
import importlib.util
import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flipscale.data.decode import decode_small, decode_whole
from flipscale.data.randomness import keyed_uniform
from flipscale.data.samples import (
    BadSample,
    MissingCaption,
    Sample,
    SampleNumbers,
    Source,
    UndecodableCaption,
    evenly,
)
from flipscale.data.sources.tar import TarSource
from flipscale.data.tokenizers import load_tokenizer
from flipscale.io.atomic import remove, write_text
from flipscale.io.errors import UserError
from flipscale.io.paths import check_writable
from flipscale.io.progress import Progress, each
from flipscale.io.templates import render
from flipscale.io.urls import without_secrets
from flipscale.preparation.audit.duplicates import (
    LEAST_LIKENESS,
    MOST_BITS,
    MOST_DIFFERENCE,
    THUMBNAIL_SIDE,
    exact_copies,
    likeness,
    look,
    near_hashes,
    thumbnail,
)
from flipscale.preparation.audit.words import (
    LEAST_RATIO,
    NO_LETTERS,
    UNSURE,
    WordCounts,
    count_words,
    country_figures,
    gender_figures,
    language_figures,
    lexicon,
)
from flipscale.preparation.inspection import TILE, Faults, percentiles, tile, write_contact_sheet
from flipscale.preparation.worker_pool import shared, worker_pool

# Captions whose languages are looked at. Shares are then known to half a percent in three minutes on two cores; a
# million captions would take an hour.
MOST_LANGUAGES = 50_000
_COMMONEST, _MOST_ROWS = 20, 20  # rows of the page's tables
_MAX_PAIRS = 24  # on a sheet
_PACKAGES = {"lingua": "lingua-language-detector", "pycountry": "pycountry"}
_PAGE = Path(__file__).with_name("audit.md.jinja")

UNUSABLE, BLANK, SEEN = 0, 1, 2  # states of an image
# Characters. A longer caption is cut for the language detector, which would need seconds for it.
LONGEST = 2000
_IMAGE = np.dtype([("digest", "<u8"), ("look", "<u8"), ("state", "u1")])
_CAPTION = np.dtype([("digest", "<u8"), ("row", "<u8"), ("characters", "<u4"), ("words", "<u4"), ("tokens", "<u4")])
_RUN = 256  # samples in a worker's task
_COMPARED_AT_ONCE = 128  # pairs in a worker's task
_MAX_KINDS = 8  # different images of one hash that are told apart
_DECODED_SIDE = 2 * THUMBNAIL_SIDE


@dataclass
class Scan:
    """Results of a pass.

    Args:
        images: `digest` of the bytes, perceptual hash `look` and `state` of each image, `(rows,)`.
        captions: `digest`, `row` and lengths of each caption, in the order of the rows.
        words: numbers of captions with the words.
        sampled: captions for the language detector, with their numbers.
    """

    images: np.ndarray
    captions: np.ndarray
    words: WordCounts
    sampled: Counter[str]
    faults: Faults


class _Run(NamedTuple):
    """Consecutive samples of a source, from `number` of `shard` on, which is `row` of the source."""

    source: int
    shard: int
    number: int
    row: int
    length: int
    sampled_share: float


def scan_source(pool: ProcessPoolExecutor, source: Source, number: int, what: str, sampled_share: float = 0.0) -> Scan:
    """Return the results of a pass over a source. Raise OSError if a shard cannot be read.

    Args:
        pool: workers that share the list of all sources, and a tokenizer or None.
        number: number of the source in the list.
        sampled_share: share of the samples whose captions are kept for their languages, chosen by their rows.
    """
    starts = [0, *accumulate(source.shard_sizes)]
    runs = [
        _Run(number, shard, at, row + at, min(_RUN, size - at), sampled_share)
        for shard, (size, row) in enumerate(zip(source.shard_sizes, starts, strict=False))
        for at in range(0, size, _RUN)
    ]
    images, captions = [np.zeros(0, _IMAGE)], [np.zeros(0, _CAPTION)]
    words: WordCounts = Counter()
    sampled: Counter[str] = Counter()
    faults = Faults()
    with Progress(len(source), what, "samples") as progress:
        for part in pool.map(_scan_run, runs):
            images.append(part.images)
            captions.append(part.captions)
            words.update(part.words)
            sampled.update(part.sampled)
            faults.merge(part.faults)
            progress.update(len(part.images))
    return Scan(np.concatenate(images), np.concatenate(captions), words, sampled, faults)


def _scan_run(run: _Run) -> Scan:
    sources, tokenizer = shared()
    source, faults = sources[run.source], Faults()
    is_sampled = keyed_uniform(0, "audit", np.arange(run.row, run.row + run.length), 1)[:, 0] < run.sampled_share
    images = np.zeros(run.length, _IMAGE)
    captions: list[tuple[int, ...]] = []
    words: WordCounts = Counter()
    sampled: Counter[str] = Counter()
    for at, image in enumerate(images):
        name = f"{source.shard_name(run.shard)}#{run.number + at}"
        try:
            sample = source.read(run.shard, run.number + at)
        except BadSample as error:
            faults.add(error.cause, f"{name}: {error}")
            continue
        for text in texts_of(sample, name, faults):
            tokens = len(tokenizer(text, truncation=False)["input_ids"]) if tokenizer else 0
            captions.append((digest(text.encode()), run.row + at, len(text), len(text.split()), tokens))
            words.update(count_words(text))
            if is_sampled[at]:
                sampled[text[:LONGEST]] += 1
        image["digest"] = digest(sample.image)
        try:
            image["look"], is_blank = look(decode_small(sample.image, _DECODED_SIDE))
            image["state"] = BLANK if is_blank else SEEN
        except BadSample as error:
            faults.add(error.cause, f"{name}: {error}")
    return Scan(images, np.array(captions, _CAPTION), words, sampled, faults)


def texts_of(sample: Sample, name: str, faults: Faults) -> list[str]:
    """Return the captions that can be decoded and are not blank."""
    texts = []
    for caption in sample.captions:
        try:
            texts.append(caption.decode("utf-8").strip())
        except UnicodeDecodeError as error:
            faults.add(UndecodableCaption.cause, f"{name}: {error}")
    if not any(sample.captions):
        faults.add(MissingCaption.cause, f"{name}: there is none")
    return [text for text in texts if text]


def digest(content: bytes) -> int:
    """Return a 64-bit digest."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class Match(NamedTuple):
    """Rows of two images, perhaps of two sources, and the likeness of their thumbnails; `exact` for the same bytes."""

    row: int
    other: int
    likeness: float
    kind: str = "near"


def _alike(pool: ProcessPoolExecutor, source: int, other: int, pairs: np.ndarray) -> list[Match]:
    """Return the pairs of rows, int64 `(pairs, 2)`, whose thumbnails are alike."""
    pieces = [pairs[at : at + _COMPARED_AT_ONCE].tolist() for at in range(0, len(pairs), _COMPARED_AT_ONCE)]
    results = pool.map(_likenesses, repeat(source), repeat(other), pieces)
    compared = each(results, "comparing likely copies", "pieces", len(pieces), delay=2)
    return [match for matches in compared for match in matches if match.likeness >= LEAST_LIKENESS]


def _likenesses(source: int, other: int, pairs: list[list[int]]) -> list[Match]:
    """Compare pairs of rows, whose images are read again."""

    @lru_cache(2 * _COMPARED_AT_ONCE)
    def thumbnail_of(number: int, row: int) -> np.ndarray:
        opened = shared()[0][number]
        return thumbnail(decode_small(opened.read(*SampleNumbers(opened)[row]).image, _DECODED_SIDE))

    return [Match(a, b, likeness(thumbnail_of(source, a), thumbnail_of(other, b))) for a, b in pairs]


def near_copies(pool: ProcessPoolExecutor, images: np.ndarray) -> tuple[int, list[Match]]:
    """Return the number of images of source 0 that are nearly an earlier one, and the pairs that are alike.

    Of images with the same bytes only the first takes part. Nearly blank images do not: their hashes mean nothing.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    is_first = exact_copies(images["digest"], images["state"] > 0) == np.arange(len(images))
    left = np.flatnonzero((images["state"] == SEEN) & is_first)
    pairs: list[Match] = []
    different = []
    # Of images of one hash, each is compared with the first; the others with the first of them; and so on.
    for _ in range(_MAX_KINDS):
        _, first, inverse = np.unique(images["look"][left], return_index=True, return_inverse=True)
        different.append(left[first])
        rest = np.delete(np.arange(len(left)), first)
        copies = _alike(pool, 0, 0, np.stack([left[first][inverse[rest]], left[rest]], axis=1))
        pairs += copies
        left = np.setdiff1d(left[rest], [pair.other for pair in copies])
    rows = np.sort(np.concatenate(different))
    for one, other in near_hashes(images["look"][rows]):
        pairs += _alike(pool, 0, 0, np.stack([rows[one], rows[other]], axis=1))
    edges = ([pair.row for pair in pairs], [pair.other for pair in pairs])
    graph = coo_array((np.ones(len(pairs)), edges), shape=(len(images), len(images)))
    return len(images) - connected_components(graph, directed=False)[0], pairs


def overlaps(pool: ProcessPoolExecutor, test: np.ndarray, number: int, train: np.ndarray) -> list[Match]:
    """Return the images of source `number`, a test set, that are in source 0, each with its best match."""
    usable = np.flatnonzero(train["state"] > 0)
    digests, first = np.unique(train["digest"][usable], return_index=True)
    exact = (test["state"] > 0) & np.isin(test["digest"], digests)
    copied = usable[first[np.searchsorted(digests, test["digest"][exact])]]
    rows = np.flatnonzero(exact).tolist()
    matches = {row: Match(row, other, 1.0, "exact") for row, other in zip(rows, copied.tolist(), strict=True)}
    asked, held = np.flatnonzero((test["state"] == SEEN) & ~exact), np.flatnonzero(train["state"] == SEEN)
    for one, other in near_hashes(test["look"][asked], train["look"][held]):
        for match in _alike(pool, number, 0, np.stack([asked[one], held[other]], axis=1)):
            matches[match.row] = max(matches.get(match.row, match), match, key=lambda best: best.likeness)
    return [matches[row] for row in sorted(matches)]


def _commonest_captions(scan: Scan, source: Source) -> list[dict[str, Any]]:
    """Return the commonest captions with their numbers and shares."""
    _, first, counts = np.unique(scan.captions["digest"], return_index=True, return_counts=True)
    commonest, places = [], SampleNumbers(source)
    for number in np.lexsort((first, -counts))[:_COMMONEST].tolist():
        caption = scan.captions[first[number]]
        texts = texts_of(source.read(*places[int(caption["row"])]), "", Faults())
        text = next(text for text in texts if digest(text.encode()) == caption["digest"])
        share = counts[number] / len(scan.captions)
        commonest.append({"caption": text[:LONGEST], "count": int(counts[number]), "share": float(share)})
    return commonest


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
    caption; the search for near duplicates takes 30 more of each image. Raise UserError if a package is missing, there
    is not a sample or no caption, or `out_dir` cannot be written.

    Args:
        tokenizer: tokenizer that counts tokens, named as in a recipe.
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
        "shards": without_secrets(shards),
        "samples": len(source),
        "unusable": scan.faults,
        "captions": {
            "captions": len(scan.captions),
            "distinct": len(np.unique(scan.captions["digest"])),
            "lengths": {kind: percentiles(scan.captions[kind]) for kind in lengths},
            "commonest": _commonest_captions(scan, source),
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
    for earlier in ("overlap", "overlap.png", "near_duplicates.png"):  # perhaps of other data
        remove(out_dir / earlier)
    (out_dir / "overlap").mkdir(parents=True)
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
    write_contact_sheet(file, tiles)


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
