"""Images that are the same: exactly, byte for byte, or nearly, by the hash of their looks and then their pixels."""

from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from flipscale.data.decode import decode_small
from flipscale.data.samples import Source
from flipscale.preparation.audit.hashes import LEAST_SIDE, likeness, thumbnail
from flipscale.preparation.audit.scan import SEEN, OpenInWorker, Scan, Workers, starts

# Bits of 64 in which the hashes of near duplicates may differ, and the least correlation of their thumbnails. Measured
# on photographs and on emoji: docs/evaluation.md.
MOST_BITS = 7
LEAST_LIKENESS = 0.95
_WORDS, _WORD_BITS = 4, 16
_RADIUS = MOST_BITS // _WORDS  # two hashes that differ in so few bits have a word that differs in at most one bit
_FLIPS = [0, *(1 << bit for bit in range(_WORD_BITS))]
_PAIRS_AT_ONCE = 1 << 22
_COMPARED_AT_ONCE = 128
# Images of one hash that differ by their pixels; more than these many kinds of them are not told apart further.
_MOST_KINDS = 8


def near_hashes(queries: np.ndarray, targets: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs of hashes that differ in at most `MOST_BITS` bits, as two arrays of positions, each pair once.

    A hash is looked up by its four words of 16 bits, each also with one bit flipped: of two hashes with at most 7
    differing bits, one word at least differs in at most one. The index takes 6 bytes a hash.

    Args:
        queries: uint64 `(queries,)`.
        targets: uint64 `(targets,)`; None for pairs within `queries`, the first of a pair before the second.
    """
    assert _RADIUS == 1
    within = targets is None
    targets = queries if targets is None else targets
    for word in range(_WORDS):
        keys = _word(targets, word)
        order = np.argsort(keys, kind="stable").astype(np.uint32)
        starts = np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=1 << _WORD_BITS))])
        for flip in _FLIPS:
            wanted = _word(queries, word) ^ np.uint16(flip)
            firsts, counts = starts[wanted], starts[wanted.astype(np.int64) + 1] - starts[wanted]
            for some in _pieces(counts):
                left = np.repeat(np.arange(some.start, some.stop), counts[some])
                ends = np.cumsum(counts[some])
                inside = np.arange(len(left)) - np.repeat(ends - counts[some], counts[some])
                right = order[np.repeat(firsts[some], counts[some]) + inside].astype(np.int64)
                differ = queries[left] ^ targets[right]
                near = np.bitwise_count(differ) <= MOST_BITS
                if within:
                    near &= left < right
                for earlier in range(word):  # which has yielded it
                    near &= np.bitwise_count(_word(differ, earlier)) > _RADIUS
                yield left[near], right[near]


def _word(hashes: np.ndarray, word: int) -> np.ndarray:
    return (hashes >> np.uint64(word * _WORD_BITS)).astype(np.uint16)


def _pieces(counts: np.ndarray) -> Iterator[slice]:
    """Yield slices of queries that together have about `_PAIRS_AT_ONCE` pairs."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right")))
        if ends[stop - 1] > done:
            yield slice(start, stop)
        start = stop


class Pair(NamedTuple):
    """Two images by their rows, and how alike their thumbnails are."""

    first: int
    second: int
    likeness: float


class Groups:
    """Which rows belong together (a union-find); the first row of a group stands for it."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}

    def first(self, row: int) -> int:
        """Return the first row of the group of `row`."""
        path = []
        while (parent := self._parents.get(row, row)) != row:
            path.append(row)
            row = parent
        for one in path:
            self._parents[one] = row
        return row

    def join(self, one: int, other: int) -> None:
        """Put two rows and their groups together."""
        low, high = sorted((self.first(one), self.first(other)))
        if low != high:
            self._parents[high] = low

    def copies(self) -> list[int]:
        """Return the rows that are not the first of their group, in order."""
        return sorted(row for row in self._parents if self.first(row) != row)


def exact_copies(digests: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Return the row of the first image with the same bytes for every row, itself if it is the first, int64 `(rows,)`.
    An image that cannot be decoded is nobody's copy."""
    firsts = np.arange(len(digests))
    usable = np.flatnonzero(states > 0)
    _, first, inverse = np.unique(digests[usable], return_index=True, return_inverse=True)
    firsts[usable] = usable[first[inverse]]
    return firsts


class Compared(NamedTuple):
    """Pairs of rows of two sources, which may be the same, for a worker to compare."""

    first_source: int
    second_source: int
    pairs: list[list[int]]


def _likenesses(compared: Compared) -> list[float]:
    """Return how alike the thumbnails of each pair are; the images are read again."""

    @lru_cache(2 * _COMPARED_AT_ONCE)
    def thumbnail_of(source: int, row: int) -> np.ndarray:
        opened = OpenInWorker.sources[source]
        return thumbnail(decode_small(opened.read(*place(opened, row)).image, LEAST_SIDE))

    return [
        likeness(thumbnail_of(compared.first_source, first), thumbnail_of(compared.second_source, second))
        for first, second in compared.pairs
    ]


def place(source: Source, row: int) -> tuple[int, int]:
    """Return shard and number of a row of a source."""
    firsts = starts(source)
    shard = bisect_right(firsts, row) - 1
    return shard, row - firsts[shard]


def alike(workers: Workers, first_source: int, second_source: int, pairs: np.ndarray, what: str) -> Iterator[Pair]:
    """Yield the pairs whose pixels are alike.

    Args:
        pairs: of rows, int64 `(pairs, 2)`.
        what: the name of the progress bar, which shows where it takes long.
    """
    pieces = [pairs[at : at + _COMPARED_AT_ONCE].tolist() for at in range(0, len(pairs), _COMPARED_AT_ONCE)]
    work = (Compared(first_source, second_source, piece) for piece in pieces)
    with tqdm(total=len(pairs), desc=what, unit=" pairs", delay=2, disable=None) as bar:
        for piece, values in zip(pieces, workers.in_order(_likenesses, work), strict=True):
            for (first, second), value in zip(piece, values, strict=True):
                if value >= LEAST_LIKENESS:
                    yield Pair(first, second, value)
            bar.update(len(piece))


def near_copies(found: Scan, workers: Workers, number: int) -> tuple[Groups, list[Pair]]:
    """Return the groups of images of source `number` that are nearly the same, and the pairs of them that are alike.

    Of images with the same bytes only the first takes part, and nearly blank ones do not: their hashes say nothing.
    """
    rows = np.flatnonzero((found.states == SEEN) & (exact_copies(found.digests, found.states) == np.arange(len(found))))
    hashes, first, inverse = np.unique(found.looks[rows], return_index=True, return_inverse=True)
    groups, pairs = Groups(), []

    def compare(candidates: np.ndarray) -> set[int]:
        joined = set()
        for pair in alike(workers, number, number, candidates, "near duplicates"):
            groups.join(pair.first, pair.second)
            pairs.append(pair)
            joined.add(pair.second)
        return joined

    # Images of one hash: each is compared with the first; those unlike it with the first of them; and so on.
    kinds = {0: rows[first]}
    left = np.delete(np.arange(len(rows)), first)
    for kind in range(1, _MOST_KINDS):
        alike_rows = compare(np.stack([kinds[kind - 1][inverse[left]], rows[left]], axis=1))
        left = left[[row not in alike_rows for row in rows[left].tolist()]]
        if not len(left):
            break
        kinds[kind] = np.full(len(hashes), -1)
        kinds[kind][inverse[left[::-1]]] = rows[left[::-1]]  # the first of each hash is written last
        left = left[rows[left] != kinds[kind][inverse[left]]]
    for one, other in near_hashes(hashes):
        for these, those in product(kinds.values(), repeat=2):
            candidates = np.stack([these[one], those[other]], axis=1)
            compare(np.sort(candidates[(candidates >= 0).all(axis=1)], axis=1))
    return groups, pairs


class Overlap(NamedTuple):
    """A row of a test set that lies in the training data, and where; `bits` in which their hashes differ."""

    row: int
    train_row: int
    kind: str  # exact or near
    bits: int
    likeness: float


def overlaps(workers: Workers, test: Scan, test_number: int, train: Scan, train_number: int) -> list[Overlap]:
    """Return the rows of a test set, source `test_number`, whose images lie in the training data, each with its best
    match: the same bytes, else the near duplicate whose pixels are the most alike."""
    usable = np.flatnonzero(train.states > 0)
    order = usable[np.argsort(train.digests[usable], kind="stable")]
    at = np.searchsorted(train.digests[order], test.digests)
    match = order[np.minimum(at, len(order) - 1)] if len(order) else np.zeros(len(test), np.int64)
    exact = (test.states > 0) & (train.digests[match] == test.digests) if len(order) else np.zeros(len(test), bool)
    found = {row: Overlap(row, int(match[row]), "exact", 0, 1.0) for row in np.flatnonzero(exact).tolist()}

    asked, held = np.flatnonzero((test.states == SEEN) & ~exact), np.flatnonzero(train.states == SEEN)
    for one, other in near_hashes(test.looks[asked], train.looks[held]):
        candidates = np.stack([asked[one], held[other]], axis=1)
        for pair in alike(workers, test_number, train_number, candidates, "overlap"):
            bits = int(np.bitwise_count(test.looks[pair.first] ^ train.looks[pair.second]))
            if pair.first not in found or found[pair.first].likeness < pair.likeness:
                found[pair.first] = Overlap(pair.first, pair.second, "near", bits, pair.likeness)
    return [found[row] for row in sorted(found)]
