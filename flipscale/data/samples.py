"""Samples, the interface of their sources, the faults of a sample, and the choice of its replacement."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ContextDecorator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flipscale.data.sampling_weights import SampleWeights
from flipscale.io.errors import UserError

# Limits of a sample's files: an image of 8192 x 8192 pixels without compression, and each text.
MAX_IMAGE_BYTES = 1 << 28
MAX_TEXT_BYTES = 1 << 22
_TRIED_IN_SHARD, _SHARDS_TRIED = 16, 16
_LONGEST_REASON = 200  # characters, because some libraries quote their input


class BadSample(UserError):
    """A sample that cannot be used. It is counted under `cause`; the message has the details."""

    cause = "bad_sample"

    def __init__(self, detail: str, cause: str | None = None):
        super().__init__(detail)
        self.cause = cause or self.cause


class MissingCaption(BadSample):
    """The sample has no caption, or a blank caption."""

    cause = "missing_caption"


class UndecodableCaption(BadSample):
    """The caption is not UTF-8, or its JSON is damaged."""

    cause = "undecodable_caption"


def check_bytes(size: int, most: int, what: str) -> None:
    if size > most:
        raise BadSample(f"{what} of {size:,} bytes; at most {most:,} are read", "sample_too_large")


class wrap_errors(ContextDecorator):
    """Turn any error of a library about one sample into a BadSample of `kind`, so that no sample ends a run.

    A panic in Rust is a BaseException; only requests to stop Python pass. A class, because a generator costs more than
    decoding a small sample.
    """

    def __init__(self, kind: type[BadSample]):
        self.kind = kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, raised: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, BadSample | KeyboardInterrupt | SystemExit | GeneratorExit):
            raise self.kind(one_line_reason(error)) from error


def one_line_reason(error: BaseException) -> str:
    """Return the message of an exception in one line of at most 200 characters that any file can hold."""
    message = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()
    message = message if len(message) <= _LONGEST_REASON else f"{message[:_LONGEST_REASON]}..."
    if isinstance(error, OSError | ValueError) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


@dataclass(frozen=True)
class Fault:
    """A record of `bad_samples.jsonl`.

    Args:
        position: global position; None for a whole shard.
        number: sample index in the shard, among those that `data.fraction` leaves; None for a whole shard.
    """

    position: int | None
    shard: str
    number: int | None
    key: str | None
    cause: str
    detail: str


@dataclass(frozen=True)
class Sample:
    """One undecoded sample.

    Args:
        label: class number, if the source has one.
        kinds: captions by kind, if the source is asked for `kinds`; `captions` has all of them.
        read_array: reads the array next to the image, as `TarSource.read_array`; None if the source has no arrays.
    """

    name: str
    image: bytes
    captions: tuple[bytes, ...]
    label: int | None = None
    kinds: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)
    read_array: Callable[[], np.ndarray | None] | None = field(default=None, compare=False, repr=False)

    @property
    def caption(self) -> bytes | None:
        return self.captions[0] if self.captions else None


class Source:
    """Samples by (shard, number). A source has no reading position, so it can be copied to a worker at any time."""

    shard_sizes: list[int]
    faults: list[Fault]  # of whole shards
    kinds: tuple[str, ...] = ()  # keys of `data.captions`
    weights: SampleWeights | None = None
    parts: Sequence["Source"] = ()  # sources of a mixture
    shares: Sequence[float] = ()  # relative number of samples from each part

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    @property
    def shard_bytes(self) -> list[int]:
        """Bytes of each shard; none of a dataset."""
        return [size for part in self.parts for size in part.shard_bytes]

    @property
    def all_weights(self) -> list[SampleWeights]:
        """Sampling weights of this source, and of the parts of a mixture."""
        own = [] if self.weights is None else [self.weights]
        return own + [weights for part in self.parts for weights in part.all_weights]

    @property
    def num_drawn(self) -> int:
        """Number of samples with a weight above 0."""
        if self.parts:
            return sum(part.num_drawn for part in self.parts)
        return len(self) if self.weights is None else self.weights.composition.visits

    def drawn(self, shard: int) -> np.ndarray | None:
        """Return the numbers of a shard's samples with a weight above 0; None for all."""
        return None if self.weights is None else np.flatnonzero(self.weights.of_shard(shard))

    def read(self, shard: int, number: int) -> Sample:
        """Return sample `number` of shard `shard`. Raise BadSample if it cannot be used, so that another replaces it.
        After an OSError the run stops, because a replacement would change the order."""
        raise NotImplementedError

    def read_captions(self, shard: int, number: int) -> tuple[bytes, ...]:
        """Return the captions of sample `number` of shard `shard`; raises as `read`."""
        return self.read(shard, number).captions

    def outline(self) -> list[int]:
        """Return numbers of some samples that differ between data of equal names and sizes, but not between copies."""
        return []

    def fetch_ahead(self, shards: list[int]) -> None:
        """Start to prefetch shards in this order, without waiting. Local sources do nothing."""

    def shard_name(self, shard: int) -> str:
        raise NotImplementedError

    def key(self, shard: int, number: int) -> str:
        raise NotImplementedError


class SampleNumbers(Sequence[tuple[int, int]]):
    """(shard, number) of every row of a source, in shard order, in eight bytes a shard."""

    def __init__(self, source: Source):
        self._ends = np.cumsum(source.shard_sizes, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return shard, int(row) - (int(self._ends[shard - 1]) if shard else 0)


def evenly(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist() if count else []


def shard_sizes_digest(source: Source) -> int:
    """Return a 63-bit digest of the sizes of a source's shards, and of its weights, which its order depends on."""
    content = np.asarray(source.shard_sizes, dtype="<i8").tobytes()
    content += "".join(f"{weights.name} {weights.digest}" for weights in source.all_weights).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def contents_digest(source: Source) -> str:
    """Return a digest of the names of a source's shards, without folders, of their sizes, order and outline."""
    names = [source.shard_name(shard).rsplit("/", 1)[-1] for shard in range(len(source.shard_sizes))]
    content = json.dumps([names, source.shard_sizes, source.outline()])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def candidates(source: Source, shard: int, number: int) -> Iterator[tuple[int, int]]:
    """Yield the sample (shard, number), then 255 possible replacements. All ranks and reruns get the same ones.

    First come the next samples of the shard, cyclically. After 16 samples of a shard, the next shard with samples
    follows, from the same number on. A sample of weight 0 replaces none.
    """
    yield shard, number
    for turn in range(_SHARDS_TRIED):
        drawn = source.drawn(shard)
        size, first = source.shard_sizes[shard], number
        if drawn is not None:
            size, first = len(drawn), int(np.searchsorted(drawn, number))
        for step in range(turn == 0, min(_TRIED_IN_SHARD, size)):
            at = (first + step) % size
            yield shard, at if drawn is None else int(drawn[at])
        shard = (shard + 1) % len(source.shard_sizes)
