"""Several sources mixed by weight. Which source a position belongs to is a pure function of the position."""

from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np

from flipscale.data.faults import Fault
from flipscale.data.order import GlobalOrder
from flipscale.data.randomness import keyed_uniform
from flipscale.data.sources.source import Sample, Source

# In each stretch of so many positions, every source has its weight's share, rounded to a sample.
_STRETCH = 1 << 16
_LEAST_SHARE = 1e-4


class Mixture:
    """The shards of several sources, one source after another, and the weight of each source.

    Args:
        weights: relative weights; their sum does not matter.

    Raises:
        ValueError: a weight is not positive or less than a ten-thousandth of the sum, or a source is empty.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
            if weight < _LEAST_SHARE * sum(weights) or not weight > 0:
                raise ValueError(
                    f"data.sources[{number}].weight is {weight} of {sum(weights)}; it must be positive and at least "
                    f"{_LEAST_SHARE:g} of the sum"
                )
            if not len(source):
                raise ValueError(f"data.sources[{number}] is empty: 0 samples in {len(source.shard_sizes)} shards")
        self.sources = list(sources)
        self.weights = [Fraction(weight) for weight in weights]
        self.first_shards = [0, *accumulate(len(source.shard_sizes) for source in sources)]
        self.faults: list[Fault] = [fault for source in sources for fault in source.faults]
        self.shard_sizes = [size for source in sources for size in source.shard_sizes]

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def read(self, shard: int, number: int) -> Sample:
        """Do as `Source.read`."""
        source, shard = self._find(shard)
        return source.read(shard, number)

    def shard_name(self, shard: int) -> str:
        """Do as `Source.shard_name`."""
        source, shard = self._find(shard)
        return source.shard_name(shard)

    def key(self, shard: int, number: int) -> str:
        """Do as `Source.key`."""
        source, shard = self._find(shard)
        return source.key(shard, number)

    def fetch_ahead(self, shards: list[int]) -> None:
        """Do as `Source.fetch_ahead`."""
        for source, first, last in zip(self.sources, self.first_shards[:-1], self.first_shards[1:], strict=True):
            source.fetch_ahead([shard - first for shard in shards if first <= shard < last])

    def _find(self, shard: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self.first_shards, shard, side="right")) - 1
        return self.sources[number], shard - self.first_shards[number]


class MixtureOrder:
    """A map from global positions to (shard, sample) of a mixture: a pure function of (seed, position).

    Each position belongs to one source. The n-th position of a source gets the n-th sample of that source's own
    `GlobalOrder`. So each source has epochs of its own, at the pace of its weight, and the mixture as a whole has none.

    Among the first p positions, a source has its share of p to within 2 samples for each source. Every 65,536 positions
    have the exact shares (rounded), and within them each source is spread evenly, with keyed jitter.
    """

    def __init__(self, mixture: Mixture, seed: int, shards_per_block: int):
        self.seed = seed
        total = sum(mixture.weights)
        # Fractions, because rounding errors would grow with the position.
        self.ends = [share / total for share in accumulate(mixture.weights)]
        self.first_shards = mixture.first_shards
        self.orders = [
            GlobalOrder(source.shard_sizes, seed, shards_per_block, name=f" of source {number}" if number else "")
            for number, source in enumerate(mixture.sources)
        ]
        self._stretches: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def sources(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each of `positions`, and how many earlier positions belong to the same source."""
        positions = np.asarray(positions, dtype=np.int64)
        stretches, offsets = np.divmod(positions, _STRETCH)
        sources, places = np.empty_like(positions), np.empty_like(positions)
        for stretch in np.unique(stretches):
            chosen = stretches == stretch
            dealt, counted = self._stretch(int(stretch))
            sources[chosen], places[chosen] = dealt[offsets[chosen]], counted[offsets[chosen]]
        return sources, places

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mixture's shard, and the number in it, of the sample at each of `positions`; all are int64."""
        sources, places = self.sources(positions)
        shards, samples = np.empty_like(sources), np.empty_like(sources)
        for number in np.unique(sources):
            chosen = sources == number
            located, samples[chosen] = self.orders[number].locate(places[chosen])
            shards[chosen] = located + self.first_shards[number]
        return shards, samples

    def shards_ahead(self, position: int) -> list[int]:
        """Return the shards that are read from `position` on: of each source, its current block and the next one."""
        return [
            self.first_shards[number] + shard
            for number, order in enumerate(self.orders)
            for shard in order.shards_ahead(self._dealt(position, number))
        ]

    def _dealt(self, position: int, number: int) -> int:
        """Return how many of the first `position` positions belong to source `number`."""
        stretch, offset = divmod(position, _STRETCH)
        dealt, _ = self._stretch(stretch)
        return self._before(stretch)[number] + int((dealt[:offset] == number).sum())

    def _before(self, stretch: int) -> list[int]:
        """Return how many positions before a stretch belong to each source."""
        ends = [0, *(int(end * stretch * _STRETCH + Fraction(1, 2)) for end in self.ends)]
        return [last - first for first, last in pairwise(ends)]

    def _stretch(self, stretch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each position of a stretch, and how many earlier positions have the same source."""
        if stretch not in self._stretches:
            before, after = self._before(stretch), self._before(stretch + 1)
            counts = [last - first for first, last in zip(before, after, strict=True)]
            dealt = np.repeat(np.arange(len(counts)), counts)
            counted = np.concatenate([np.arange(first, last) for first, last in zip(before, after, strict=True)])
            # Cut the stretch into n parts for the n samples of a source: the i-th falls at a keyed place of part i.
            jitter = keyed_uniform(self.seed, "mixture", np.array([stretch]), _STRETCH)[0]
            within = np.concatenate([np.arange(count) / count for count in counts])
            width = np.repeat([1 / count for count in counts], counts)
            order = np.argsort(within + jitter * width, kind="stable")
            self._stretches[stretch] = (dealt[order], counted[order])
            if len(self._stretches) > 2:
                self._stretches.popitem(last=False)
        return self._stretches[stretch]


def order_of(source: Source, seed: int, shards_per_block: int) -> GlobalOrder | MixtureOrder:
    """Return the global order of a source's samples."""
    if isinstance(source, Mixture):
        return MixtureOrder(source, seed, shards_per_block)
    return GlobalOrder(source.shard_sizes, seed, shards_per_block)
