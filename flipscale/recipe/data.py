"""The recipe's `data` and `mask` sections."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from flipscale.io.cores import decoding_workers
from flipscale.io.options import Bytes, Copies, Count, NonNegative, Pairs, Positive, Share, ShareAboveZero, Workers
from flipscale.recipe.augment import AugmentRecipe

_USUAL_LANES = 64
_LEAST_SHARE = 1e-4
# The tower of a model whose features are stored, by their folder's name.
PRECOMPUTED_TOWERS = {"images": "vision_model", "texts": "text_model"}


@dataclass(frozen=True)
class SourceRecipe:
    """One source of pairs: tar shards or a `datasets` Dataset.

    Args:
        shards: A folder, glob or range, see `data.shards`. Does not change what is learned.
        dataset: A name on the Hub, a folder of images, parquet or Arrow files, such a file or a glob of them, or a
            folder that `save_to_disk` wrote. Does not change what is learned: the same rows may be elsewhere.
        config: The dataset's configuration, if it has several.
        split: The dataset's split.
        image_column: The dataset's column of images.
        caption_columns: The dataset's columns of captions. Each has a caption or a list of captions. Each read of a
            sample draws one of its captions.
        weight: The source's share of the samples, relative to the others'. Without weights, sources are mixed by size.
        weights: Sampling weights of the source's samples, see `data.weights`.
    """

    shards: str | None = field(default=None, metadata={"learned": False})
    dataset: str | None = field(default=None, metadata={"learned": False})
    config: str | None = None
    split: str = "train"
    image_column: str = "image"
    caption_columns: list[str] = field(default_factory=lambda: ["caption"])
    weight: Positive | None = None
    weights: str | None = field(default=None, metadata={"place": True})


@dataclass(frozen=True)
class MaskRecipe:
    """Choice of patches and words where a stage's mask_ratio or text_mask_ratio is above 0.

    Args:
        kind: Choice of the removed patches. `random` draws them uniformly. `grid` removes the same number in every cell
            of a regular grid. `block` keeps one window. `centre` keeps patches drawn by a Gaussian around the centre.
        views: Number of disjoint masks of each crop. Each view is paired with the caption, which is embedded once.
        text_kind: Choice of the removed tokens. `random` draws them; `padding_first` removes padding before any word.
    """

    kind: str = "random"
    views: Copies = 1
    text_kind: str = "padding_first"

    def views_at(self, mask_ratio: float) -> int:
        """Return the number of embeddings of an image: one without a mask, because views share no patch."""
        return self.views if mask_ratio > 0.0 else 1


@dataclass(frozen=True)
class DataRecipe:
    """The data of a run, its order and its batches.

    Args:
        shards: A folder of tar shards, a glob, or a range such as `laion/{00000..41407}.tar`. Shards at `s3://`,
            `gs://`, `hf://` or `https://` are prefetched through a cache, and so are those of a set that `flipscale
            prepare pairs --list` prints, such as `cc3m`. Does not change what is learned: the shards may move between
            starts. Null with `sources`.
        sources: Several sources, mixed by weight, in place of `shards`. One may be a data set of `datasets`.
        fraction: The share of the samples to train on, the same in each source and shard. The choice ignores the seed.
            A smaller fraction is a subset of a larger one. Shards at URLs are still fetched as a whole.
        weights: A folder of sampling weights, written by `flipscale prepare weights`. Each epoch draws its samples
            anew, on average in proportion to their weights, and never those of weight 0. Null with `sources`, which may
            have their own.
        tokenizer: A folder or Hub name of a fast tokenizer, or `bert`: the original's WordPiece without special tokens.
        captions: Weights of the kinds of captions, such as `{alt: 0.3, synthetic: 0.7}`; each read of a sample draws
            one. A kind is a field of `KEY.json`, `txt` for the text file, or a column of a dataset. Its value is a text
            or a list. If a sample lacks a kind, the others keep their proportions. A stage may have its own weights.
        image_features: A folder of image features of these shards, stored by `flipscale prepare embed --features
            pooled` with the start weights. The image tower is then frozen and not run.
        text_features: The same for the captions and the text tower.
        teachers: Folders in which `flipscale prepare embed --crops` stored embeddings of these shards, each by another
            model, for `loss.kind` `infonce`. The student sees one of these crops, and the first caption.
        pack_captions: Put several short captions in one row of the text tower, so that padding costs little. The losses
            stay equal up to rounding. For family `clip`, and for `flip` without `attend_to_padding`. Does not change
            what is learned.
        global_batch_size: Pairs of a step over all processes; every process takes an equal part.
        micro_batch_size: Pairs whose activations a process holds at once; null is its whole part of the batch. Smaller
            values embed every pair twice under `infonce` and `sigmoid`. Does not change what is learned.
        crop_scale: The least and the most area of the random crop, as a fraction of the image's; 0.5 to 1 in the paper.
        mirror: Whether half of the images are mirrored, as in the paper's pre-training. Turn it off if captions or
            answers mention left or right.
        augment: Augmentation beyond crop and mirror.
        lanes: Number of equal parts of a batch. Each lane reads its own shards, and a node reads only the shards of its
            lanes. Use at least the number of nodes. Null is the largest common divisor of 64 and `global_batch_size`.
            At 1, all nodes read all shards.
        shards_per_block: Number of shards shuffled together, summed over all lanes; a lane has at least one. More
            shards take more memory and open files.
        num_workers: Decoding processes of each training process; 0 decodes in the training process. Null is the
            process's share of the node's cores, less one. Does not change what is learned.
        cache_dir: A folder on a local disk that keeps fetched shards. Does not change what is learned.
        cache_bytes: Size limit of the cache, in bytes. For each source, it must hold the shards that the node's lanes
            read now and next: by default two for each lane. Does not change what is learned.
        max_bad_fraction: The run stops above this fraction of bad samples (of the last million) or of bad shards. Does
            not change what is learned.
    """

    shards: str | None = field(default="", metadata={"learned": False})
    sources: list[SourceRecipe] = field(default_factory=list)
    fraction: ShareAboveZero = 1.0
    weights: str | None = field(default=None, metadata={"place": True})
    tokenizer: str = field(default="bert", metadata={"place": True})
    captions: dict[str, NonNegative] | None = None
    image_features: str | None = field(default=None, metadata={"place": True})
    text_features: str | None = field(default=None, metadata={"place": True})
    teachers: list[str] = field(default_factory=list, metadata={"place": True})
    pack_captions: bool = field(default=False, metadata={"learned": False})
    global_batch_size: Pairs = 4096
    micro_batch_size: Pairs | None = field(default=None, metadata={"learned": False})
    crop_scale: tuple[ShareAboveZero, ShareAboveZero] = (0.5, 1.0)
    mirror: bool = True
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)
    lanes: Pairs | None = field(default=None, metadata={"before": 1})
    shards_per_block: Count = 16
    num_workers: Workers | None = field(default=None, metadata={"learned": False})
    cache_dir: str = field(default="~/.cache/flipscale/shards", metadata={"learned": False})
    cache_bytes: Bytes = field(default=100_000_000_000, metadata={"learned": False})
    max_bad_fraction: Share = field(default=0.05, metadata={"learned": False})

    @property
    def stored(self) -> dict[str, str]:
        """Folders of stored features by tower, `images` and `texts`."""
        folders = {"images": self.image_features, "texts": self.text_features}
        return {tower: folder for tower, folder in folders.items() if folder}

    @property
    def workers(self) -> int:
        return decoding_workers(self.num_workers)

    @property
    def num_lanes(self) -> int:
        return math.gcd(_USUAL_LANES, self.global_batch_size) if self.lanes is None else self.lanes


def small_shares(weights: Sequence[float]) -> Iterator[str]:
    """Yield a refusal of each source whose weight is below a ten-thousandth of the sum."""
    for number, weight in enumerate(weights):
        if weight < _LEAST_SHARE * sum(weights) or not weight > 0:
            least = f"it must be positive and at least {_LEAST_SHARE:g} of the sum"
            yield f"data.sources[{number}].weight is {weight} of {sum(weights)}; {least}"


def divisors_around(number: int, wish: int) -> str:
    """Return the nearest divisors of `number` below and above `wish`, such as `16 or 32`."""
    divisors = [count for count in range(1, number + 1) if number % count == 0]
    below = [count for count in divisors if count < wish][-1:]
    return " or ".join(str(count) for count in [*below, *[count for count in divisors if count > wish][:1]])
