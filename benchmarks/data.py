"""Measure our loader, open_clip's, and webdataset with torchvision in turn, on the same shards, one worker each.

    python benchmarks/data.py --shards data/photos/500x400 data/photos/1024x768

`--alone` measures ours in detail, with a worker on each core at once:

    python benchmarks/data.py --alone --shards data/photos/500x400
"""

import argparse
import cProfile
import importlib.metadata
import inspect
import itertools
import json
import multiprocessing
import os
import pstats
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.step_times import Figures
from flipscale.data import decode
from flipscale.data.captions import tokenise
from flipscale.data.columns import pixels, tokens
from flipscale.data.loader import PackedBatch, build_loader, keep_decoded_memory
from flipscale.data.masks import keyed_patches
from flipscale.data.pairs import InputShape, PairDataset
from flipscale.data.randomness import keyed_uniform
from flipscale.data.sources.manifest import ShardList
from flipscale.data.sources.opening import open_source
from flipscale.data.tokenizers import load_tokenizer
from flipscale.io.cores import usable_cores
from flipscale.model import FlipConfig
from flipscale.recipe.data import DataRecipe

Batches = Iterator[dict[str, Any]]
CAPTIONS_FOR_TOKENIZER = 2000
WEBDATASET = "0.2.86"  # the tar reader of open_clip fails with later versions (KeyError: 'fname')
_SHUFFLED = 1000  # samples in webdataset's shuffle buffer
_WARM_UP = 2  # untimed batches of each loader


@dataclass(frozen=True)
class DataSetting:
    """Shards and batches of a measured loader.

    Args:
        data: recipe of the data. The tokenizer `captions` is a WordPiece trained on the shards' captions.
        mask_ratio: fraction of the patches that is removed.
        num_batches: timed batches of each worker.
    """

    data: DataRecipe
    shape: InputShape = field(default_factory=lambda: InputShape(224, 16, 32))
    mask_ratio: float = 0.75
    num_batches: int = 10

    def dataset(self) -> PairDataset:
        """Return the training pairs, as `pretrain` makes them."""
        source = open_source(self.data)
        if self.data.tokenizer == "captions":
            captions = [source.read(*place).captions for place in _places(source.shard_sizes, CAPTIONS_FOR_TOKENIZER)]
            tokenizer = caption_tokenizer([text.decode(errors="replace") for texts in captions for text in texts])
        else:
            tokenizer = load_tokenizer(self.data.tokenizer, self.shape.max_tokens)
        return PairDataset(source, tokenizer, self.data, self.shape, 0, self.mask_ratio)


def _places(shard_sizes: Sequence[int], count: int) -> Iterator[tuple[int, int]]:
    """Yield (shard, index) of the first `count` samples, or of all if there are fewer."""
    places = ((shard, index) for shard, size in enumerate(shard_sizes) for index in range(size))
    return itertools.islice(places, count)


def caption_tokenizer(captions: list[str]) -> PreTrainedTokenizerBase:
    """Return a lower-case WordPiece of at most 30,522 words, trained on `captions`: BERT's cost without a download."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]"]
    backend.train_from_iterator(captions, trainers.WordPieceTrainer(special_tokens=special, show_progress=False))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_input_names": ["input_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def flipscale_batches(setting: DataSetting) -> Batches:
    """Return an endless iterator over our batches, made in this process or by the setting's workers."""
    return iter(build_loader(setting.dataset(), 0, sys.maxsize, 0, 1))


def open_clip_batches(setting: DataSetting) -> Batches:
    """Yield batches of open_clip's `get_wds_dataset` with its own training transform and tokenizer.

    Shards are drawn with replacement, as in its large runs (`--dataset-resampled`), so that its buffers stay full.
    """
    import open_clip
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    transform = image_transform(setting.shape.image_size, is_train=True, aug_cfg={"scale": setting.data.crop_scale})
    tokenizer = open_clip.SimpleTokenizer(context_length=setting.shape.max_tokens)
    # Names of its command line.
    args = SimpleNamespace(
        train_data="::".join(_shard_names(setting)),
        train_num_samples=2**40,
        dataset_resampled=True,
        train_data_upsampling_factors=None,
        seed=0,
        workers=0,
        world_size=1,
        batch_size=setting.data.global_batch_size,
    )
    for images, texts in get_wds_dataset(args, transform, True, tokenizer=tokenizer).dataloader:
        yield {"pixel_values": images, "input_ids": texts}


def webdataset_batches(setting: DataSetting) -> Batches:
    """Yield batches of a plain webdataset pipeline with torchvision's random crop and our tokenizer."""
    import webdataset
    from torchvision import transforms

    tokenizer = setting.dataset().given.tokenizer
    assert tokenizer is not None
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(setting.shape.image_size, scale=setting.data.crop_scale),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    def tokens(text: str) -> torch.Tensor:
        encoded = tokenizer(text, padding="max_length", max_length=setting.shape.max_tokens, truncation=True)
        return torch.tensor(encoded["input_ids"])

    pipeline = webdataset.DataPipeline(
        webdataset.ResampledShards(_shard_names(setting)),
        webdataset.tarfile_to_samples(handler=webdataset.ignore_and_continue),
        webdataset.shuffle(_SHUFFLED),
        webdataset.decode("pilrgb"),
        webdataset.to_tuple("jpg;png;jpeg;webp", "txt"),
        webdataset.map_tuple(transform, tokens),
        webdataset.batched(setting.data.global_batch_size),
    )
    for images, texts in webdataset.WebLoader(pipeline, batch_size=None, num_workers=0):
        yield {"pixel_values": images, "input_ids": texts}


def _shard_names(setting: DataSetting) -> list[str]:
    shards = ShardList(setting.data.shards)
    return [str(shards.path(name)) for name in shards.names()]


LOADERS: dict[str, Callable[[DataSetting], Batches]] = {
    "flipscale": flipscale_batches,
    "open_clip": open_clip_batches,
    "webdataset": webdataset_batches,
}


def compare_data(setting: DataSetting, loaders: tuple[str, ...] = tuple(LOADERS)) -> list[Figures]:
    """Return a row for each loader: the median images/s of one worker over `num_batches` batches.

    The loaders make batches in turn (A B C A B C). `cpu_share` is the median share of a core that the worker got,
    `ratio` our speed over this loader's.
    """
    batch_size = setting.data.global_batch_size
    with ExitStack() as stack:
        running = {name: stack.enter_context(_loader_process(name, setting)) for name in loaders}

        def turn() -> dict[str, dict[str, float]]:
            rows = {}
            for name, connection in running.items():
                connection.send("next")
                rows[name] = connection.recv()
            return rows

        turns = [turn() for _ in range(_WARM_UP + setting.num_batches)][_WARM_UP:]
    walls = {name: statistics.median(row[name].pop("wall_s") for row in turns) for name in loaders}
    return [
        {
            "code": name,
            "shards": setting.data.shards,
            "mask_ratio": setting.mask_ratio if name == "flipscale" else 0.0,
            "images_per_s_per_worker": batch_size / walls[name],
            **turns[-1][name],
            "cpu_share": statistics.median(row[name]["cpu_share"] for row in turns),
            "ratio": walls[name] / walls[loaders[0]],
        }
        for name in loaders
    ]


def _loader_process(name: str, setting: DataSetting) -> Connection:
    """Start a loader in its own process and return its connection: each message asks for a batch."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_serve, args=(theirs, name, setting), daemon=True).start()
    theirs.close()
    return ours


def _settle(name: str = "flipscale") -> None:
    """Set up this process as a worker of a loader, except for its signals."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if name == "flipscale":
        keep_decoded_memory()


def _serve(connection: Connection, name: str, setting: DataSetting) -> None:
    _settle(name)
    batches = LOADERS[name](setting)
    while True:
        try:
            connection.recv()
        except EOFError:  # the parent has closed the connection
            return
        wall, cpu = time.perf_counter(), time.process_time()
        batch = next(batches)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        sizes = device_bytes(batch, setting.data.global_batch_size)
        memory = {"peak_memory_bytes_per_worker": peak_memory()}
        connection.send({"wall_s": wall, "cpu_share": cpu / wall, **sizes, **memory})


def measure_data(setting: DataSetting) -> Figures:
    """Return speed, bytes, memory and time shares of the loader that `pretrain` uses, ready for JSON.

    The shares are those of as many processes at once as there are workers. With a GPU, `transfer_ms` is the time in
    which a batch is pinned and copied there, beside the decoding.
    `bytes_to_device_per_image` counts pixels, `other_bytes_to_device_per_image` patch indices and tokens.
    `peak_memory_bytes_per_worker` is a worker's peak resident memory; it includes pages shared with the parent.
    """
    num_workers, batch_size = setting.data.num_workers, setting.data.global_batch_size
    batches, workers = flipscale_batches(setting), max(1, num_workers)
    for _ in range(workers):
        batch = next(batches)
    start = time.perf_counter()
    for _ in range(setting.num_batches * workers):
        batch = next(batches)
    images_per_s = setting.num_batches * workers * batch_size / (time.perf_counter() - start)
    pids = [child.pid for child in multiprocessing.active_children()] if num_workers else ["self"]
    memory = max(peak_memory(pid) for pid in pids)
    del batches
    dataset = setting.dataset()
    # Forked, as the loader's workers are without a GPU.
    with multiprocessing.get_context("fork").Pool(workers, _settle) as pool:
        shares = pool.map(time_shares, workers * [dataset], chunksize=1)
    read_bytes = np.mean([_sample_bytes(dataset, position) for position in range(256)])
    return {
        "code": "flipscale",
        "shards": setting.data.shards,
        "image_size": setting.shape.image_size,
        "patch_size": setting.shape.patch_size,
        "mask_ratio": setting.mask_ratio,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "images_per_s": images_per_s,
        "images_per_s_per_worker": images_per_s / workers,
        "images_per_s_per_core": images_per_s / min(workers, usable_cores()),
        "read_mb_per_s": images_per_s * float(read_bytes) / 1e6,
        **device_bytes(batch, batch_size),
        "peak_memory_bytes_per_worker": memory,
        **{name: statistics.mean(share[name] for share in shares) for name in shares[0]},
        **({"transfer_ms": _transfer_ms(batch)} if torch.cuda.is_available() else {}),
    }


def _transfer_ms(batch: PackedBatch) -> float:
    start = time.perf_counter()
    batch.pin_memory().to(torch.device("cuda"))
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def _sample_bytes(dataset: PairDataset, position: int) -> int:
    shard, index = (int(part[0]) for part in dataset.order.locate(np.array([position])))
    sample = dataset.source.read(shard, index)
    return len(sample.image) + sum(map(len, sample.captions))


def device_bytes(batch: Mapping[str, Any], batch_size: int) -> dict[str, float]:
    """Return the bytes per image of a batch's tensors: pixels, and everything else."""
    sizes = {name: value.nbytes / batch_size for name, value in batch.items() if isinstance(value, torch.Tensor)}
    pixels = sum(size for name, size in sizes.items() if name in ("patches", "pixel_values"))
    return {"bytes_to_device_per_image": pixels, "other_bytes_to_device_per_image": sum(sizes.values()) - pixels}


def peak_memory(pid: int | str | None = "self") -> int:
    """Return the peak resident bytes of a process. Needs Linux."""
    match = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    return int(match[1]) * 1024 if match else 0


def time_shares(dataset: PairDataset) -> dict[str, float]:
    """Return the share of each step in a batch's time in one process.

    They are from Python's profiler, which makes short steps look a little longer. `resize` includes the crop; `collate`
    is the rest.
    """
    positions = list(range(min(256, dataset.recipe.global_batch_size)))
    dataset.__getitems__(positions)
    profile = cProfile.Profile()
    profile.runcall(lambda: PackedBatch.of(dataset.__getitems__(positions)))
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]

    def key(function: Callable[..., Any]) -> tuple[str, int, str]:
        """Return the profiler's key of a function: file, line and name."""
        code = inspect.unwrap(function).__code__
        return code.co_filename, code.co_firstlineno, code.co_name

    def seconds(*functions: Callable[..., Any]) -> float:
        return sum(stats.get(key(function), (0,) * 4)[3] for function in functions)

    def seconds_from(function: Callable[..., Any], caller_file: str) -> float:
        callers = stats.get(key(function), (0, 0, 0, 0, {}))[4]
        return sum(times[3] for (file, _, _), times in callers.items() if file == caller_file)

    total, resize = seconds(type(dataset).__getitems__, PackedBatch.of), seconds(decode.Crop.fitted)
    # Large crops are resized inside the decoder, small crops after it.
    within = seconds_from(decode.Crop.fitted, decode.__file__)
    parts = {
        "read": seconds(type(dataset.source).read),
        "decode": seconds(decode.decode_crop) - within,
        "resize": resize,
        "patches": seconds(decode.visible_patches),
        # The order and the masks draw too, within their own time.
        "draw": seconds(type(dataset.order).locate, keyed_patches)
        + sum(seconds_from(keyed_uniform, column.__file__) for column in (pixels, tokens)),
        "tokenise": seconds(tokenise),
    }
    parts["collate"] = total - sum(parts.values())
    return {f"{name}_share": part / total for name, part in parts.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table row or JSON line for each loader and set of shards, or with `--alone` the figures of ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", nargs="+", required=True, help="Folders, globs or ranges of tar shards.")
    parser.add_argument("--alone", action="store_true", help="Measure our loader alone, in detail, as JSON lines.")
    parser.add_argument(
        "--num_workers", type=int, default=usable_cores(),
        help="Workers with --alone, by default one for each core; 0 decodes in this process.",
    )  # fmt: skip
    parser.add_argument("--mask_ratio", type=float, default=0.75, help="Share of patches removed.")
    parser.add_argument("--image_size", type=int, default=224, help="Side of the image in pixels.")
    parser.add_argument("--patch_size", type=int, default=16, help="Side of a patch in pixels.")
    parser.add_argument(
        "--tokenizer", default="captions", help="As in a recipe; `captions` trains one on the captions."
    )
    parser.add_argument("--batch_size", type=int, default=256, help="Pairs in a batch.")
    parser.add_argument("--batches", type=int, default=5, help="Timed batches of each worker.")
    parser.add_argument("--json", action="store_true", help="Print JSON lines instead of a table.")
    args = parser.parse_args(arguments)
    shape = InputShape(args.image_size, args.patch_size, FlipConfig().text_config.max_position_embeddings)
    data = DataRecipe(tokenizer=args.tokenizer, global_batch_size=args.batch_size)
    data = replace(data, num_workers=args.num_workers if args.alone else 0)
    setting = DataSetting(data, shape, args.mask_ratio, num_batches=args.batches)
    if not args.alone:
        version = importlib.metadata.version("webdataset")
        assert version == WEBDATASET, f"webdataset is {version}; use {WEBDATASET}, because open_clip fails with others"
        if not args.json:
            print("| shards | loader | images/s a worker | flipscale is | to the device, kB/image | peak memory, MB |")
            print("|---|---|---:|---:|---:|---:|")
    for shards in args.shards:
        case = replace(setting, data=replace(data, shards=shards))
        for row in [measure_data(case)] if args.alone else compare_data(case):
            print(json.dumps(row) if args.json or args.alone else _table_row(row), flush=True)


def _table_row(row: Figures) -> str:
    return (
        f"| {Path(str(row['shards'])).name} | {row['code']} | {row['images_per_s_per_worker']:.0f} | "
        f"{row['ratio']:.2f}x | {float(row['bytes_to_device_per_image']) / 1000:.1f} | "
        f"{float(row['peak_memory_bytes_per_worker']) / 1e6:.0f} |"
    )


if __name__ == "__main__":
    main()
