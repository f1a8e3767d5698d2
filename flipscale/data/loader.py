"""Batches: a pure function of (recipe, step), decoded, masked and tokenised in the workers."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flipscale.data.decode import DRAWS_PER_CROP, decode_box, visible_patches
from flipscale.data.faults import BadSample, Fault, MissingCaption, UndecodableCaption, candidates
from flipscale.data.masks import MaskRecipe, keyed_patches, left_out, mask_tokens
from flipscale.data.packed import PackedBatch
from flipscale.data.randomness import keyed_uniform
from flipscale.data.sources.mixture import order_of
from flipscale.data.sources.source import Source
from flipscale.data.tokenizers import bert_tokenizer
from flipscale.model import FlipConfig
from flipscale.model.masking import check_image_mask, num_kept


@dataclass(frozen=True)
class SourceRecipe:
    """One source of pairs: tar shards or a `datasets` Dataset.

    Args:
        shards: as `data.shards`.
        dataset: a name on the Hub, a folder of images, parquet or Arrow, a file or glob of such, or what `save_to_disk`
            wrote.
        config: of the dataset, where it has several.
        split: of the dataset.
        image_column: of the dataset.
        caption_columns: of the dataset, each a caption or a list of captions, of which one is drawn every time.
        weight: share of the samples, relative to the other sources'; None everywhere gives each its size.
    """

    shards: str | None = None
    dataset: str | None = None
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
            shards ahead of need through a cache, at `s3://`, `gs://`, `hf://` or `https://`.
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

    shards: str = ""
    sources: list[SourceRecipe] = field(default_factory=list)
    tokenizer: str = "bert"
    global_batch_size: int = 4096
    micro_batch_size: int | None = None
    crop_scale: tuple[float, float] = (0.5, 1.0)
    shards_per_block: int = 16
    num_workers: int = 8
    cache_dir: str = "~/.cache/flipscale/shards"
    cache_bytes: int = 100_000_000_000
    max_bad_fraction: float = 0.05


@dataclass(frozen=True)
class InputShape:
    """The part of the model that the loader must know."""

    image_size: int
    patch_size: int
    max_tokens: int

    @classmethod
    def of(cls, config: FlipConfig) -> "InputShape":
        """The shape of what a model of `config` takes."""
        vision, text = config.vision_config, config.text_config
        return cls(vision.image_size, vision.patch_size, text.max_position_embeddings)

    @property
    def side(self) -> int:
        """Patches along each side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.side**2


def load_tokenizer(name: str, max_tokens: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe: a folder, a Hub name, or `bert` for the original's WordPiece.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        if name == "bert":
            return bert_tokenizer("google-bert/bert-base-uncased", max_tokens)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"data.tokenizer {name!r} cannot be loaded ({str(error).splitlines()[0]})") from error
    tokenizer.model_max_length = max_tokens
    return tokenizer


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, int64 `(texts, max_tokens)`, cut or padded to the model's length."""
    tokens = tokenizer(texts, padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


class PairDataset(Dataset):
    """Training pairs by global position. `__getitems__` makes the batch of a list of positions:

    `patches` uint8 `(batch, kept, 3 * p * p)`, `patch_index` int16 `(batch, kept)` (absent when nothing is masked),
    `input_ids` int32 and `attention_mask` bool `(batch, max_tokens)`, `faults` a list of `Fault`: samples that could
    not be used, each replaced by the first good one of its `candidates`.

    Several views of a masked image are `patches` `(batch, views, kept, 3 * p * p)` and `patch_index`
    `(batch, views, kept)`; where words are masked too, the captions have the tokens that are left and their
    `position_ids`. With `sends_masked`, `masked_patches` `(batch, num_patches - kept, 3 * p * p)` are the others.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        recipe: DataRecipe,
        shape: InputShape,
        seed: int,
        mask_ratio: float,
        mask: MaskRecipe | None = None,
        text_mask_ratio: float = 0.0,
        sends_masked: bool = False,
    ):
        """
        Raises:
            ValueError: a mask that does not exist at these ratios.
        """
        self.source = source
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.shape = shape
        self.seed = seed
        self.mask = mask or MaskRecipe()
        self.mask_ratio = mask_ratio
        self.text_mask_ratio = text_mask_ratio
        self.sends_masked = sends_masked
        self.kept = num_kept(shape.num_patches, mask_ratio)
        num_kept(shape.max_tokens, text_mask_ratio, "tokens")
        if mask_ratio > 0.0:
            check_image_mask(shape.side, shape.side, mask_ratio, self.mask.kind, self.mask.views)
        self.order = order_of(source, seed, recipe.shards_per_block)
        # What each worker is reading, pid and shard: seen by the process that it dies to.
        self.reading = torch.zeros((max(recipe.num_workers, 1), 2), dtype=torch.int64).share_memory_()

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        where = np.asarray(positions, dtype=np.int64)
        shards, numbers = self.order.locate(where)
        self.source.fetch_ahead(self.order.shards_ahead(positions[0]))
        draws = keyed_uniform(self.seed, "crop", where, DRAWS_PER_CROP)
        caption_draws = keyed_uniform(self.seed, "caption", where, 1)[:, 0].tolist()
        index, patch_size = None, self.shape.patch_size
        if self.mask_ratio > 0.0:
            index = keyed_patches(self.seed, where, self.shape.side, self.mask_ratio, self.mask)
            index = index if self.mask.views > 1 else index[:, 0]
        kept = (len(where), self.kept) if index is None else index.shape
        patches = np.empty((*kept, 3 * patch_size**2), np.uint8)
        captions: list[str] = []
        faults: list[Fault] = []
        masked_index = left_out(index, self.shape.num_patches) if self.sends_masked and index is not None else None
        masked_patches: list[np.ndarray] = []
        for row, (shard, number) in enumerate(zip(shards.tolist(), numbers.tolist(), strict=True)):
            image, caption, bad = self._first_good(shard, number, draws[row], caption_draws[row])
            patches[row] = visible_patches(image, patch_size, None if index is None else index[row])
            if masked_index is not None:
                masked_patches.append(visible_patches(image, patch_size, masked_index[row]))
            captions.append(caption)
            if bad is not None:
                name, key = self.source.shard_name(shard), self.source.key(shard, number)
                faults.append(Fault(positions[row], name, number, key, bad.cause, str(bad)))
        batch = tokenise(self.tokenizer, captions, self.shape.max_tokens)
        if self.text_mask_ratio > 0.0:
            batch = mask_tokens(batch, self.seed, where, self.text_mask_ratio, self.mask)
        batch["patches"] = torch.from_numpy(patches)
        if index is not None:
            batch["patch_index"] = torch.from_numpy(index)
        if masked_patches:
            batch["masked_patches"] = torch.from_numpy(np.stack(masked_patches))
        narrow = {"input_ids": torch.int32, "position_ids": torch.int32, "attention_mask": torch.bool}
        batch = {name: value.to(narrow.get(name, value.dtype)) for name, value in batch.items()}
        return {**batch, "faults": faults}

    def _first_good(
        self, shard: int, number: int, draws: np.ndarray, caption_draw: float
    ) -> tuple[np.ndarray, str, BadSample | None]:
        """Image and caption of a sample or of what takes its place, and why it does if so."""
        why: BadSample | None = None
        worker = get_worker_info()
        if worker is not None:
            self.reading[worker.id] = torch.tensor([os.getpid(), shard])
        for candidate in candidates(self.source.shard_sizes, shard, number):
            try:
                sample = self.source.read(*candidate)
                caption = choose_caption(sample.captions, caption_draw)
                return decode_box(sample.image, draws, self.shape.image_size, self.recipe.crop_scale), caption, why
            except BadSample as error:
                why = why or error
        raise ValueError(
            f"shard {self.source.shard_name(shard)}: neither sample {number} nor any that could take its place has a "
            f"readable image and caption ({why}); fetch the shards again or remove them"
        )


def choose_caption(captions: tuple[bytes, ...], draw: float) -> str:
    """The one of a sample's captions, blank ones left out, that a uniform number in [0, 1) chooses.

    Raises:
        BadSample: there is none, or it is not UTF-8.
    """
    try:
        texts = [text for text in (caption.decode("utf-8").strip() for caption in captions) if text]
    except UnicodeDecodeError as error:
        raise UndecodableCaption(str(error)) from error
    if not texts:
        raise MissingCaption("it is blank" if captions else "there is none")
    return texts[int(draw * len(texts))]


class StepSampler(Sampler[list[int]]):
    """For each step in [first_step, last_step), the positions that process `rank` of `world_size` takes, in
    `micro_batches` lists of one length."""

    def __init__(
        self,
        first_step: int,
        last_step: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        micro_batch_size: int | None = None,
    ):
        if global_batch_size % world_size:
            fits = [count for count in range(1, 2 * world_size) if global_batch_size % count == 0]
            below = max(count for count in fits if count <= world_size)
            above = min((count for count in fits if count >= world_size), default=None)
            processes = f"{below} or {above}" if above else f"{below}"
            raise ValueError(
                f"global_batch_size {global_batch_size} is not divisible by {world_size} processes; use {processes} "
                f"processes, or {global_batch_size // world_size * world_size or world_size}"
            )
        self.steps = range(first_step, last_step)
        self.global_batch_size = global_batch_size
        self.per_process = global_batch_size // world_size
        self.rank = rank
        self.micro_batch_size = (
            self.per_process if micro_batch_size is None else min(micro_batch_size, self.per_process)
        )
        if self.micro_batch_size < 1 or self.per_process % self.micro_batch_size:
            raise ValueError(
                f"data.micro_batch_size {micro_batch_size} does not divide the {self.per_process} pairs of a process "
                f"(global_batch_size {global_batch_size} over {world_size} processes); use "
                f"{_divisors_around(self.per_process, self.micro_batch_size)}"
            )
        self.micro_batches = self.per_process // self.micro_batch_size

    def __len__(self) -> int:
        return len(self.steps) * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = step * self.global_batch_size + self.rank * self.per_process
            for start in range(first, first + self.per_process, self.micro_batch_size):
                yield list(range(start, start + self.micro_batch_size))


def _divisors_around(number: int, wish: int) -> str:
    divisors = [count for count in range(1, number + 1) if number % count == 0]
    below = [count for count in divisors if count < wish][-1:]
    return " or ".join(str(count) for count in [*below, *[count for count in divisors if count > wish][:1]])


class _Reporting(Dataset):
    """Hands out a dataset's errors instead of raising them, which would wrap a worker's in its traceback."""

    def __init__(self, dataset: PairDataset):
        self.dataset = dataset

    def __getitems__(self, positions: list[int]) -> dict[str, Any] | Exception:
        try:
            return self.dataset.__getitems__(positions)
        except (ValueError, OSError) as error:
            return error


def _pack(batch: Any) -> PackedBatch | Exception:
    return batch if isinstance(batch, Exception) else PackedBatch.of(batch)


def build_loader(
    dataset: PairDataset, first_step: int, last_step: int, rank: int, world_size: int, pin_memory: bool
) -> DataLoader:
    """An ordinary DataLoader over the micro-batches of steps [first_step, last_step) that process `rank` takes, each a
    `PackedBatch`, or the ValueError or OSError that there is in its place.

    Raises:
        ValueError: a global batch that the processes do not divide, or a part of it that the micro-batch does not.
    """
    recipe = dataset.recipe
    sizes = (recipe.global_batch_size, rank, world_size, recipe.micro_batch_size)
    return DataLoader(
        _Reporting(dataset),
        batch_sampler=StepSampler(first_step, last_step, *sizes),
        collate_fn=_pack,
        num_workers=recipe.num_workers,
        pin_memory=pin_memory,
    )
