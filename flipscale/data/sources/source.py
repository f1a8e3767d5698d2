"""What the loader asks of a source of image-text pairs, wherever they lie."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flipscale.data.faults import Fault


@dataclass(frozen=True)
class Sample:
    """One undecoded sample: `image` and each of `captions` as stored; `label` None where the source has none."""

    name: str
    image: bytes
    captions: tuple[bytes, ...]
    label: int | None = None

    @property
    def caption(self) -> bytes | None:
        """The first caption, None where there is none."""
        return self.captions[0] if self.captions else None


class Source(Protocol):
    """Samples by (shard, number). It holds no position: it can be copied to a worker at any time."""

    shard_sizes: list[int]
    faults: list[Fault]  # of whole shards

    def __len__(self) -> int: ...

    def read(self, shard: int, number: int) -> Sample:
        """Sample `number` of shard `shard`.

        Raises:
            BadSample: it cannot be used.
            OSError: it cannot be read now; the run stops, so that the order stays the same.
        """

    def fetch_ahead(self, shards: list[int]) -> None:
        """Asks for shards that will be read soon, the first ones first; does not wait."""

    def shard_name(self, shard: int) -> str:
        """What messages call shard `shard`."""

    def key(self, shard: int, number: int) -> str:
        """What messages call sample `number` of shard `shard`."""


def fingerprint(source: Source) -> int:
    """63 bits that stand for the sizes of a source's shards, on which the order of its samples depends."""
    digest = hashlib.blake2b(np.asarray(source.shard_sizes, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
