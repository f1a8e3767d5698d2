"""A look at training data, from which a recipe is proposed: how many pairs, what size of pictures, which captions."""

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from flipscale.data.captions import choose_caption
from flipscale.data.decode import MAX_PIXELS, UndecodableImage
from flipscale.data.faults import BadSample
from flipscale.data.image_headers import complaint
from flipscale.data.sources.source import Source
from flipscale.io.errors import UserError

# Enough for percentiles, and for captions that repeat in a batch; of a large set they take seconds.
LOOKED_AT = 4096
_FETCHED = 4  # shards at a URL


@dataclass(frozen=True)
class Survey:
    """What a look at some of the pairs found.

    Args:
        pairs: in the shards, whether they can be used or not.
        width, height: of the median picture, in pixels.
        tokens: which 95 % of the captions have at most.
        captions: how many of the pairs that were looked at have each caption; those without one are left out.
        looked_at: pairs.
    """

    pairs: int
    width: int
    height: int
    tokens: int
    captions: Mapping[str, int] = field(repr=False)
    looked_at: int

    def repeated(self, batch_size: int) -> float:
        """Return how many pairs of a batch have a caption that another pair of the batch has too, as expected.

        A pair whose caption c of the n pairs have finds none like it among batch_size - 1 others with the probability
        (1 - (c - 1) / (n - 1)) ** (batch_size - 1).
        """
        counts = np.array(list(self.captions.values()), dtype=float)
        total = counts.sum()
        alone = (1.0 - (counts - 1.0) / max(total - 1.0, 1.0)) ** (batch_size - 1)
        return float(batch_size * (counts / total * (1.0 - alone)).sum())

    def __str__(self) -> str:
        """Return it in a sentence."""
        some = "" if self.looked_at == self.pairs else f" of {self.looked_at:,} looked at"
        return (
            f"{self.pairs:,} pairs; the median picture has {self.width}x{self.height} pixels; {len(self.captions):,} "
            f"different captions{some}, of at most {self.tokens} tokens (95 % of them)"
        )


def survey(source: Source, tokenizer: PreTrainedTokenizerBase) -> Survey:
    """Return what is in the shards of `source`, by a look at pairs that are evenly spread.

    Raises:
        ValueError: none of them has a picture and a caption.
        OSError: a shard cannot be read.
    """
    sizes: list[tuple[int, int]] = []
    captions: Counter[str] = Counter()
    places = list(_spread(source))
    for shard, number in places:
        try:
            sample = source.read(shard, number)
            caption = choose_caption(sample.captions, 0.0)
            size = _size(sample.image)
        except BadSample:
            continue  # training leaves it out too, and counts it
        sizes.append(size)
        captions[caption] += 1
    if not sizes:
        raise UserError(
            f"none of {len(places):,} samples that were looked at has a picture and a caption; `flipscale prepare "
            "inspect` of these shards says what they have"
        )
    width, height = np.median(np.array(sizes), axis=0).astype(int).tolist()
    lengths = [len(ids) for ids in tokenizer(list(captions), truncation=False, padding=False)["input_ids"]]
    tokens = int(np.percentile(np.repeat(lengths, list(captions.values())), 95, method="higher"))
    return Survey(len(source), width, height, tokens, captions, len(places))


def _spread(source: Source) -> Iterator[tuple[int, int]]:
    """Yield shards and numbers of samples that are evenly spread; where shards are fetched, over a few of them."""
    sizes = np.array(source.shard_sizes)
    if "://" in source.shard_name(0):
        sizes[np.setdiff1d(np.arange(len(sizes)), np.linspace(0, len(sizes) - 1, _FETCHED).astype(int))] = 0
    ends = np.cumsum(sizes)
    numbers = np.unique(np.linspace(0, ends[-1] - 1, min(LOOKED_AT, int(ends[-1]))).round().astype(np.int64))
    shards = np.searchsorted(ends, numbers, side="right")
    yield from zip(shards.tolist(), (numbers - (ends - sizes)[shards]).tolist(), strict=True)


def _size(encoded: bytes) -> tuple[int, int]:
    """Return width and height as the head of an image says.

    Raises:
        BadSample: it says none.
    """
    try:
        if why := complaint(encoded, MAX_PIXELS):
            raise UndecodableImage(why)
        with Image.open(io.BytesIO(encoded)) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UndecodableImage(str(error)) from error
