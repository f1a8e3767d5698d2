"""Workers start from a server where there is a GPU, get little to start from, and have no threads beside their own."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from flipscale.data import loader
from flipscale.data.loader import build_loader, restartable_batches
from flipscale.data.pairs import InputShape, PairDataset
from flipscale.data.recipe import DataRecipe
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder, WholeImages
from flipscale.model import FlipConfig


class Probe(PairDataset):
    """Pairs, and how many threads the process that makes them has by then."""

    def __getitems__(self, positions: list[int]) -> dict:
        batch = super().__getitems__(positions)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {**batch, "threads": torch.tensor([int(status["Threads"]), torch.get_num_threads()])}


def dataset(shards: Path, tokenizer_dir: Path, num_workers: int) -> PairDataset:
    recipe = DataRecipe(global_batch_size=24, shards_per_block=2, lanes=1, num_workers=num_workers)
    return Probe(
        TarSource(str(shards)), AutoTokenizer.from_pretrained(tokenizer_dir), recipe, InputShape(32, 8, 8),
        seed=5, mask_ratio=0.75,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_make_the_same_batches_on_one_thread_each(
    shards: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setenv("RAYON_NUM_THREADS", "8")
    monkeypatch.setattr(loader, "worker_context", lambda: method)
    data = dataset(shards, tokenizer_dir, 2)
    got = list(restartable_batches(data, 0, 6, 0, 1, pin_memory=False))
    whole = list(build_loader(dataset(shards, tokenizer_dir, 0), 0, 6, 0, 1, pin_memory=False))
    for (ours,), theirs in zip(got, whole, strict=True):
        # Its main thread, the one that hands batches over, and what numpy's library starts; not the tokenizer's eight.
        assert ours["threads"].tolist()[0] < 8
        assert ours["threads"].tolist()[1] == 1
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs.keys() - {"threads"})
    # What a worker reads is seen here, for the message when it dies.
    pids = {pid for pid, _ in data.reading.tolist()}
    assert len(pids) == 2
    assert min(pids) > 0


def test_a_worker_gets_no_model(shards: Path, tokenizer_dir: Path) -> None:
    config = FlipConfig()
    embedder = Embedder(SimpleNamespace(config=config, weights=torch.zeros(1 << 20)), None, None, alive=lambda: None)
    images = WholeImages(TarSource(str(shards)), embedder.decoder())
    assert len(pickle.dumps(images)) < 20_000
    assert pickle.loads(pickle.dumps(images)).__getitems__([0, 1])["patches"].shape[0] == 2
