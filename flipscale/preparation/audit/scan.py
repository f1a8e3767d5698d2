"""One pass over a source by worker processes: a few bytes kept of each sample, and counts of its captions."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from flipscale.data.decode import decode_small
from flipscale.data.randomness import keyed_uniform
from flipscale.data.samples import BadSample, MissingCaption, Sample, Source, UndecodableCaption
from flipscale.data.tokenizers import load_tokenizer
from flipscale.preparation.audit.captions import CaptionCounts
from flipscale.preparation.audit.hashes import LEAST_SIDE, digest, look
from flipscale.preparation.worker_pool import worker_pool

UNUSABLE, BLANK, SEEN = 0, 1, 2  # states of an image
_RUN = 256  # samples that a worker takes at once
_WAITING = 64  # runs that wait for a worker, or to be taken in order
_EXAMPLES = 3

Item = TypeVar("Item")
Found = TypeVar("Found")


class Run(NamedTuple):
    """Some samples of a source that follow each other: from `number` of `shard` on, which is `row` of the source."""

    source: int
    shard: int
    number: int
    row: int
    length: int
    sampled_share: float


@dataclass
class Faults:
    """Unusable samples by cause: how many, and the first few."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, cause: str, example: str, count: int = 1) -> None:
        """Count a sample."""
        self.counts[cause] += count
        shown = self.examples.setdefault(cause, [])
        if len(shown) < _EXAMPLES:
            shown.append(example)

    def merge(self, other: "Faults") -> None:
        """Add the faults of later samples."""
        for cause, count in other.counts.items():
            for example in other.examples[cause]:
                self.add(cause, example, 0)
            self.counts[cause] += count

    def figures(self) -> dict[str, dict[str, Any]]:
        """Return them ready for JSON."""
        return {cause: {"count": n, "examples": self.examples[cause]} for cause, n in self.counts.most_common()}


@dataclass
class Scan:
    """What a pass found: of each row 21 bytes, of each caption 8, and counts.

    Args:
        digests: of the images' bytes, uint64 `(rows,)`.
        looks: the images' hashes, uint64 `(rows,)`.
        states: `UNUSABLE`, `BLANK` or `SEEN`, uint8 `(rows,)`.
        num_captions: of each row, uint32 `(rows,)`.
        captions: digests of the captions, uint64, all rows' one after the other.
        counts: of the captions.
        faults: samples that cannot be used.
    """

    digests: np.ndarray
    looks: np.ndarray
    states: np.ndarray
    num_captions: np.ndarray
    captions: list[np.ndarray] = field(default_factory=list)
    counts: CaptionCounts = field(default_factory=CaptionCounts)
    faults: Faults = field(default_factory=Faults)

    @classmethod
    def of_rows(cls, count: int) -> "Scan":
        """Return an empty scan of `count` rows."""
        digests, looks = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
        return cls(digests, looks, np.zeros(count, np.uint8), np.zeros(count, np.uint32))

    def __len__(self) -> int:
        return len(self.states)

    def put(self, row: int, part: "Scan") -> None:
        """Take what a worker found of the rows from `row` on."""
        rows = slice(row, row + len(part.states))
        self.digests[rows], self.looks[rows] = part.digests, part.looks
        self.states[rows], self.num_captions[rows] = part.states, part.num_captions
        self.captions += part.captions
        self.counts.merge(part.counts)
        self.faults.merge(part.faults)

    def commonest(self, most: int) -> list[tuple[int, int, int]]:
        """Return the commonest captions: how often each occurs, and the first row that has it with its number there."""
        _, first, counts = np.unique(np.concatenate(self.captions), return_index=True, return_counts=True)
        best = np.lexsort((first, -counts))[:most]
        ends = np.cumsum(self.num_captions, dtype=np.int64)
        rows = np.searchsorted(ends, first[best], side="right")
        numbers = first[best] - (ends[rows] - self.num_captions[rows])
        return list(zip(counts[best].tolist(), rows.tolist(), numbers.tolist(), strict=True))

    @property
    def num_distinct_captions(self) -> int:
        """How many captions differ."""
        return len(np.unique(np.concatenate(self.captions)))


class Workers:
    """Worker processes that have some sources open, and count tokens if a tokenizer is named.

    Args:
        sources: every source that is scanned, or whose images are compared.
    """

    def __init__(self, sources: list[Source], processes: int, tokenizer: str | None = None):
        self.sources = sources
        self._workers = worker_pool(processes, _begin, (sources, tokenizer))

    def __enter__(self) -> "Workers":
        self._pool = self._workers.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._workers.__exit__(*error)

    def in_order(self, function: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
        """Yield what the workers make of the items, in order. However many there are, only some wait for a worker."""
        waiting: deque[Future[Found]] = deque()
        for item in items:
            waiting.append(self._pool.submit(function, item))
            if len(waiting) > _WAITING:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def scan(self, number: int, what: str, sampled_share: float = 0.0) -> Scan:
        """Return what a pass over source `number` finds. A progress bar shows it.

        Args:
            what: the source's name at the bar.
            sampled_share: of the samples whose captions are kept for their languages; which ones depends on their rows
                only.

        Raises:
            OSError: a shard cannot be read.
        """
        sizes = self.sources[number].shard_sizes
        runs = [
            Run(number, shard, at, row + at, min(_RUN, size - at), sampled_share)
            for shard, (size, row) in enumerate(zip(sizes, starts(self.sources[number]), strict=True))
            for at in range(0, size, _RUN)
        ]
        found = Scan.of_rows(sum(sizes))
        with tqdm(total=len(found), desc=what, unit=" samples", disable=None) as bar:
            for run, part in zip(runs, self.in_order(_scan_run, runs), strict=True):
                found.put(run.row, part)
                bar.update(run.length)
        return found


def starts(source: Source) -> list[int]:
    """Return the row of the first sample of each shard."""
    return np.concatenate([[0], np.cumsum(source.shard_sizes)])[:-1].astype(int).tolist()


class OpenInWorker:
    """What a worker process has open."""

    sources: ClassVar[list[Source]] = []
    tokenizer: ClassVar[PreTrainedTokenizerBase | None] = None


def _begin(sources: list[Source], tokenizer: str | None) -> None:
    OpenInWorker.sources = sources
    if tokenizer:
        OpenInWorker.tokenizer = load_tokenizer(tokenizer, 10**9)


def _scan_run(run: Run) -> Scan:
    """Return what is in a run of samples."""
    source = OpenInWorker.sources[run.source]
    rows = np.arange(run.row, run.row + run.length)
    is_sampled = keyed_uniform(0, "audit", rows, 1)[:, 0] < run.sampled_share
    found, captions = Scan.of_rows(run.length), []
    for at in range(run.length):
        name = f"{source.shard_name(run.shard)}#{run.number + at}"
        try:
            sample = source.read(run.shard, run.number + at)
        except BadSample as error:
            found.faults.add(error.cause, f"{name}: {error}")
            continue
        texts = texts_of(sample, name, found.faults)
        found.num_captions[at] = len(texts)
        captions += [digest(text.encode()) for text in texts]
        for text, tokens in zip(texts, _num_tokens(texts), strict=True):
            found.counts.add(text, tokens, bool(is_sampled[at]))
        found.digests[at] = digest(sample.image)
        try:
            found.looks[at], is_blank = look(decode_small(sample.image, LEAST_SIDE))
            found.states[at] = BLANK if is_blank else SEEN
        except BadSample as error:
            found.faults.add(error.cause, f"{name}: {error}")
    found.captions = [np.array(captions, dtype=np.uint64)]
    return found


def texts_of(sample: Sample, name: str, faults: Faults) -> list[str]:
    """Return the captions that can be read and are not blank."""
    texts = []
    for caption in sample.captions:
        try:
            texts.append(caption.decode("utf-8").strip())
        except UnicodeDecodeError as error:
            faults.add(UndecodableCaption.cause, f"{name}: {error}")
    texts = [text for text in texts if text]
    if not any(sample.captions):
        faults.add(MissingCaption.cause, f"{name}: there is none")
    return texts


def _num_tokens(texts: list[str]) -> list[int] | list[None]:
    """Return how many tokens each text has, special ones included; None without a tokenizer."""
    if OpenInWorker.tokenizer is None or not texts:
        return [None] * len(texts)
    return [len(ids) for ids in OpenInWorker.tokenizer(texts, truncation=False, padding=False)["input_ids"]]
