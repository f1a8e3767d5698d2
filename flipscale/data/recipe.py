"""The recipe's `data` section: where the pairs are, and how they become a batch."""

from dataclasses import dataclass, field

from flipscale.data.labelled.recipe import AugmentRecipe
from flipscale.data.lanes import number_of_lanes
from flipscale.io.errors import UserError
from flipscale.io.options import Bytes, Count, Pairs, Positive, Share, ShareAboveZero, Workers


@dataclass(frozen=True)
class SourceRecipe:
    """One source of pairs: tar shards or a `datasets` Dataset.

    Args:
        shards: As `data.shards`. Does not change what is learned.
        dataset: A name on the Hub, a folder of images, parquet or Arrow files, such a file or a glob of them, or a
            folder that `save_to_disk` wrote. Does not change what is learned: the same rows may be elsewhere.
        config: The dataset's configuration, if it has several.
        split: The dataset's split.
        image_column: The dataset's column of images.
        caption_columns: The dataset's columns of captions. Each has a caption or a list of captions; each time a sample
            is read, one of all is drawn.
        weight: The share of the samples, relative to the other sources' weights; if none is given, each source has its
            size as weight.
    """

    shards: str | None = field(default=None, metadata={"learned": False})
    dataset: str | None = field(default=None, metadata={"learned": False})
    config: str | None = None
    split: str = "train"
    image_column: str = "image"
    caption_columns: list[str] = field(default_factory=lambda: ["caption"])
    weight: Positive | None = None


@dataclass(frozen=True)
class DataRecipe:
    """What data is read, and how it becomes batches.

    Args:
        shards: A folder of tar shards, a glob, or a range such as `laion/{00000..41407}.tar`. At `s3://`, `gs://`,
            `hf://` or `https://`, shards are fetched ahead, through a cache. Does not change what is learned: the same
            shards may be elsewhere.
        sources: Several sources, mixed by weight, in place of `shards`.
        fraction: The part of the samples that is trained on, of each source and shard. Which they are depends neither
            on the seed nor on the fraction: those of 1/4 are among those of 1/2. Shards at URLs are fetched whole all
            the same.
        tokenizer: A folder or Hub name of a fast tokenizer, or `bert` for the original's WordPiece without special
            tokens.
        global_batch_size: How many pairs a step takes over all processes; every process takes an equal part.
        micro_batch_size: How many pairs a process keeps activations of at a time; null is all of its part. A smaller
            number embeds every pair twice. Does not change what is learned.
        crop_scale: The least and the most area of the random crop, as a fraction of the image's; 0.5 to 1 in the paper.
        mirror: Whether half of the images are mirrored, as in the paper's pre-training; not where texts or answers say
            what is left or right.
        augment: How labelled images are varied beyond crop and mirror.
        lanes: How many equal parts a batch has that read shards of their own, so that a node reads those of its parts
            only: at least as many as nodes. Null is 64, or the largest divisor of 64 and `global_batch_size`. At 1 all
            nodes read all shards, in the order that version 0.1 had.
        shards_per_block: How many shards are shuffled together, over all lanes, each of which has at least one; it
            bounds memory and open files.
        num_workers: How many processes decode for each training process; 0 decodes in the training process. Does not
            change what is learned.
        cache_dir: A folder on a local disk that keeps fetched shards. Does not change what is learned.
        cache_bytes: How many bytes the cache may hold at most: at least the shards that the node's lanes read now and
            next, two for each lane by default, in each of the sources. Does not change what is learned.
        max_bad_fraction: The run stops if more than this fraction of the last million samples, or of the shards, is
            unusable. Does not change what is learned.
    """

    shards: str = field(default="", metadata={"learned": False})
    sources: list[SourceRecipe] = field(default_factory=list)
    fraction: ShareAboveZero = 1.0
    tokenizer: str = field(default="bert", metadata={"place": True})
    global_batch_size: Pairs = 4096
    micro_batch_size: Pairs | None = field(default=None, metadata={"learned": False})
    crop_scale: tuple[ShareAboveZero, ShareAboveZero] = (0.5, 1.0)
    mirror: bool = True
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)
    lanes: Pairs | None = field(default=None, metadata={"before": 1})
    shards_per_block: Count = 16
    num_workers: Workers = field(default=8, metadata={"learned": False})
    cache_dir: str = field(default="~/.cache/flipscale/shards", metadata={"learned": False})
    cache_bytes: Bytes = field(default=100_000_000_000, metadata={"learned": False})
    max_bad_fraction: Share = field(default=0.05, metadata={"learned": False})

    def __post_init__(self) -> None:
        if not self.crop_scale[0] <= self.crop_scale[1]:
            raise UserError(f"data.crop_scale is {list(self.crop_scale)}; the least share of the image comes first")

    @property
    def num_lanes(self) -> int:
        """How many lanes the order has.

        Raises:
            ValueError: as `number_of_lanes`.
        """
        return number_of_lanes(self.lanes, self.global_batch_size)
