"""Find images that are the same: byte for byte, or nearly, by a perceptual hash and then by their pixels."""

from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import cv2
import numpy as np

from flipscale.data.decode import decode_small
from flipscale.data.samples import Source
from flipscale.io.progress import Progress
from flipscale.preparation.audit.scan import SEEN, OpenInWorker, Scan, Workers, starts

# Bits of 64 in which the hashes of near duplicates may differ, and the least likeness of their thumbnails. Both are
# measured on photographs and emoji: docs/evaluation.md.
MOST_BITS = 7
LEAST_LIKENESS = 0.95
# Largest mean difference, of 255, in a sixteenth of two thumbnails. Encoders cause less; another drawing, such as a
# face with another mouth, causes more.
MOST_DIFFERENCE = 20.0
_SIDE = 32  # pixels of a thumbnail's side
_WORDS, _WORD_BITS = 4, 16
_RADIUS = MOST_BITS // _WORDS
_FLIPS = [0, *(1 << bit for bit in range(_WORD_BITS))]
_PAIRS_AT_ONCE = 1 << 22
_COMPARED_AT_ONCE = 128
_MAX_KINDS = 8  # different images of one hash that are told apart


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Return the image stretched to uint8 `(32, 32, 3)`."""
    return cv2.resize(pixels, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Return Lin's concordance of the pixels of two thumbnails, at most 1.

    It is the correlation, reduced by differences in brightness and contrast. It is 0 if a sixteenth of the picture
    differs by more than `MOST_DIFFERENCE`.
    """
    first, second = one.astype(np.float32), other.astype(np.float32)
    tiles = np.abs(first - second).reshape(4, _SIDE // 4, 4, _SIDE // 4, 3).mean(axis=(1, 3, 4))
    if tiles.max() > MOST_DIFFERENCE:
        return 0.0
    means, variances = (first.mean(), second.mean()), first.var() + second.var()
    apart = variances + (means[0] - means[1]) ** 2
    return float(2 * ((first - means[0]) * (second - means[1])).mean() / apart) if apart else 1.0


def near_hashes(queries: np.ndarray, targets: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs of hashes that differ in at most `MOST_BITS` bits, each pair once, as two arrays of positions.

    If two hashes differ in at most 7 bits, one of their four words of 16 bits differs in at most one bit. So a hash is
    looked up by each word, also with one bit flipped. The index takes 6 bytes a hash.

    Args:
        queries: uint64 `(queries,)`.
        targets: uint64 `(targets,)`; None for pairs within `queries`, the earlier position first.
    """
    assert _RADIUS == 1
    within = targets is None
    targets = queries if targets is None else targets
    for word in range(_WORDS):
        keys = _word(targets, word)
        order = np.argsort(keys, kind="stable").astype(np.uint32)
        firsts_of = np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=1 << _WORD_BITS))])
        for flip in _FLIPS:
            wanted = _word(queries, word) ^ np.uint16(flip)
            firsts, counts = firsts_of[wanted], firsts_of[wanted.astype(np.int64) + 1] - firsts_of[wanted]
            for some in _pieces(counts):
                left = np.repeat(np.arange(some.start, some.stop), counts[some])
                ends = np.cumsum(counts[some])
                inside = np.arange(len(left)) - np.repeat(ends - counts[some], counts[some])
                right = order[np.repeat(firsts[some], counts[some]) + inside].astype(np.int64)
                differ = queries[left] ^ targets[right]
                near = np.bitwise_count(differ) <= MOST_BITS
                if within:
                    near &= left < right
                for earlier in range(word):  # which has yielded the pair
                    near &= np.bitwise_count(_word(differ, earlier)) > _RADIUS
                yield left[near], right[near]


def _word(hashes: np.ndarray, word: int) -> np.ndarray:
    return (hashes >> np.uint64(word * _WORD_BITS)).astype(np.uint16)


def _pieces(counts: np.ndarray) -> Iterator[slice]:
    """Yield slices of queries with about `_PAIRS_AT_ONCE` pairs each."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right")))
        if ends[stop - 1] > done:
            yield slice(start, stop)
        start = stop


def place(source: Source, row: int) -> tuple[int, int]:
    """Return the shard and number of a row of a source."""
    firsts = starts(source)
    shard = bisect_right(firsts, row) - 1
    return shard, row - firsts[shard]


def exact_copies(digests: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Return, for each row, the first row with the same bytes, int64 `(rows,)`; an unusable image has no copies."""
    firsts = np.arange(len(digests))
    usable = np.flatnonzero(states > 0)
    _, first, inverse = np.unique(digests[usable], return_index=True, return_inverse=True)
    firsts[usable] = usable[first[inverse]]
    return firsts


class Pair(NamedTuple):
    """Two images by their rows, and the likeness of their thumbnails."""

    first: int
    second: int
    likeness: float


class _Compared(NamedTuple):
    """Pairs of rows of two sources for a worker to compare."""

    first_source: int
    second_source: int
    pairs: list[list[int]]


def _likenesses(compared: _Compared) -> list[float]:
    """Return the likeness of each pair, whose images are read again."""

    @lru_cache(2 * _COMPARED_AT_ONCE)
    def thumbnail_of(number: int, row: int) -> np.ndarray:
        source = OpenInWorker.sources[number]
        return thumbnail(decode_small(source.read(*place(source, row)).image, 2 * _SIDE))

    return [
        likeness(thumbnail_of(compared.first_source, first), thumbnail_of(compared.second_source, second))
        for first, second in compared.pairs
    ]


def _alike(workers: Workers, first_source: int, second_source: int, pairs: np.ndarray, what: str) -> Iterator[Pair]:
    """Yield the pairs of rows, int64 `(pairs, 2)`, whose thumbnails are alike."""
    pieces = [pairs[at : at + _COMPARED_AT_ONCE].tolist() for at in range(0, len(pairs), _COMPARED_AT_ONCE)]
    work = (_Compared(first_source, second_source, piece) for piece in pieces)
    with Progress(len(pairs), what, "pairs", delay=2) as progress:
        for piece, values in zip(pieces, workers.in_order(_likenesses, work), strict=True):
            for (first, second), value in zip(piece, values, strict=True):
                if value >= LEAST_LIKENESS:
                    yield Pair(first, second, value)
            progress.update(len(piece))


def near_copies(scan: Scan, workers: Workers, number: int) -> tuple[list[int], list[Pair]]:
    """Return the rows of source `number` that are nearly the same as an earlier row, and the pairs that are alike.

    Of images with the same bytes only the first takes part. Nearly blank images do not, because their hashes mean
    nothing.
    """
    rows = np.flatnonzero((scan.states == SEEN) & (exact_copies(scan.digests, scan.states) == np.arange(len(scan))))
    hashes, first, inverse = np.unique(scan.looks[rows], return_index=True, return_inverse=True)
    firsts: dict[int, int] = {}  # a union-find: the parent of each row that is not the first of its group
    pairs: list[Pair] = []

    def first_of(row: int) -> int:
        while row in firsts:
            parent = firsts[row]
            firsts[row] = firsts.get(parent, parent)
            row = parent
        return row

    def compare(candidates: np.ndarray) -> set[int]:
        copies = set()
        for pair in _alike(workers, number, number, candidates, "near duplicates"):
            low, high = sorted((first_of(pair.first), first_of(pair.second)))
            if low != high:
                firsts[high] = low
            pairs.append(pair)
            copies.add(pair.second)
        return copies

    # Images of one hash: each is compared with the first; the different ones with the first of them; and so on.
    kinds = {0: rows[first]}
    left = np.delete(np.arange(len(rows)), first)
    for kind in range(1, _MAX_KINDS):
        copies = compare(np.stack([kinds[kind - 1][inverse[left]], rows[left]], axis=1))
        left = left[[row not in copies for row in rows[left].tolist()]]
        if not len(left):
            break
        kinds[kind] = np.full(len(hashes), -1)
        kinds[kind][inverse[left[::-1]]] = rows[left[::-1]]  # the first of each hash is written last
        left = left[rows[left] != kinds[kind][inverse[left]]]
    for one, other in near_hashes(hashes):
        for these, those in product(kinds.values(), repeat=2):
            candidates = np.stack([these[one], those[other]], axis=1)
            compare(np.sort(candidates[(candidates >= 0).all(axis=1)], axis=1))
    return sorted(firsts), pairs


class Overlap(NamedTuple):
    """A row of a test set that is in the training data; `kind` is exact or near, `bits` differ in the hashes."""

    row: int
    train_row: int
    kind: str
    bits: int
    likeness: float


def overlaps(workers: Workers, test: Scan, test_number: int, train: Scan, train_number: int) -> list[Overlap]:
    """Return the rows of a test set whose images are in the training data, each with its best match."""
    usable = np.flatnonzero(train.states > 0)
    order = usable[np.argsort(train.digests[usable], kind="stable")]
    matches: dict[int, Overlap] = {}
    exact = np.zeros(len(test), bool)
    if len(order):
        at = np.searchsorted(train.digests[order], test.digests)
        match = order[np.minimum(at, len(order) - 1)]
        exact = (test.states > 0) & (train.digests[match] == test.digests)
        matches = {row: Overlap(row, int(match[row]), "exact", 0, 1.0) for row in np.flatnonzero(exact).tolist()}
    asked, held = np.flatnonzero((test.states == SEEN) & ~exact), np.flatnonzero(train.states == SEEN)
    for one, other in near_hashes(test.looks[asked], train.looks[held]):
        candidates = np.stack([asked[one], held[other]], axis=1)
        for pair in _alike(workers, test_number, train_number, candidates, "overlap"):
            bits = int(np.bitwise_count(test.looks[pair.first] ^ train.looks[pair.second]))
            if pair.first not in matches or matches[pair.first].likeness < pair.likeness:
                matches[pair.first] = Overlap(pair.first, pair.second, "near", bits, pair.likeness)
    return [matches[row] for row in sorted(matches)]
