"""What can be wrong with a sample, and what takes its place: a rule that every rank and every rerun takes alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_TRIED_IN_SHARD, _SHARDS_TRIED = 16, 16


class BadSample(ValueError):
    """A sample that cannot be learned from. `cause` is the word it is counted by, the message says more."""

    cause = "bad_sample"


class TruncatedSample(BadSample):
    """The shard ends inside it, though it did not when it was indexed."""

    cause = "truncated_shard"


class MissingCaption(BadSample):
    """There is no caption, or a blank one."""

    cause = "missing_caption"


class UndecodableCaption(BadSample):
    """The caption is not UTF-8, or not the JSON that it should be."""

    cause = "undecodable_caption"


@dataclass(frozen=True)
class Fault:
    """A sample (or a whole shard: `position`, `number` and `key` None) that could not be used, as it stands in
    `bad_samples.jsonl`."""

    position: int | None
    shard: str
    number: int | None
    key: str | None
    cause: str
    detail: str


def candidates(shard_sizes: Sequence[int], shard: int, number: int) -> Iterator[tuple[int, int]]:
    """The sample (shard, number), then those that may take its place: the ones after it in its shard (after the last,
    the first), and when 16 in a row are bad, the same numbers of the next shard that has samples; 256 in all."""
    for _ in range(_SHARDS_TRIED):
        size = shard_sizes[shard]
        for step in range(min(_TRIED_IN_SHARD, size)):
            yield shard, (number + step) % size
        shard = (shard + 1) % len(shard_sizes)
        while not shard_sizes[shard]:
            shard = (shard + 1) % len(shard_sizes)
