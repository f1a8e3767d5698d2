"""The interface of a source of image-text pairs."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from flipscale.data.faults import BadSample, Fault

# What is read of a sample: its image, 8192 x 8192 pixels without compression, and each text beside it.
MAX_IMAGE_BYTES = 1 << 28
MAX_TEXT_BYTES = 1 << 22


class OversizedSample(BadSample):
    """A file of the sample is too large to be read."""

    cause = "sample_too_large"


def check_bytes(size: int, most: int, what: str) -> None:
    """Raise unless a file of a sample has at most `most` bytes.

    Raises:
        OversizedSample: it has more.
    """
    if size > most:
        raise OversizedSample(f"{what} of {size:,} bytes; at most {most:,} are read")


def _no_array() -> None:
    """Read the array of a sample that has none."""


@dataclass(frozen=True)
class Sample:
    """One undecoded sample: `image` and `captions` as stored, and `label`, None if the source has none. `read_array`
    reads the array beside them, None if there is none, and raises as `TarSource.read_array`."""

    name: str
    image: bytes
    captions: tuple[bytes, ...]
    label: int | None = None
    read_array: Callable[[], np.ndarray | None] = field(default=_no_array, compare=False, repr=False)

    @property
    def caption(self) -> bytes | None:
        """The first caption, None if there is none."""
        return self.captions[0] if self.captions else None


class Source(Protocol):
    """Samples by (shard, number). It keeps no position, so it can be copied to a worker at any time."""

    shard_sizes: list[int]
    faults: list[Fault]  # of whole shards

    def __len__(self) -> int: ...

    def read(self, shard: int, number: int) -> Sample:
        """Return sample `number` of shard `shard`.

        Raises:
            BadSample: it cannot be used; another sample replaces it.
            OSError: it cannot be read now; the run stops, because a replacement would change the order.
        """

    def fetch_ahead(self, shards: list[int]) -> None:
        """Start fetching shards that will be read soon, in this order, and do not wait for them."""

    def shard_name(self, shard: int) -> str:
        """Return the name of shard `shard` in messages."""

    def key(self, shard: int, number: int) -> str:
        """Return the name of sample `number` of shard `shard` in messages."""


def shard_sizes_digest(source: Source) -> int:
    """Return a 63-bit digest of the sizes of a source's shards, which its order depends on; contents do not count."""
    digest = hashlib.blake2b(np.asarray(source.shard_sizes, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
