"""A survey of training data for `flipscale init`: number of pairs, size of pictures, captions."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from flipscale.data.captions import choose_caption
from flipscale.data.decode import open_image
from flipscale.data.samples import BadSample, Source
from flipscale.io.errors import UserError

# Enough samples for percentiles and for repeated captions; a few seconds in a large set.
_MOST_SAMPLES = 4096
_FETCHED_SHARDS = 4  # of shards at a URL


@dataclass(frozen=True)
class Survey:
    """Statistics of the data from a sample of its pairs.

    Args:
        pairs: number of pairs in the shards, usable or not.
        width, height: median size of the pictures in pixels.
        tokens: 95th percentile of the captions' numbers of tokens.
        captions: number of sampled pairs by caption.
        sampled: number of sampled pairs.
    """

    pairs: int
    width: int
    height: int
    tokens: int
    captions: Mapping[str, int] = field(repr=False)
    sampled: int

    def repeated(self, batch_size: int) -> float:
        """Return the expected number of pairs in a batch that share their caption with another pair of the batch.

        If c of n pairs have a caption, one of them shares it with none of batch_size - 1 others with the probability
        (1 - (c - 1) / (n - 1)) ** (batch_size - 1).
        """
        counts = np.array(list(self.captions.values()), dtype=float)
        total = counts.sum()
        alone = (1.0 - (counts - 1.0) / max(total - 1.0, 1.0)) ** (batch_size - 1)
        return float(batch_size * (counts / total * (1.0 - alone)).sum())

    def __str__(self) -> str:
        """Return the statistics as text."""
        some = "" if self.sampled == self.pairs else f" of {self.sampled:,} sampled"
        return (
            f"{self.pairs:,} pairs; the median picture has {self.width}x{self.height} pixels; {len(self.captions):,} "
            f"different captions{some}, 95 % of them of at most {self.tokens} tokens"
        )


def survey(source: Source, tokenizer: PreTrainedTokenizerBase) -> Survey:
    """Return the statistics of evenly spaced pairs of `source`.

    Raises:
        UserError: no sampled pair has a picture and a caption.
    """
    sizes: list[tuple[int, int]] = []
    captions: Counter[str] = Counter()
    places = list(_spread(source))
    for shard, number in places:
        try:
            sample = source.read(shard, number)
            caption = choose_caption(sample.captions, 0.0)
            size = open_image(sample.image).size
        except BadSample:
            continue  # Training leaves it out too, and counts it.
        sizes.append(size)
        captions[caption] += 1
    if not sizes:
        raise UserError(
            f"none of {len(places):,} samples has a picture and a caption; `flipscale prepare inspect` lists the "
            "contents of the shards"
        )
    width, height = np.median(np.array(sizes), axis=0).astype(int).tolist()
    lengths = [len(ids) for ids in tokenizer(list(captions), truncation=False, padding=False)["input_ids"]]
    tokens = int(np.percentile(np.repeat(lengths, list(captions.values())), 95, method="higher"))
    return Survey(len(source), width, height, tokens, captions, len(places))


def _spread(source: Source) -> Iterator[tuple[int, int]]:
    """Yield shards and numbers of evenly spaced samples, of a few shards only if shards are fetched."""
    sizes = np.array(source.shard_sizes)
    if "://" in source.shard_name(0):
        sizes[np.setdiff1d(np.arange(len(sizes)), np.linspace(0, len(sizes) - 1, _FETCHED_SHARDS).astype(int))] = 0
    ends = np.cumsum(sizes)
    numbers = np.unique(np.linspace(0, ends[-1] - 1, min(_MOST_SAMPLES, int(ends[-1]))).round().astype(np.int64))
    shards = np.searchsorted(ends, numbers, side="right")
    yield from zip(shards.tolist(), (numbers - (ends - sizes)[shards]).tolist(), strict=True)
