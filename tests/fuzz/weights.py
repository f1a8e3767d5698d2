"""One of the three files in a folder of sampling weights: its first byte says which; the others are good."""

import functools
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from flipscale.data.order import GlobalOrder, Lanes
from flipscale.data.samples import Source
from flipscale.data.sampling_weights import ABOUT, SUMS, WEIGHTS
from flipscale.data.sources.opening import open_weights
from flipscale.preparation.weighing import WeightOptions, make_weights

_FILES = (ABOUT, SUMS, WEIGHTS)


class _Three(Source):
    """Twelve samples in three shards."""

    shard_sizes, faults = [5, 0, 7], []

    def shard_name(self, shard: int) -> str:
        return f"{shard}.tar"


@functools.cache
def _made() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/scores.npy", np.arange(12))
        make_weights(_Three(), "three", WeightOptions(scores=Path(folder, "scores.npy")), Path(folder), 1)
        return [Path(folder, name).read_bytes() for name in _FILES]


def seeds() -> list[bytes]:
    """The good files."""
    return [bytes([number]) + content for number, content in enumerate(_made())]


def attack(data: bytes, folder: Path) -> None:
    """Draw two epochs. Each has its length and no sample of weight 0; or the folder is refused."""
    changed = (data[:1] or b"\0")[0] % 3
    for number, (name, content) in enumerate(zip(_FILES, _made(), strict=True)):
        (folder / name).write_bytes(data[1:] if number == changed else content)
    with suppress(ValueError, OSError):
        source = _Three()
        source.weights = open_weights("data.weights", str(folder), source, "three")
        assert str(source.weights.composition)
        order = GlobalOrder(source.shard_sizes, 0, 1, lanes=Lanes(2, 4), weights=source.weights)
        shards, numbers = order.locate(np.arange(2 * order.num_samples))
        for shard in (0, 2):
            assert (source.weights.of_shard(shard)[numbers[shards == shard]] > 0).all()
