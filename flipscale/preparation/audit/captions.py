"""Figures of captions, counted in one pass and added up over worker processes."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flipscale.preparation.audit.words import WordCounts

# Longer captions than these are counted as so long.
LONGEST = {"characters": 2000, "words": 500, "tokens": 1000}
_PERCENTILES = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}


@dataclass
class Lengths:
    """A histogram of lengths, int64, with its sum."""

    counts: np.ndarray
    total: int = 0

    @classmethod
    def up_to(cls, longest: int) -> "Lengths":
        """Return an empty histogram of lengths up to `longest`."""
        return cls(np.zeros(longest + 1, dtype=np.int64))

    def add(self, length: int) -> None:
        """Count one length."""
        self.counts[min(length, len(self.counts) - 1)] += 1
        self.total += length

    def merge(self, other: "Lengths") -> None:
        """Add the counts of others."""
        self.counts += other.counts
        self.total += other.total

    def figures(self) -> dict[str, float]:
        """Return percentiles and the mean; of lengths above the longest, the longest."""
        cumulative = np.cumsum(self.counts)
        ranks = {name: max(1, int(np.ceil(share * cumulative[-1]))) for name, share in _PERCENTILES.items()}
        found = {name: float(np.searchsorted(cumulative, rank)) for name, rank in ranks.items()}
        return {**found, "mean": self.total / int(cumulative[-1])}


def _empty_lengths() -> dict[str, Lengths]:
    return {name: Lengths.up_to(longest) for name, longest in LONGEST.items()}


@dataclass
class CaptionCounts:
    """What is counted of captions; `sampled` are those whose languages are looked at."""

    lengths: dict[str, Lengths] = field(default_factory=_empty_lengths)
    words: WordCounts = field(default_factory=WordCounts)
    sampled: Counter[str] = field(default_factory=Counter)

    def add(self, caption: str, num_tokens: int | None, is_sampled: bool) -> None:
        """Count one caption."""
        self.lengths["characters"].add(len(caption))
        self.lengths["words"].add(len(caption.split()))
        if num_tokens is not None:
            self.lengths["tokens"].add(num_tokens)
        self.words.add(caption)
        if is_sampled:
            # The whole of a long one says no more of its language, and takes seconds.
            self.sampled[caption[: LONGEST["characters"]]] += 1

    def merge(self, other: "CaptionCounts") -> None:
        """Add the counts of other captions."""
        for name, lengths in other.lengths.items():
            self.lengths[name].merge(lengths)
        self.words.merge(other.words)
        self.sampled += other.sampled

    def length_figures(self) -> dict[str, dict[str, float]]:
        """Return the percentiles of each kind of length that was counted."""
        return {name: lengths.figures() for name, lengths in self.lengths.items() if lengths.counts.any()}

    def histogram(self) -> dict[str, list[float]]:
        """Return the edges and counts of at most 60 equal bins of the characters, up to the 99th percentile."""
        counts = self.lengths["characters"].counts
        last = int(np.searchsorted(np.cumsum(counts), 0.99 * counts.sum()))
        width = max(1, -(-(last + 1) // 60))
        bins: list[Any] = [int(counts[start : start + width].sum()) for start in range(0, last + 1, width)]
        return {"edges": [float(width * number) for number in range(len(bins) + 1)], "counts": bins}
