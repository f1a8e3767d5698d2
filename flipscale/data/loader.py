"""Batches: a pure function of (recipe, step), decoded, masked and tokenised in the workers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flipscale.data.decode import DRAWS_PER_CROP, UndecodableImage, decode_box, visible_patches
from flipscale.data.masks import MaskRecipe, keyed_patches, mask_tokens
from flipscale.data.order import GlobalOrder
from flipscale.data.randomness import keyed_uniform
from flipscale.data.tar_source import TarSource
from flipscale.data.tokenizers import bert_tokenizer
from flipscale.model import FlipConfig
from flipscale.model.masking import check_image_mask, num_kept

# How many neighbours are tried in place of a sample that cannot be used, before the shard is called bad.
_MAX_REPLACEMENTS = 64


@dataclass(frozen=True)
class DataRecipe:
    """What is read, and how it becomes a batch.

    Args:
        shards: a folder of tar shards, a glob, or a range such as `laion/{00000..41407}.tar`.
        tokenizer: a folder or Hub name of a fast tokenizer, or `bert` for the original's WordPiece without special
            tokens.
        global_batch_size: pairs a step over all processes; every process takes an equal part.
        crop_scale: area of the random crop as a fraction of the image; 0.5 to 1 in the paper.
        shards_per_block: shards shuffled together; bounds memory and open files.
        num_workers: decoding processes for each training process. Does not change what is learned.
    """

    shards: str = ""
    tokenizer: str = "bert"
    global_batch_size: int = 4096
    crop_scale: tuple[float, float] = (0.5, 1.0)
    shards_per_block: int = 16
    num_workers: int = 8


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
    `input_ids` and `attention_mask` int64 `(batch, max_tokens)`, `num_replaced` int64 `()`: samples that could not be
    used and were replaced by their next good neighbour in the shard, a rule that every rank and rerun takes alike.

    Several views of a masked image are `patches` `(batch, views, kept, 3 * p * p)` and `patch_index`
    `(batch, views, kept)`; where words are masked too, the captions have the tokens that are left and their
    `position_ids`.
    """

    def __init__(
        self,
        source: TarSource,
        tokenizer: PreTrainedTokenizerBase,
        recipe: DataRecipe,
        shape: InputShape,
        seed: int,
        mask_ratio: float,
        mask: MaskRecipe | None = None,
        text_mask_ratio: float = 0.0,
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
        self.kept = num_kept(shape.num_patches, mask_ratio)
        num_kept(shape.max_tokens, text_mask_ratio, "tokens")
        if mask_ratio > 0.0:
            check_image_mask(shape.side, shape.side, mask_ratio, self.mask.kind, self.mask.views)
        self.order = GlobalOrder(source.shard_sizes, seed, recipe.shards_per_block)

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        where = np.asarray(positions, dtype=np.int64)
        shards, numbers = self.order.locate(where)
        draws = keyed_uniform(self.seed, "crop", where, DRAWS_PER_CROP)
        index, patch_size = None, self.shape.patch_size
        if self.mask_ratio > 0.0:
            index = keyed_patches(self.seed, where, self.shape.side, self.mask_ratio, self.mask)
            index = index if self.mask.views > 1 else index[:, 0]
        kept = (len(where), self.kept) if index is None else index.shape
        patches = np.empty((*kept, 3 * patch_size**2), np.uint8)
        captions, num_replaced = [], 0
        for row, (shard, number) in enumerate(zip(shards.tolist(), numbers.tolist(), strict=True)):
            image, caption, skipped = self._usable(shard, number, draws[row])
            patches[row] = visible_patches(image, patch_size, None if index is None else index[row])
            captions.append(caption)
            num_replaced += skipped
        batch = tokenise(self.tokenizer, captions, self.shape.max_tokens)
        if self.text_mask_ratio > 0.0:
            batch = mask_tokens(batch, self.seed, where, self.text_mask_ratio, self.mask)
        batch["patches"] = torch.from_numpy(patches)
        if index is not None:
            batch["patch_index"] = torch.from_numpy(index)
        batch["num_replaced"] = torch.tensor(num_replaced)
        return batch

    def _usable(self, shard: int, number: int, draws: np.ndarray) -> tuple[np.ndarray, str, int]:
        size = self.source.shard_sizes[shard]
        tried = min(_MAX_REPLACEMENTS, size)
        for skipped in range(tried):
            sample = self.source.read(shard, (number + skipped) % size)
            try:
                caption = (sample.caption or b"").decode("utf-8").strip()
                if caption:
                    image = decode_box(sample.image, draws, self.shape.image_size, self.recipe.crop_scale)
                    return image, caption, skipped
            except (UndecodableImage, UnicodeDecodeError):
                continue
        raise ValueError(
            f"shard {self.source.paths[shard]}: {tried} samples in a row from number {number} have no readable "
            "image and caption; fetch the shard again or remove it"
        )


class StepSampler(Sampler[list[int]]):
    """For each step in [first_step, last_step), the positions that process `rank` of `world_size` takes."""

    def __init__(self, first_step: int, last_step: int, global_batch_size: int, rank: int, world_size: int):
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

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = step * self.global_batch_size + self.rank * self.per_process
            yield list(range(first, first + self.per_process))


def _as_it_is(batch: Any) -> Any:
    return batch


def build_loader(
    dataset: PairDataset, first_step: int, last_step: int, rank: int, world_size: int, pin_memory: bool
) -> DataLoader:
    """An ordinary DataLoader over the batches of steps [first_step, last_step) that process `rank` takes.

    Raises:
        ValueError: a global batch that the processes do not divide.
    """
    recipe = dataset.recipe
    return DataLoader(
        dataset,
        batch_sampler=StepSampler(first_step, last_step, recipe.global_batch_size, rank, world_size),
        collate_fn=_as_it_is,
        num_workers=recipe.num_workers,
        pin_memory=pin_memory,
    )
