"""Sampling weights: how often an epoch visits each sample. `flipscale prepare weights` writes them.

A folder has `weights.npy`, float32 `(samples,)` in the manifest's order, and in `shards.npy` their sum in each shard,
float64 `(shards,)`. A weight is the expected number of visits in an epoch. The positive weights have the mean 1, so an
epoch is as long as their number. `weights.json` names the shards and has the composition of an epoch.

A process keeps a shard's sum in memory, and reads the weights of the shards that it draws from.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flipscale.data.randomness import keyed_permutation, keyed_uniform
from flipscale.io.errors import UserError

WEIGHTS, SUMS, ABOUT = "weights.npy", "shards.npy", "weights.json"
# Offsets of an epoch lie in the middle of cells of this grid. So sums of whole weights and an offset are exact, and a
# rounding error of another weight does not reach a whole number.
_CELLS = 1 << 16


@dataclass(frozen=True)
class Composition:
    """The samples of an epoch."""

    samples: int  # of the source
    never: int  # samples of weight 0
    visits: int  # length of an epoch
    distinct: float  # expected number of different samples
    heaviest_share: float  # share of the visits of the heaviest hundredth of the drawn samples
    most_visits: float  # expected visits of the heaviest sample

    def __str__(self) -> str:
        return (
            f"{self.never:,} of {self.samples:,} samples are never drawn; an epoch of {self.visits:,} visits has "
            f"{self.distinct:,.0f} different ones; the heaviest 1 % get {self.heaviest_share:.1%}, one sample at most "
            f"{self.most_visits:,.1f} visits"
        )


class SampleWeights:
    """The weights of a source, opened by `open_weights`.

    A draw is systematic. The weights lie end to end on a line, and an epoch's visits at a distance of 1 on it, from a
    keyed offset on. So an epoch has its exact length. A sample of weight w has floor(w) or ceil(w) visits, and w on
    average. Each epoch permutes the samples of a shard on the line, so that neighbours are drawn independently.

    Args:
        name: name of the field in the recipe.
        sizes: number of samples of each shard.
        about: content of `weights.json`.
    """

    def __init__(self, name: str, folder: Path, sizes: list[int], about: dict[str, Any]):
        self.name, self.folder, self.digest = name, folder, str(about["digest"])
        self.composition = Composition(**about["composition"])
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        # Mapped for their headers: a mapped file that is cut short later would kill the process.
        weights, sums = (np.lib.format.open_memmap(folder / name, mode="r") for name in (WEIGHTS, SUMS))
        shapes = [(weights.dtype, *weights.shape), (sums.dtype, *sums.shape)]
        if shapes != [(np.dtype("<f4"), self.starts[-1]), (np.dtype("<f8"), len(sizes))]:
            raise ValueError("other lengths or types")
        self.sums = np.array(sums)
        visits, samples = self.composition.visits, self.composition.samples
        is_whole = 0 < visits <= samples == len(weights) and abs(total(self.sums) - visits) <= 1e-3 * visits
        is_whole &= all(type(number) in (int, float) for number in vars(self.composition).values())
        if not is_whole or type(visits) is not int or (self.sums < 0).any():
            raise ValueError("other sums")
        self._offset, self._scale = weights.offset, visits / total(self.sums)

    def of_shard(self, shard: int) -> np.ndarray:
        """Return the weights of a shard, float64 `(samples,)`. Raise UserError if the file has changed."""
        first, last = self.starts[shard : shard + 2].tolist()
        stored = np.fromfile(self.folder / WEIGHTS, "<f4", last - first, offset=self._offset + 4 * first)
        weights = stored.astype(np.float64)
        if len(weights) < last - first or total(weights) != self.sums[shard] or (weights < 0).any():
            raise UserError(
                f"{self.name} {str(self.folder)!r}: {WEIGHTS} has changed at shard {shard}; make it anew with "
                "`flipscale prepare weights`"
            )
        return weights

    def draw_shards(self, seed: int, purpose: str, epoch: int, shards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of visits of each of `shards`, an epoch's order, and the place of the first on its line:
        int64 and float64 `(shards,)`. The line of a shard is as long as its expected visits."""
        cell = np.floor(keyed_uniform(seed, f"offset{purpose}", np.array([epoch]), 1)[0, 0] * _CELLS)
        offset = (cell + 0.5) / _CELLS
        ends = np.concatenate([[0.0], np.cumsum(self.sums[shards])])
        ends *= self.composition.visits / ends[-1]
        before = np.ceil(ends - offset).astype(np.int64)
        return np.diff(before), before[:-1] + offset - ends[:-1]

    def draw_samples(self, seed: int, purpose: str, epoch: int, shard: int, first: float, count: int) -> np.ndarray:
        """Return the sample of each of a shard's `count` visits in ascending order, int64, see `draw_shards`."""
        weights = self.of_shard(shard)
        permuted = keyed_permutation(seed, f"line of epoch {epoch}{purpose}", shard, len(weights))
        permuted = permuted[weights[permuted] > 0.0]
        ends = np.cumsum(weights[permuted]) * self._scale
        drawn = np.searchsorted(ends, first + np.arange(count), side="right")
        return np.sort(permuted[np.minimum(drawn, len(permuted) - 1)])


def total(numbers: np.ndarray) -> float:
    """Return the sum, added from first to last: numpy's own sum depends on the machine in its last bits."""
    return float(np.cumsum(numbers)[-1]) if len(numbers) else 0.0
