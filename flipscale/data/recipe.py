"""The recipe's `data` section: where the pairs are, and how they become a batch."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SourceRecipe:
    """One source of pairs: tar shards or a `datasets` Dataset.

    Args:
        shards: as `data.shards`. Does not change what is learned.
        dataset: a name on the Hub, a folder of images, parquet or Arrow, a file or glob of such, or what `save_to_disk`
            wrote. Does not change what is learned: the same rows may lie elsewhere.
        config: of the dataset, where it has several.
        split: of the dataset.
        image_column: of the dataset.
        caption_columns: of the dataset, each a caption or a list of captions, of which one is drawn every time.
        weight: share of the samples, relative to the other sources'; None everywhere gives each its size.
    """

    shards: str | None = field(default=None, metadata={"learned": False})
    dataset: str | None = field(default=None, metadata={"learned": False})
    config: str | None = None
    split: str = "train"
    image_column: str = "image"
    caption_columns: list[str] = field(default_factory=lambda: ["caption"])
    weight: float | None = None


@dataclass(frozen=True)
class DataRecipe:
    """What is read, and how it becomes a batch.

    Args:
        shards: a folder of tar shards, a glob, or a range such as `laion/{00000..41407}.tar`; here or, a block of
            shards ahead of need through a cache, at `s3://`, `gs://`, `hf://` or `https://`. Does not change what is
            learned: the same shards may lie elsewhere.
        sources: in place of `shards`: several of them, or of datasets, mixed by weight.
        tokenizer: a folder or Hub name of a fast tokenizer, or `bert` for the original's WordPiece without special
            tokens.
        global_batch_size: pairs a step over all processes; every process takes an equal part.
        micro_batch_size: pairs that a process has activations of at once, or None for its whole part of the batch. Its
            part is then embedded twice. Does not change what is learned.
        crop_scale: area of the random crop as a fraction of the image; 0.5 to 1 in the paper.
        shards_per_block: shards shuffled together; bounds memory and open files.
        num_workers: decoding processes for each training process. Does not change what is learned.
        cache_dir: where shards at a URL are kept meanwhile, on a disk of the machine. Does not change what is learned.
        cache_bytes: what may lie there: two blocks at least, and better all that the workers are reading at once.
            Does not change what is learned.
        max_bad_fraction: the run stops when more of the last million samples, or of the shards, cannot be used.
            Does not change what is learned.
    """

    shards: str = field(default="", metadata={"learned": False})
    sources: list[SourceRecipe] = field(default_factory=list)
    tokenizer: str = field(default="bert", metadata={"place": True})
    global_batch_size: int = 4096
    micro_batch_size: int | None = field(default=None, metadata={"learned": False})
    crop_scale: tuple[float, float] = (0.5, 1.0)
    shards_per_block: int = 16
    num_workers: int = field(default=8, metadata={"learned": False})
    cache_dir: str = field(default="~/.cache/flipscale/shards", metadata={"learned": False})
    cache_bytes: int = field(default=100_000_000_000, metadata={"learned": False})
    max_bad_fraction: float = field(default=0.05, metadata={"learned": False})
