"""The global order: the sample at each global position, and the lanes that share the shards out to nodes.

`GlobalOrder` is the order of one source, `MixtureOrder` the order of several sources that are mixed by weight.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from flipscale.data.randomness import keyed_permutation, keyed_uniform
from flipscale.data.samples import Source
from flipscale.data.sampling_weights import SampleWeights
from flipscale.io.errors import UserError
from flipscale.recipe.data import DataRecipe

# Epochs in memory: the current, the next, and the one after, which the end of a small set nears.
_EPOCHS_KEPT = 3
# In each stretch of this many positions, every source has the share of its weight, rounded to a sample. The stretch of
# a lane is shorter by the number of lanes, but every source has a few samples in it.
_STRETCH = 1 << 16
_LEAST_IN_STRETCH = 4


@dataclass(frozen=True)
class Lanes:
    """Equal parts of every global batch, whatever the number of processes: lane l is the l-th of `count` equal runs.

    A process also takes a run of every batch. Where the numbers divide, it has whole lanes or a part of one lane.
    """

    count: int = 1
    batch_size: int = 1

    @classmethod
    def of(cls, recipe: DataRecipe) -> "Lanes":
        return cls(recipe.num_lanes, recipe.global_batch_size)

    @property
    def width(self) -> int:
        """Pairs of every batch in one lane."""
        return self.batch_size // self.count

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the lane of each position, and the number of earlier positions in that lane; both int64."""
        batches, offsets = np.divmod(positions, self.batch_size)
        lanes, within = np.divmod(offsets, self.width)
        return lanes, batches * self.width + within

    def before(self, position: int) -> np.ndarray:
        """Return the number of the first `position` positions in each lane: int64 `(count,)`."""
        batches, offset = divmod(position, self.batch_size)
        return batches * self.width + np.clip(offset - np.arange(self.count) * self.width, 0, self.width)

    def over(self, num_shards: int, shards_per_block: int) -> tuple["Lanes", int]:
        """Return the lanes of an order of `num_shards` shards, and the number of shards that each reads at a time.

        All lanes together read `shards_per_block` at a time, at least one each. If that is all shards, one lane reads
        them.
        """
        of_each = -(-shards_per_block // self.count)
        return (self, of_each) if of_each * self.count < num_shards else (Lanes(), num_shards)


def by_value(values: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Return each distinct value in ascending order, with its indices."""
    order = np.argsort(values, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(values[order])) + 1)
    return [(int(values[group[0]]), group) for group in groups if len(group)]


class _Epoch(NamedTuple):
    """The sequence of an epoch's samples, shard by shard. A place is an index in this sequence."""

    shards: np.ndarray  # shard numbers in the epoch's order
    shard_starts: np.ndarray  # first place of each shard
    lane_starts: np.ndarray  # first place of each lane, and the end
    block_starts: np.ndarray  # first place of each block, and the end; no block is empty
    passed: np.ndarray  # number of positions in each lane before the epoch
    first_visits: np.ndarray  # with weights, the place of each shard's first visit on the shard's line

    def block_of(self, places: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.block_starts, places, side="right") - 1

    def shards_of(self, block: int) -> list[int]:
        start, end = self.block_starts[block : block + 2]
        first = np.searchsorted(self.shard_starts, start, side="right") - 1
        return self.shards[first : np.searchsorted(self.shard_starts, end, side="left")].tolist()

    def shards_after(self, block: int, lane: int) -> list[int] | None:
        """Return the shards of the next block of a lane; None after the last block."""
        return self.shards_of(block + 1) if self.block_starts[block + 1] < self.lane_starts[lane + 1] else None

    def first_shards(self, lane: int) -> list[int]:
        """Return the shards of the first block of a lane; none if the lane has no sample in the epoch."""
        start, end = self.lane_starts[lane : lane + 2]
        return self.shards_of(int(self.block_of(start))) if start < end else []


class GlobalOrder:
    """A map from global positions to (shard, sample): a pure function of (seed, position).

    Step s of batch size B is positions [s*B, (s+1)*B), whatever the number of processes and workers, so the state to
    resume from is one number. An epoch visits every sample once, or draws its visits by weight. Its shards are
    permuted, and each lane takes a run of the resulting sequence, as long as the lane has positions in the epoch. A
    lane cuts its run into blocks of `shards_per_block / lanes` shards, at least one, and permutes the samples of each
    block. So a node reads only the shards of its own lanes: with 10,000 shards and 32 nodes, 1.005/32 of the bytes. If
    all lanes together read all shards at a time, the whole set is one block, a uniform shuffle.

    Quality: a sample can land anywhere in the epoch. Measured at 400 M samples in shards of 10,000: it moves by 0.34 of
    the epoch on average, a uniform shuffle by a third. With 64 lanes, a batch of 16,384 comes from 66 shards, and two
    samples of one shard share a batch one time in 40. With one lane, it comes from 16 shards, and they share a batch
    one time in ten. If the samples of a shard are alike (one site, one query), raise `shards_per_block`.

    Cost: 4 bytes a sample for the last two blocks of each lane, 5 MB for 64 lanes of usual shards. A block is permuted
    once, in 0.6 ms. An epoch of 231,350 shards takes 0.14 s and 6 MB. Reading needs one open file for each shard of a
    block and one read for each sample.

    With weights, a shard has a place for each of its visits in the epoch. The visits of a sample are spread evenly over
    their block, so that it rarely meets itself in a batch. Equal weights give the order without weights. A block in
    memory takes 8 bytes a visit. The weights of a shard are read when the epoch reaches it.

    Args:
        shards_per_block: number of shards that are shuffled together, over all lanes.
        name: name of a mixture's source, which makes its order differ from the others.
        weights: sampling weights; None visits every sample once an epoch.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        seed: int,
        shards_per_block: int = 16,
        name: str = "",
        lanes: Lanes = Lanes(),
        weights: SampleWeights | None = None,
    ):
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.weights = weights
        # Positions of an epoch.
        self.num_samples = int(self.shard_sizes.sum()) if weights is None else weights.composition.visits
        if self.num_samples == 0:
            raise UserError(f"the data set is empty: 0 samples in {len(self.shard_sizes)} shards")
        self.seed = seed
        self.name = name
        self.lanes, self.shards_of_a_lane = lanes.over(len(self.shard_sizes), shards_per_block)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._shuffled: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lanes_read: set[int] = set()

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard and the sample index in the shard for each position (any order); both int64."""
        positions = np.asarray(positions, dtype=np.int64)
        shards, samples = np.empty_like(positions), np.empty_like(positions)
        for number, chosen in by_value(positions // self.num_samples):
            epoch = self._epoch(number)
            lanes, places = self._places(epoch, positions[chosen])
            self._lanes_read.update(np.unique(lanes).tolist())
            drawn, visited = np.empty_like(places), np.empty_like(places)
            for block, members in by_value(epoch.block_of(places)):
                start = epoch.block_starts[block]
                within = self._block(number, epoch, block)[:, places[members] - start]
                drawn[members], visited[members] = start + within[0], within[-1]
            held_by = np.searchsorted(epoch.shard_starts, drawn, side="right") - 1
            shards[chosen] = epoch.shards[held_by]
            samples[chosen] = drawn - epoch.shard_starts[held_by] if self.weights is None else visited
        return shards, samples

    def shards_ahead(self, positions: np.ndarray) -> list[int]:
        """Return the shards of the current blocks of `positions`, then the shards of the next block of each lane.

        Shards of other lanes are not included.
        """
        positions = np.asarray(positions, dtype=np.int64)
        now: list[int] = []
        following: dict[int, list[int]] = {}
        for number, chosen in by_value(positions // self.num_samples):
            epoch = self._epoch(number)
            lanes, places = self._places(epoch, positions[chosen])
            blocks = epoch.block_of(places)
            now += [shard for block in np.unique(blocks).tolist() for shard in epoch.shards_of(block)]
            for lane, members in by_value(lanes):
                after = epoch.shards_after(int(blocks[members].max()), lane)
                following[lane] = self._epoch(number + 1).first_shards(lane) if after is None else after
        return list(dict.fromkeys([*now, *(shard for shards in following.values() for shard in shards)]))

    def _places(self, epoch: _Epoch, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the lane of each position, and its place in the epoch before blocks are permuted."""
        lanes, counts = self.lanes.split(positions)
        return lanes, epoch.lane_starts[lanes] + counts - epoch.passed[lanes]

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            self._epochs[number] = self._make_epoch(number)
            if len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(number)
        return self._epochs[number]

    def _make_epoch(self, number: int) -> _Epoch:
        shards = keyed_permutation(self.seed, f"shards{self.name}", number, len(self.shard_sizes))
        sizes, first_visits = self.shard_sizes[shards], np.empty(0)
        if self.weights is not None:
            visits, first_visits = self.weights.draw_shards(self.seed, self.name, number, shards)
            # Shards without visits are not fetched. Empty shards stay, because a block counts them without weights too.
            kept = (visits > 0) | (sizes == 0)
            shards, sizes, first_visits = shards[kept], visits[kept], first_visits[kept]
        shard_starts = np.concatenate([[0], np.cumsum(sizes)])[:-1]
        passed = self.lanes.before(number * self.num_samples)
        lane_starts = np.concatenate([[0], np.cumsum(self.lanes.before((number + 1) * self.num_samples) - passed)])
        first = np.searchsorted(shard_starts, lane_starts[:-1], side="right") - 1
        # A lane that starts at the start of a shard also counts the empty shards that end there.
        first = np.minimum(first, np.searchsorted(shard_starts, lane_starts[:-1], side="left"))
        last = np.searchsorted(shard_starts, lane_starts[1:], side="left")
        cuts = [
            shard_starts[start + self.shards_of_a_lane : end : self.shards_of_a_lane]
            for start, end in zip(first.tolist(), last.tolist(), strict=True)
        ]
        block_starts = np.unique(np.concatenate([lane_starts, *cuts]))
        return _Epoch(shards, shard_starts, lane_starts, block_starts, passed, first_visits)

    def _block(self, number: int, epoch: _Epoch, block: int) -> np.ndarray:
        """Return the permutation of a block, int32 `(1, places)`. With weights, also the samples: `(2, places)`.

        Two blocks a lane stay in memory.
        """
        key = (number, block)
        if key not in self._shuffled:
            start, end = epoch.block_starts[block : block + 2].tolist()
            purpose = f"samples of epoch {number}{self.name}"
            if self.weights is None:
                blocks = keyed_permutation(self.seed, purpose, start, end - start)[None]
            else:
                visited, earlier, visits = self._visits(self.weights, number, epoch, start, end)
                draws = keyed_uniform(self.seed, purpose, np.array([start]), end - start)[0]
                shuffled = np.argsort((earlier + draws) / visits, kind="stable")
                blocks = np.stack([shuffled, visited[shuffled]])
            self._shuffled[key] = blocks.astype(np.int32)
            while len(self._shuffled) > 2 * len(self._lanes_read):
                self._shuffled.popitem(last=False)
        self._shuffled.move_to_end(key)
        return self._shuffled[key]

    def _visits(self, weights: SampleWeights, number: int, epoch: _Epoch, start: int, end: int) -> np.ndarray:
        """Return the visits of the places in [start, end) before the block is permuted, int64 `(3, places)`.

        Each has its sample, and the numbers of earlier and of all visits of the sample in this range.
        """
        first = int(np.searchsorted(epoch.shard_starts, start, side="right")) - 1
        last = int(np.searchsorted(epoch.shard_starts, end, side="left"))
        begins = np.append(epoch.shard_starts, self.num_samples)[first : last + 1].tolist()
        parts = []
        for held_by, (begin, stop) in enumerate(pairwise(begins), first):
            visit = (int(epoch.shards[held_by]), epoch.first_visits[held_by], stop - begin)
            drawn = weights.draw_samples(self.seed, self.name, number, *visit)
            parts.append(drawn[max(start - begin, 0) : end - begin])
        visited = np.concatenate(parts)
        is_new = np.concatenate([np.diff(part, prepend=-1) != 0 for part in parts])
        runs, firsts = np.cumsum(is_new) - 1, np.flatnonzero(is_new)
        counts = np.diff(np.append(firsts, len(visited)))
        return np.stack([visited, np.arange(len(visited)) - firsts[runs], counts[runs]])


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

    def __init__(self, mixture: Source, seed: int, shards_per_block: int = 16, lanes: Lanes = Lanes()):
        self.seed = seed
        self.first_shards = [0, *accumulate(len(part.shard_sizes) for part in mixture.parts)]
        own_lanes = Lanes(lanes.count, lanes.count)
        self.orders = [
            GlobalOrder(
                *(source.shard_sizes, seed, shards_per_block, f" of source {number}" if number else "", own_lanes),
                source.weights,
            )
            for number, source in enumerate(mixture.parts)
        ]
        # Small sources have a single lane. If all are small, so has the mixture.
        self.lanes = lanes if any(order.lanes.count > 1 for order in self.orders) else Lanes()
        # Fractions, because rounding errors would grow with the position.
        shares = [Fraction(share) for share in mixture.shares]
        total = sum(shares)
        rarest = int(_LEAST_IN_STRETCH * total / min(shares)) + 1
        self.stretch = min(_STRETCH, max(_STRETCH // self.lanes.count, rarest))
        self.ends = [end / total for end in accumulate(shares)]
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
    lanes = Lanes.of(recipe)
    if source.parts:
        return MixtureOrder(source, seed, recipe.shards_per_block, lanes)
    return GlobalOrder(source.shard_sizes, seed, recipe.shards_per_block, lanes=lanes, weights=source.weights)
