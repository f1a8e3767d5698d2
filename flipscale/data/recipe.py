"""The recipe's `data` and `mask` sections."""

from dataclasses import dataclass, field

from flipscale.data.order import number_of_lanes
from flipscale.io.errors import UserError
from flipscale.io.options import Bytes, Count, NonNegative, Pairs, Positive, Share, ShareAboveZero, Workers


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
class AugmentRecipe:
    """How labelled images are varied beyond crop and mirror, for `loss.kind` `classify`; by default they are not.

    Args:
        rand_augment: RandAugment (arXiv 1909.13719) in timm's words; `rand-m9-mstd0.5-inc1` in the paper.
        mixup_alpha: Mix the images and labels of two samples (arXiv 1710.09412) by a share drawn from Beta(alpha,
            alpha); 0.8 in the paper.
        cutmix_alpha: Replace a part of an image, and the same part of its label, by another image's (arXiv 1905.04899);
            1.0 in the paper. With mixup too, each two samples get one or the other.
    """

    rand_augment: str | None = None
    mixup_alpha: NonNegative = 0.0
    cutmix_alpha: NonNegative = 0.0

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup_alpha > 0.0 or self.cutmix_alpha > 0.0


@dataclass(frozen=True)
class MaskRecipe:
    """How patches and words are chosen where a stage's mask_ratio or text_mask_ratio is above 0.

    Args:
        kind: How the removed patches are chosen. `random`; `grid`, the same number in every cell of a regular grid;
            `block`, one window is kept; `centre`, the kept patches are Gaussian around the centre.
        views: Number of masks of one decoded crop. They share no patch; each is embedded and paired with the caption,
            which is embedded once.
        text_kind: How the removed tokens are chosen. `random`, or `padding_first`, padding before any word.
    """

    kind: str = "random"
    views: Count = 1
    text_kind: str = "padding_first"

    def __post_init__(self) -> None:
        if (self.kind, self.text_kind) == (MaskRecipe.kind, MaskRecipe.text_kind):
            return  # valid, and --help makes it: the import below takes seconds
        from flipscale.data.masks import IMAGE_MASKS, TEXT_MASKS, check_kind

        check_kind(self.kind, IMAGE_MASKS, "mask.kind")
        check_kind(self.text_kind, TEXT_MASKS, "mask.text_kind")

    def views_at(self, mask_ratio: float) -> int:
        """Return the number of embeddings of an image: one without a mask, because views share no patch."""
        return self.views if mask_ratio > 0.0 else 1


@dataclass(frozen=True)
class DataRecipe:
    """The data of a run, and its path into batches.

    Args:
        shards: A folder of tar shards, a glob, or a range such as `laion/{00000..41407}.tar`. At `s3://`, `gs://`,
            `hf://` or `https://`, shards are prefetched through a cache. Does not change what is learned: the same
            shards may be elsewhere.
        sources: Several sources, mixed by weight, in place of `shards`.
        fraction: The part of the samples that is trained on, of each source and shard. The choice depends neither on
            the seed nor on the fraction: the samples of 1/4 are among those of 1/2. Shards at URLs are fetched whole
            all the same.
        tokenizer: A folder or Hub name of a fast tokenizer, or `bert` for the original's WordPiece without special
            tokens.
        global_batch_size: Pairs of a step over all processes; every process takes an equal part.
        micro_batch_size: Pairs whose activations a process keeps at a time; null is its whole part. A smaller number
            embeds every pair twice. Does not change what is learned.
        crop_scale: The least and the most area of the random crop, as a fraction of the image's; 0.5 to 1 in the paper.
        mirror: Whether half of the images are mirrored, as in the paper's pre-training. Not for texts or answers that
            name left or right.
        augment: How labelled images are varied beyond crop and mirror.
        lanes: Number of equal parts of a batch, each of which reads its own shards. A node reads the shards of its
            parts only, so use at least the number of nodes. Null is the largest common divisor of 64 and
            `global_batch_size`. At 1, all nodes read all shards.
        shards_per_block: Number of shards that are shuffled together, over all lanes, each of which has at least one.
            It bounds memory and open files.
        num_workers: Decoding processes of each training process; 0 decodes in the training process. Does not change
            what is learned.
        cache_dir: A folder on a local disk that keeps fetched shards. Does not change what is learned.
        cache_bytes: Size limit of the cache, in bytes. It must hold the shards that the node's lanes read now and next,
            two for each lane by default, in each of the sources. Does not change what is learned.
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
            raise UserError(f"data.crop_scale is {list(self.crop_scale)}; expected the smaller share first")

    @property
    def num_lanes(self) -> int:
        """Number of lanes of the order."""
        return number_of_lanes(self.lanes, self.global_batch_size)
