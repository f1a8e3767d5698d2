"""A fraction of a source's samples, the same for every seed; a smaller fraction lies inside a larger one."""

from collections import OrderedDict

import numpy as np

from flipscale.data.randomness import keyed_permutation, keyed_uniform
from flipscale.data.samples import Fault, Sample, Source
from flipscale.io.errors import UserError

# The seed of no run, so that runs of all seeds have the same samples.
_SEED = 0
_PURPOSE = "fraction of the data"
# Shards whose chosen samples are kept: those of the blocks of 64 lanes and more, 40 kB for 10,000 samples.
_SHARDS_KEPT = 256


class Subset:
    """The samples of a source that a keyed permutation of each shard has first.

    Of a shard of n samples there are `fraction` * n, rounded down or up by a number that is keyed by the shard, so that
    the whole has its share also where shards are small. Both are functions of the shard's place in the list, like the
    order of samples: nothing has to be read, and a copy of the shards elsewhere has the same subset. It costs 0.03 s
    for 231,350 shards, and 1 ms for a shard of 10,000 samples when it is first read.

    Every shard has its part, so that a subset is spread over the data as the whole is. From a URL, shards are therefore
    fetched whole.

    Args:
        fraction: above 0, at most 1.
        name: of the source, for the message.

    Raises:
        ValueError: nothing is left.
    """

    def __init__(self, source: Source, fraction: float, name: str):
        self.source = source
        self.faults: list[Fault] = source.faults
        sizes = np.asarray(source.shard_sizes, dtype=np.int64)
        rounding = keyed_uniform(_SEED, f"{_PURPOSE}: sizes", np.arange(len(sizes)), 1)[:, 0]
        self.shard_sizes: list[int] = np.minimum(sizes, (fraction * sizes + rounding).astype(np.int64)).tolist()
        if len(source) and not len(self):
            raise UserError(
                f"data.fraction {fraction:g} leaves none of the {len(source):,} samples of {name}; use a larger one"
            )
        self._chosen: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def read(self, shard: int, number: int) -> Sample:
        """Do as `Source.read`."""
        return self.source.read(shard, self.number_in_source(shard, number))

    def shard_name(self, shard: int) -> str:
        """Do as `Source.shard_name`."""
        return self.source.shard_name(shard)

    def key(self, shard: int, number: int) -> str:
        """Do as `Source.key`."""
        return self.source.key(shard, self.number_in_source(shard, number))

    def fetch_ahead(self, shards: list[int]) -> None:
        """Do as `Source.fetch_ahead`."""
        self.source.fetch_ahead(shards)

    def number_in_source(self, shard: int, number: int) -> int:
        """Return the number that sample `number` of shard `shard` has in the whole shard. They rise."""
        if shard not in self._chosen:
            permuted = keyed_permutation(_SEED, f"{_PURPOSE}: samples", shard, self.source.shard_sizes[shard])
            self._chosen[shard] = np.sort(permuted[: self.shard_sizes[shard]]).astype(np.int32)
            if len(self._chosen) > _SHARDS_KEPT:
                self._chosen.popitem(last=False)
        self._chosen.move_to_end(shard)
        return int(self._chosen[shard][number])
