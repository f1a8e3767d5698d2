"""Passes over sources by worker processes: a few bytes of each image and caption, counts of words, and copies."""

import hashlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, repeat
from typing import Any, NamedTuple

import numpy as np

from flipscale.data.decode import decode_small
from flipscale.data.randomness import keyed_uniform
from flipscale.data.samples import BadSample, MissingCaption, Sample, SampleNumbers, Source, UndecodableCaption
from flipscale.io.progress import Progress, each
from flipscale.preparation.audit.duplicates import (
    LEAST_LIKENESS,
    THUMBNAIL_SIDE,
    exact_copies,
    likeness,
    look,
    near_hashes,
    thumbnail,
)
from flipscale.preparation.audit.words import WordCounts, count_words
from flipscale.preparation.inspection import Faults
from flipscale.preparation.worker_pool import shared

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
        what: name of the source, for the progress.
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


def commonest_captions(scan: Scan, source: Source, count: int) -> list[dict[str, Any]]:
    """Return the commonest captions with their numbers and shares."""
    _, first, counts = np.unique(scan.captions["digest"], return_index=True, return_counts=True)
    commonest, places = [], SampleNumbers(source)
    for number in np.lexsort((first, -counts))[:count].tolist():
        caption = scan.captions[first[number]]
        texts = texts_of(source.read(*places[int(caption["row"])]), "", Faults())
        text = next(text for text in texts if digest(text.encode()) == caption["digest"])
        share = counts[number] / len(scan.captions)
        commonest.append({"caption": text[:LONGEST], "count": int(counts[number]), "share": float(share)})
    return commonest
