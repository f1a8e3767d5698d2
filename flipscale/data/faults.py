"""What can be wrong with a sample, and which sample replaces it. All ranks and all reruns choose the same one."""

from collections.abc import Iterator, Sequence
from contextlib import ContextDecorator
from dataclasses import dataclass
from types import TracebackType

from flipscale.io.errors import UserError

_TRIED_IN_SHARD, _SHARDS_TRIED = 16, 16
_LONGEST_REASON = 200  # characters; some libraries quote what they were given


class BadSample(UserError):
    """A sample that cannot be trained on. It is counted under `cause`; the message has the details."""

    cause = "bad_sample"


class TruncatedSample(BadSample):
    """The shard ends inside the sample; it was longer when it was indexed."""

    cause = "truncated_shard"


class MissingCaption(BadSample):
    """The sample has no caption, or a blank one."""

    cause = "missing_caption"


class UndecodableCaption(BadSample):
    """The caption is not UTF-8, or not the JSON that it should be."""

    cause = "undecodable_caption"


class told_as(ContextDecorator):
    """Turn whatever a library raises for one sample into a BadSample of `kind`, so that no sample ends a run.

    A panic of a library in Rust is no `Exception`; only what asks Python itself to stop is let through. A generator
    would do the same, at more cost than some samples' own.
    """

    def __init__(self, kind: type[BadSample]):
        self.kind = kind

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, raised: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, BadSample | KeyboardInterrupt | SystemExit | GeneratorExit):
            raise self.kind(reason_of(error)) from error


def reason_of(error: BaseException) -> str:
    """Return what an exception says, in one line of at most 200 characters that can be written to any file."""
    words = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()
    words = words if len(words) <= _LONGEST_REASON else f"{words[:_LONGEST_REASON]}..."
    if isinstance(error, OSError | ValueError) and words:
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


@dataclass(frozen=True)
class Fault:
    """A record of `bad_samples.jsonl`: a sample that could not be used, and why.

    `number` counts the samples of the shard that `data.fraction` leaves. For a whole shard, `position`, `number` and
    `key` are None.
    """

    position: int | None
    shard: str
    number: int | None
    key: str | None
    cause: str
    detail: str


def candidates(shard_sizes: Sequence[int], shard: int, number: int) -> Iterator[tuple[int, int]]:
    """Yield the sample (shard, number), then those that may replace it, 256 in all.

    They are the next ones in its shard, the first following the last. After 16 of a shard come the same numbers of the
    next shard that has samples.
    """
    for _ in range(_SHARDS_TRIED):
        size = shard_sizes[shard]
        for step in range(min(_TRIED_IN_SHARD, size)):
            yield shard, (number + step) % size
        shard = (shard + 1) % len(shard_sizes)
        while not shard_sizes[shard]:
            shard = (shard + 1) % len(shard_sizes)
