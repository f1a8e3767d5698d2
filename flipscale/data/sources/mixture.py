"""A fraction of a source, and several sources mixed by weight, with their order: pure functions of the position."""

from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np

from flipscale.data.order import GlobalOrder, Lanes, by_value
from flipscale.data.randomness import keyed_permutation, keyed_uniform
from flipscale.data.samples import Fault, Sample, Source
from flipscale.data.weights import SampleWeights
from flipscale.io.errors import UserError
from flipscale.recipe.data import DataRecipe

# In each stretch of this many positions, every source has the share of its weight, rounded to a sample. The stretch of
# a lane is shorter by the number of lanes, but every source has a few samples in it.
_STRETCH = 1 << 16
_LEAST_IN_STRETCH = 4
_LEAST_SHARE = 1e-4
# Independent of the run's seed, so that runs of all seeds have the same samples.
_SEED = 0
_PURPOSE = "fraction of the data"
# Number of shards whose chosen samples stay in memory: the blocks of 64 lanes and more, 40 kB for 10,000 samples.
_SHARDS_KEPT = 256


class _Derived(Source):
    """Samples of other sources under other numbers."""

    def read(self, shard: int, number: int) -> Sample:
        source, place = self._find(shard)
        return source.read(place, self._number(shard, number))

    def shard_name(self, shard: int) -> str:
        source, place = self._find(shard)
        return source.shard_name(place)

    def key(self, shard: int, number: int) -> str:
        source, place = self._find(shard)
        return source.key(place, self._number(shard, number))

    def drawn(self, shard: int) -> np.ndarray | None:
        source, place = self._find(shard)
        return source.drawn(place)

    def _find(self, shard: int) -> tuple[Source, int]:
        """Return the source of a shard, and the shard's number there."""
        raise NotImplementedError

    def _number(self, shard: int, number: int) -> int:
        """Return the number of a sample in its shard."""
        return number


class Subset(_Derived):
    """A fraction of a source's samples, the same for every seed. A smaller fraction lies inside a larger one.

    A shard of n samples keeps the first `fraction` * n of a keyed permutation. The number is rounded down or up by a
    draw keyed by the shard, so that the total is right even for small shards. Both depend only on the shard's place in
    the list: nothing has to be read, and a copy of the shards has the same subset. It costs 0.03 s for 231,350 shards,
    and 1 ms for a shard of 10,000 samples at its first read.

    Every shard keeps its part, so a subset is spread over the data as the whole is. Shards at URLs are fetched whole.
    """

    def __init__(self, source: Source, fraction: float, name: str):
        self.source = source
        self.faults: list[Fault] = source.faults
        sizes = np.asarray(source.shard_sizes, dtype=np.int64)
        rounding = keyed_uniform(_SEED, f"{_PURPOSE}: sizes", np.arange(len(sizes)), 1)[:, 0]
        self.shard_sizes: list[int] = np.minimum(sizes, (fraction * sizes + rounding).astype(np.int64)).tolist()
        if len(source) and not len(self):
            raise UserError(f"data.fraction {fraction:g} leaves none of {len(source):,} samples of {name}; raise it")
        self._chosen: OrderedDict[int, np.ndarray] = OrderedDict()

    def fetch_ahead(self, shards: list[int]) -> None:
        self.source.fetch_ahead(shards)

    def _find(self, shard: int) -> tuple[Source, int]:
        return self.source, shard

    def _number(self, shard: int, number: int) -> int:
        """Return the sample index in the whole shard, an increasing function of `number`."""
        if shard not in self._chosen:
            permuted = keyed_permutation(_SEED, f"{_PURPOSE}: samples", shard, self.source.shard_sizes[shard])
            self._chosen[shard] = np.sort(permuted[: self.shard_sizes[shard]]).astype(np.int32)
            if len(self._chosen) > _SHARDS_KEPT:
                self._chosen.popitem(last=False)
        self._chosen.move_to_end(shard)
        return int(self._chosen[shard][number])


class Mixture(_Derived):
    """The shards of several sources, one source after another. Raise UserError if a weight is less than a
    ten-thousandth of the sum, or a source is empty."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
            if weight < _LEAST_SHARE * sum(weights) or not weight > 0:
                raise UserError(
                    f"data.sources[{number}].weight is {weight} of {sum(weights)}; it must be positive and at least "
                    f"{_LEAST_SHARE:g} of the sum"
                )
            if not len(source):
                raise UserError(f"data.sources[{number}] is empty: 0 samples in {len(source.shard_sizes)} shards")
        self.sources = list(sources)
        self.shares = [Fraction(weight) for weight in weights]
        self.first_shards = [0, *accumulate(len(source.shard_sizes) for source in sources)]
        self.faults: list[Fault] = [fault for source in sources for fault in source.faults]
        self.shard_sizes = [size for source in sources for size in source.shard_sizes]

    @property
    def all_weights(self) -> list[SampleWeights]:
        return [weights for source in self.sources for weights in source.all_weights]

    @property
    def num_drawn(self) -> int:
        return sum(source.num_drawn for source in self.sources)

    def fetch_ahead(self, shards: list[int]) -> None:
        for source, first, last in zip(self.sources, self.first_shards[:-1], self.first_shards[1:], strict=True):
            source.fetch_ahead([shard - first for shard in shards if first <= shard < last])

    def _find(self, shard: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self.first_shards, shard, side="right")) - 1
        return self.sources[number], shard - self.first_shards[number]


class MixtureOrder:
    """A map from global positions to (shard, sample) of a mixture: a pure function of (seed, position).

    Every lane deals its positions to the sources. The n-th position that lane l of L deals to a source is position
    n * L + l of that source's own `GlobalOrder`, which has the same lanes. So each source has its own epochs, at the
    pace of its weight, and an epoch has every sample once. The lanes of a source end an epoch within a few samples of
    each other. The mixture as a whole has no epochs.

    Among the first p positions of a lane, each source has its share of p to within 2 samples a source. A stretch of a
    lane has 65,536 positions with a single lane, 1,024 with 64 lanes. It has the exact shares, rounded so that all
    lanes together have them too. In a stretch, each source is spread evenly, with keyed jitter. Because lanes deviate
    independently, 64 lanes together deviate by at most 20 samples (measured), for any length of the run.
    """

    def __init__(self, mixture: Mixture, seed: int, shards_per_block: int = 16, lanes: Lanes = Lanes()):  # noqa: B008
        self.seed = seed
        self.first_shards = mixture.first_shards
        own_lanes = Lanes(lanes.count, lanes.count)
        self.orders = [
            GlobalOrder(
                *(source.shard_sizes, seed, shards_per_block, f" of source {number}" if number else "", own_lanes),
                source.weights,
            )
            for number, source in enumerate(mixture.sources)
        ]
        # Small sources have a single lane. If all are small, so has the mixture.
        self.lanes = lanes if any(order.lanes.count > 1 for order in self.orders) else Lanes()
        total = sum(mixture.shares)
        rarest = int(_LEAST_IN_STRETCH * total / min(mixture.shares)) + 1
        self.stretch = min(_STRETCH, max(_STRETCH // self.lanes.count, rarest))
        # Fractions, because rounding errors would grow with the position.
        self.ends = [share / total for share in accumulate(mixture.shares)]
        self._deals: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def sources(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each position, and the position in that source's own order."""
        lanes, counts = self.lanes.split(np.asarray(positions, dtype=np.int64))
        stretches, offsets = np.divmod(counts, self.stretch)
        sources, places = np.empty_like(counts), np.empty_like(counts)
        for key, chosen in by_value(stretches * self.lanes.count + lanes):
            dealt, counted = self._deal(*divmod(key, self.lanes.count))
            sources[chosen], places[chosen] = dealt[offsets[chosen]], counted[offsets[chosen]]
        return sources, places * self.lanes.count + lanes

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mixture's shard and the sample index in the shard for each position; both int64."""
        sources, places = self.sources(positions)
        shards, samples = np.empty_like(sources), np.empty_like(sources)
        for number, chosen in by_value(sources):
            located, samples[chosen] = self.orders[number].locate(places[chosen])
            shards[chosen] = located + self.first_shards[number]
        return shards, samples

    def shards_ahead(self, positions: np.ndarray) -> list[int]:
        """Return the current and next shards of the lanes of `positions`, in each source."""
        lanes, counts = self.lanes.split(np.asarray(positions, dtype=np.int64))
        ahead: list[list[np.ndarray]] = [[] for _ in self.orders]
        for lane, chosen in by_value(lanes):
            firsts, lasts = (self._dealt(lane, int(count)) for count in (counts[chosen].min(), counts[chosen].max()))
            for places, first, last in zip(ahead, firsts, lasts, strict=True):
                places.append(np.arange(first, last + 1) * self.lanes.count + lane)
        return [
            self.first_shards[number] + shard
            for number, order in enumerate(self.orders)
            for shard in order.shards_ahead(np.concatenate(ahead[number]))
        ]

    def _dealt(self, lane: int, count: int) -> list[int]:
        """Return the number of a lane's first `count` positions in each source."""
        stretch, offset = divmod(count, self.stretch)
        dealt, _ = self._deal(stretch, lane)
        within = np.bincount(dealt[:offset], minlength=len(self.orders))
        return [before + more for before, more in zip(self._before(lane, stretch), within.tolist(), strict=True)]

    def _before(self, lane: int, stretch: int) -> list[int]:
        """Return the number of positions before a stretch of a lane in each source."""
        # Each lane rounds at its own offset, so that the sum over lanes is the rounded whole.
        half = Fraction(2 * lane + 1, 2 * self.lanes.count)
        ends = [0, *(int(end * stretch * self.stretch + half) for end in self.ends)]
        return [last - first for first, last in pairwise(ends)]

    def _deal(self, stretch: int, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each position in a lane's stretch, and the number of its earlier positions there."""
        key = (stretch, lane)
        if key not in self._deals:
            before, after = self._before(lane, stretch), self._before(lane, stretch + 1)
            counts = [last - first for first, last in zip(before, after, strict=True)]
            dealt = np.repeat(np.arange(len(counts)), counts)
            counted = np.concatenate([np.arange(first, last) for first, last in zip(before, after, strict=True)])
            # The stretch is cut into n parts for the n samples of a source. Sample i is at a keyed place in part i.
            purpose = f"mixture of lane {lane}" if lane else "mixture"
            jitter = keyed_uniform(self.seed, purpose, np.array([stretch]), self.stretch)[0]
            within = np.concatenate([np.arange(count) / max(count, 1) for count in counts])
            width = np.repeat([1 / max(count, 1) for count in counts], counts)
            order = np.argsort(within + jitter * width, kind="stable")
            self._deals[key] = (dealt[order], counted[order])
            if len(self._deals) > 2 * self.lanes.count:
                self._deals.popitem(last=False)
        self._deals.move_to_end(key)
        return self._deals[key]


def order_of(source: Source, seed: int, recipe: DataRecipe) -> GlobalOrder | MixtureOrder:
    """Return the global order of a source's samples."""
    lanes = Lanes(recipe.num_lanes, recipe.global_batch_size)
    if isinstance(source, Mixture):
        return MixtureOrder(source, seed, recipe.shards_per_block, lanes)
    return GlobalOrder(source.shard_sizes, seed, recipe.shards_per_block, lanes=lanes, weights=source.weights)
