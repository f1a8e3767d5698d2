"""The loaders of open_clip and of webdataset with torchvision, measured beside ours on the same shards."""

import importlib.metadata
import importlib.util
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import torch

from flipscale.benchmarks.data import DataSetting, device_bytes, flipscale_batches
from flipscale.benchmarks.memory import resident_peak_bytes
from flipscale.data.sources.shard_list import expand_shards
from flipscale.io.errors import UserError

# The tar reader of open_clip fails with later versions (KeyError: 'fname').
WEBDATASET = "0.2.86"
_SHUFFLED = 1000  # samples in webdataset's shuffle buffer
_UNCOUNTED = 2  # batches of each loader before the timed ones


def require_data_peer() -> None:
    """Raise if open_clip's training loader cannot run.

    Raises:
        ValueError: a package is missing or of another version.
    """
    needed = ("open_clip", "open_clip_train", "torchvision", "webdataset", "pandas")
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed; pip install 'flipscale[peers]'")
    version = importlib.metadata.version("webdataset")
    if version != WEBDATASET:
        raise UserError(
            f"webdataset is {version}; open_clip's loader needs {WEBDATASET}: pip install webdataset=={WEBDATASET}"
        )


def _shard_names(setting: DataSetting) -> list[str]:
    return [str(path) for path in expand_shards(setting.data.shards)]


def open_clip_batches(setting: DataSetting) -> Iterator[dict[str, Any]]:
    """Yield batches of open_clip's `get_wds_dataset` with its own training transform and tokenizer.

    Shards are drawn with replacement, as in its large runs (`--dataset-resampled`), so that its buffers stay full.
    """
    import open_clip
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    transform = image_transform(setting.shape.image_size, is_train=True, aug_cfg={"scale": setting.data.crop_scale})
    tokenizer = open_clip.SimpleTokenizer(context_length=setting.shape.max_tokens)
    # The names are those of its command line.
    args = SimpleNamespace(
        train_data="::".join(_shard_names(setting)),
        train_num_samples=2**40,
        dataset_resampled=True,
        train_data_upsampling_factors=None,
        seed=setting.seed,
        workers=setting.data.num_workers,
        world_size=1,
        batch_size=setting.data.global_batch_size,
    )
    for images, texts in get_wds_dataset(args, transform, True, tokenizer=tokenizer).dataloader:
        yield {"pixel_values": images, "input_ids": texts}


def webdataset_batches(setting: DataSetting) -> Iterator[dict[str, Any]]:
    """Yield batches of a plain webdataset pipeline with torchvision's random crop and our tokenizer."""
    import webdataset
    from torchvision import transforms

    dataset = setting.dataset()
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(setting.shape.image_size, scale=setting.data.crop_scale),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    tokenizer = dataset.tokenizer
    assert tokenizer is not None

    def tokens(text: str) -> torch.Tensor:
        length = setting.shape.max_tokens
        encoded = tokenizer(text, padding="max_length", max_length=length, truncation=True)
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
    for images, texts in webdataset.WebLoader(pipeline, batch_size=None, num_workers=setting.data.num_workers):
        yield {"pixel_values": images, "input_ids": texts}


LOADERS: dict[str, Callable[[DataSetting], Iterator[dict[str, Any]]]] = {
    "flipscale": flipscale_batches,
    "open_clip": open_clip_batches,
    "webdataset": webdataset_batches,
}


class LoaderProcess:
    """A loader in a process of its own, like a worker's. It makes a batch when it is asked to and is idle otherwise."""

    def __init__(self, name: str, setting: DataSetting):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, setting), daemon=True)
        self._process.start()
        theirs.close()

    def next_batch(self) -> dict[str, Any]:
        """Return wall and CPU seconds of the next batch, its bytes for each image, and the peak memory so far.

        Raises:
            OSError: the loader failed.
        """
        try:
            self._connection.send("next")
            answer = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise OSError("a loader's process died; its traceback is above") from error
        return answer

    def __enter__(self) -> "LoaderProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        self._process.kill()


def _serve(connection: Connection, name: str, setting: DataSetting) -> None:
    """Run in a loader's process: make a batch for each message received, until the connection closes."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    batches = LOADERS[name](setting)
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        wall, cpu = time.perf_counter(), time.process_time()
        batch = next(batches)
        seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        sizes = device_bytes(batch, setting.data.global_batch_size)
        connection.send({**seconds, **sizes, "peak_memory_bytes_per_worker": resident_peak_bytes()})


def compare_data(setting: DataSetting, loaders: tuple[str, ...] = tuple(LOADERS)) -> list[dict[str, Any]]:
    """Return a row for each loader: the median images/s of one worker over `num_batches` batches.

    The loaders make batches in turn (A B C A B C); the first two of each are not counted. `cpu_share` is the median
    share of a core that the worker got, `ratio` our speed over this loader's.

    Raises:
        ValueError: a peer is not installed.
    """
    if set(loaders) - {"flipscale"}:
        require_data_peer()
    setting = replace(setting, data=replace(setting.data, num_workers=0))
    batch_size = setting.data.global_batch_size
    with ExitStack() as stack:
        running = {name: stack.enter_context(LoaderProcess(name, setting)) for name in loaders}
        for loader in itertools.chain.from_iterable([list(running.values())] * _UNCOUNTED):
            loader.next_batch()
        turns = [{name: loader.next_batch() for name, loader in running.items()} for _ in range(setting.num_batches)]
    rows = []
    for name in loaders:
        wall = statistics.median(turn[name]["wall_s"] for turn in turns)
        rows.append(
            {
                "code": name,
                "shards": setting.data.shards,
                "mask_ratio": setting.mask_ratio if name == "flipscale" else 0.0,
                "images_per_s_per_worker": batch_size / wall,
                "cpu_share": statistics.median(turn[name]["cpu_s"] / turn[name]["wall_s"] for turn in turns),
                **{key: value for key, value in turns[-1][name].items() if key not in ("wall_s", "cpu_s")},
            }
        )
    ours = rows[0]["images_per_s_per_worker"]
    return [{**row, "ratio": ours / row["images_per_s_per_worker"]} for row in rows]


def shards_in(folders: list[str]) -> list[str]:
    """Return `folders`, each one that holds no shards itself replaced by the folders of shards in it.

    Raises:
        ValueError: a folder has no shards.
    """
    found = []
    for folder in folders:
        below = sorted({str(path.parent) for path in Path(folder).glob("*/*.tar")})
        found += [folder] if list(Path(folder).glob("*.tar")) or not below else below
    for shards in found:
        expand_shards(shards)
    return found
