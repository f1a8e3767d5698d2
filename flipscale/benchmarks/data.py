"""How fast training pairs come out of shards, where the time goes, and how many workers a GPU needs."""

import cProfile
import inspect
import math
import multiprocessing
import pstats
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flipscale.benchmarks.memory import resident_peak_bytes
from flipscale.data import decode
from flipscale.data.captions import tokenise
from flipscale.data.loader import build_loader
from flipscale.data.masks.keyed import keyed_patches
from flipscale.data.masks.recipe import MaskRecipe
from flipscale.data.packed import PackedBatch
from flipscale.data.pairs import InputShape, PairDataset
from flipscale.data.randomness import keyed_uniform
from flipscale.data.recipe import DataRecipe
from flipscale.data.sources.opening import open_source
from flipscale.data.tokenizers import load_tokenizer
from flipscale.io.errors import UserError
from flipscale.model import FlipConfig
from flipscale.model.patches import num_kept
from flipscale.planning.flops import forward_flops
from flipscale.training.recipe import Recipe
from flipscale.training.schedule import StageRecipe

CAPTIONS_FOR_TOKENIZER = 2000


@dataclass(frozen=True)
class DataSetting:
    """Which shards are read, and what batches are made of them.

    Args:
        data: the shards, the tokenizer (`captions` trains a WordPiece on the shards' own captions), the batch size of
            one process, its workers and the crop.
        mask_ratio: the fraction of patches that are removed.
        num_batches: batches that are timed for each worker, after one that is not.
    """

    data: DataRecipe
    shape: InputShape = field(default_factory=lambda: InputShape(224, 16, 32))
    mask_ratio: float = 0.75
    mask: MaskRecipe = field(default_factory=MaskRecipe)
    seed: int = 0
    num_batches: int = 10

    def __post_init__(self) -> None:
        for name, value, least in (
            ("batch_size", self.data.global_batch_size, 1),
            ("num_workers", self.data.num_workers, 0),
            ("batches", self.num_batches, 1),
        ):
            if value < least:
                raise UserError(f"{name} is {value}; it must be at least {least}")
        if self.shape.image_size % self.shape.patch_size:
            raise UserError(
                f"image_size {self.shape.image_size} is not divisible by patch_size {self.shape.patch_size}"
            )
        num_kept(self.shape.num_patches, self.mask_ratio)

    @classmethod
    def of(cls, recipe: Recipe, **fields: Any) -> "DataSetting":
        """Return the setting of a recipe's first stage. `fields` that are not None replace those of its `data`."""
        # The lanes of a run's batch need not divide that of one process.
        data = replace(recipe.data, lanes=None, **{name: value for name, value in fields.items() if value is not None})
        first, shape = (recipe.stages or [StageRecipe("", 1)])[0], InputShape.of(recipe.model_config())
        return cls(data, shape.at(first.image_size), first.mask_ratio, recipe.mask, recipe.seed)

    def dataset(self) -> PairDataset:
        """Return the training pairs, as `pretrain` makes them."""
        source = open_source(self.data)
        if self.data.tokenizer == "captions":
            captions = [source.read(*place).captions for place in _places(source.shard_sizes, CAPTIONS_FOR_TOKENIZER)]
            tokenizer = caption_tokenizer([text.decode(errors="replace") for texts in captions for text in texts])
        else:
            tokenizer = load_tokenizer(self.data.tokenizer, self.shape.max_tokens)
        return PairDataset(source, tokenizer, self.data, self.shape, self.seed, self.mask_ratio, self.mask)


def _places(shard_sizes: Any, count: int) -> Iterator[tuple[int, int]]:
    """Yield the first `count` samples as (shard, number), fewer if there are not so many."""
    for shard, size in enumerate(shard_sizes):
        for number in range(min(size, count)):
            yield shard, number
        count -= min(size, count)


def caption_tokenizer(captions: list[str]) -> PreTrainedTokenizerBase:
    """Return a WordPiece trained on `captions`, lower case, of at most 30,522 words.

    It costs what BERT's costs and needs no download.
    """
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]"]
    backend.train_from_iterator(captions, trainers.WordPieceTrainer(special_tokens=special, show_progress=False))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_input_names": ["input_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def flipscale_batches(setting: DataSetting) -> Iterator[dict[str, Any]]:
    """Return an endless iterator over our batches, made in this process or by the setting's workers."""
    return iter(build_loader(setting.dataset(), 0, sys.maxsize, 0, 1, pin_memory=False))


def measure_data(setting: DataSetting) -> dict[str, Any]:
    """Return speed, bytes, memory and time shares of the loader that `pretrain` uses, ready for JSON.

    `bytes_to_device_per_image` are pixels, `other_bytes_to_device_per_image` patch indices and tokens.
    `peak_memory_bytes_per_worker` is a worker's peak resident memory; it includes pages shared with the parent.
    """
    workers = max(1, setting.data.num_workers)
    batches = flipscale_batches(setting)
    for _ in range(workers):
        batch = next(batches)
    num_images = setting.num_batches * workers * setting.data.global_batch_size
    start = time.perf_counter()
    for _ in range(setting.num_batches * workers):
        batch = next(batches)
    images_per_s = num_images / (time.perf_counter() - start)
    pids = [child.pid for child in multiprocessing.active_children()] if setting.data.num_workers else ["self"]
    memory = max(resident_peak_bytes(pid) for pid in pids)
    del batches
    dataset = setting.dataset()
    read_bytes = np.mean([_sample_bytes(dataset, position) for position in range(256)])
    return {
        "shards": setting.data.shards,
        "image_size": setting.shape.image_size,
        "patch_size": setting.shape.patch_size,
        "mask_ratio": setting.mask_ratio,
        "batch_size": setting.data.global_batch_size,
        "num_workers": setting.data.num_workers,
        "images_per_s": images_per_s,
        "images_per_s_per_worker": images_per_s / workers,
        "read_mb_per_s": images_per_s * read_bytes / 1e6,
        **device_bytes(batch, setting.data.global_batch_size),
        "peak_memory_bytes_per_worker": memory,
        **time_shares(dataset),
    }


def _sample_bytes(dataset: PairDataset, position: int) -> int:
    shard, number = (int(part[0]) for part in dataset.order.locate(np.array([position])))
    sample = dataset.source.read(shard, number)
    return len(sample.image) + sum(map(len, sample.captions))


def device_bytes(batch: dict[str, Any], batch_size: int) -> dict[str, float]:
    """Return the bytes of a batch's tensors for each image: those of pixels, and the others."""
    sizes = {name: value.nbytes / batch_size for name, value in batch.items() if isinstance(value, torch.Tensor)}
    pixels = sum(size for name, size in sizes.items() if name in ("patches", "pixel_values"))
    return {
        "bytes_to_device_per_image": pixels,
        "other_bytes_to_device_per_image": sum(sizes.values()) - pixels,
    }


def time_shares(dataset: PairDataset) -> dict[str, float]:
    """Return the shares that the steps have of a batch's time in one process.

    They are from Python's profiler, which makes short steps look a little longer. `resize` includes the crop; `collate`
    is everything that is in no other share.
    """
    positions = list(range(min(256, dataset.recipe.global_batch_size)))
    dataset.__getitems__(positions)
    profile = cProfile.Profile()
    profile.runcall(lambda: PackedBatch.of(dataset.__getitems__(positions)))
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]

    def known_as(function: Callable[..., Any]) -> tuple[str, int, str]:
        """Return how the profiler knows a function: by file, line and name."""
        code: CodeType = inspect.unwrap(function).__code__
        return code.co_filename, code.co_firstlineno, code.co_name

    def seconds(*functions: Callable[..., Any]) -> float:
        return sum(stats.get(known_as(function), (0,) * 4)[3] for function in functions)

    total, resize = seconds(type(dataset).__getitems__, PackedBatch.of), seconds(decode.Crop.fitted)
    # Large crops are resized where they are decoded, small ones later.
    callers = stats.get(known_as(decode.Crop.fitted), (0, 0, 0, 0, {}))[4]
    within = callers.get(known_as(decode.decode_crop), (0,) * 4)[3]
    parts = {
        "read": seconds(type(dataset.source).read),
        "decode": seconds(decode.decode_crop) - within,
        "resize": resize,
        "patches": seconds(decode.visible_patches),
        "draw": seconds(type(dataset.order).locate, keyed_uniform, keyed_patches),
        "tokenise": seconds(tokenise),
    }
    parts["collate"] = total - sum(parts.values())
    return {f"{name}_share": part / total for name, part in parts.items()}


def workers_for_gpu(size: str, mask_ratio: float, tflops: float, images_per_s_per_worker: float) -> dict[str, Any]:
    """Return how many workers keep a GPU busy that reaches `tflops` on a model of `size`.

    The images/s of the GPU follow from the operations of a training step (`planning.flops`).

    Raises:
        ValueError: `tflops` is not positive.
    """
    if not tflops > 0:
        raise UserError(f"gpu_tflops is {tflops}; it must be above 0")
    gpu_rate = tflops * 1e12 / forward_flops(FlipConfig.from_size(size), mask_ratio).training
    return {
        "gpu_model": size,
        "gpu_tflops": tflops,
        "gpu_images_per_s": gpu_rate,
        "workers_for_gpu": math.ceil(gpu_rate / images_per_s_per_worker),
    }
