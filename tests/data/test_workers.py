"""Workers get little, have no threads of their own, and may die; batches come all the same, each in one buffer."""

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import launch
from data.conftest import pair_dataset
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from flipscale.data import loader as data_loader
from flipscale.data.loader import PackedBatch, build_loader, on_device, prefetch, restartable_batches
from flipscale.data.pairs import PairDataset
from flipscale.data.samples import Sample
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.whole_images import decoded_batches


@pytest.fixture(autouse=True)
def quick_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch look every tenth of a second for dead workers, in place of every five seconds."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))


class Probe(PairDataset):
    """Pairs, and how many threads the process that makes them has by then."""

    def __getitems__(self, positions: list[int]) -> dict:
        batch = super().__getitems__(positions)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {**batch, "threads": torch.tensor([int(status["Threads"]), torch.get_num_threads()])}


class Nowhere:
    """A transfer to where the batches already are."""

    def send(self, batch: list[PackedBatch]) -> list[PackedBatch]:
        return batch

    def receive(self, sent: list[PackedBatch]) -> list[PackedBatch]:
        return sent


@pytest.mark.parametrize("is_fed", [False, True])
def test_a_worker_that_is_killed_costs_no_batch(
    shards: Path, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture, is_fed: bool
) -> None:
    source = TarSource(str(shards))
    whole = list(restartable_batches(pair_dataset(source, tokenizer_dir), 0, 12, 1, 3))
    others = {child.pid for child in multiprocessing.active_children()}
    iter(DataLoader([0], num_workers=1))  # which sets torch's handler, if no loader has yet
    fed = pair_dataset(source, tokenizer_dir, num_workers=2, micro_batch_size=4)
    batches, got = restartable_batches(fed, 0, 12, 1, 3), []
    batches = prefetch(batches, Nowhere()) if is_fed else batches
    for step, batch in enumerate(batches):
        got.append(batch)
        if step == 1:
            victim = next(child.pid for child in multiprocessing.active_children() if child.pid not in others)
            os.kill(victim, signal.SIGKILL)
            time.sleep(0.1)  # the signal of its death comes here, in the middle of a step
    assert len(got) == len(whole) == 12
    for ours, (theirs,) in zip(got, whole, strict=True):
        assert len(ours) == 2
        assert ours[0].keys() == ours[1].keys() == theirs.keys()
        assert all(torch.equal(torch.cat([part[name] for part in ours]), theirs[name]) for name in theirs)
    said = caplog.text
    assert f"a loader worker (pid {victim}) died while reading {shards}/0000" in said
    assert "; starting the workers again at step " in said
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


class Poisoned(TarSource):
    """Whoever reads its shard 3 is killed."""

    def read(self, shard: int, number: int) -> Sample:
        if shard == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(shard, number)


def test_a_shard_that_kills_its_readers_stops_the_run(
    shards: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_loader, "_MAX_DEATHS_IN_A_ROW", 1)
    batches = restartable_batches(pair_dataset(Poisoned(str(shards)), tokenizer_dir, num_workers=1), 0, 40, 0, 1)
    with pytest.raises(OSError, match=r"died while reading .*00003.tar; that is 1 times in a row at step \d+: remove"):
        list(batches)


def test_an_error_of_a_worker_comes_without_its_traceback(shards: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    source = TarSource(str(shards))
    source.list.folder = str(tmp_path / "gone")
    with pytest.raises(ValueError, match="is gone, but its manifest lists it") as raised:
        list(restartable_batches(pair_dataset(source, tokenizer_dir, num_workers=1), 0, 1, 0, 1))
    assert "Traceback" not in str(raised.value)
    assert "gone/0000" in str(raised.value)


def test_a_batch_is_one_buffer(shards: Path, tokenizer_dir: Path) -> None:
    data = pair_dataset(shards, tokenizer_dir)
    batch = data.__getitems__(list(range(24)))
    packed = PackedBatch.of(batch)
    assert packed.keys() == batch.keys() - {"faults"}
    assert all(torch.equal(packed[name], batch[name]) and packed[name].dtype == batch[name].dtype for name in packed)
    storages = {value.untyped_storage().data_ptr() for value in packed.values()}
    assert storages == {packed.buffer.untyped_storage().data_ptr()}
    assert list(on_device(iter([[packed]]), torch.device("cpu"))) == [[packed]]


class HandsOver:
    """Batches of a loader whose worker dies after it announced the third batch, before the batch can be opened."""

    def __init__(self, loader: DataLoader):
        self.batches, self.left = iter(loader), 2
        self._workers = self.batches._workers

    def __iter__(self) -> Iterator[PackedBatch]:
        return self

    def __next__(self) -> PackedBatch:
        if not self.left:
            os.kill(self._workers[0].pid, signal.SIGKILL)
            raise ConnectionResetError(104, "Connection reset by peer")
        self.left -= 1
        return next(self.batches)


def test_a_worker_that_dies_while_it_hands_over_is_a_death(
    shards: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The error does not name the worker, which has ended; without a dead worker, the same error ends the run."""
    data = pair_dataset(shards, tokenizer_dir, num_workers=1)
    starts = iter([HandsOver, iter])
    monkeypatch.setattr(data_loader, "start_workers", lambda loader: next(starts)(loader))
    got = [batch for (batch,) in restartable_batches(data, 0, 5, 0, 1)]
    monkeypatch.undo()
    whole = [batch for (batch,) in restartable_batches(data, 0, 5, 0, 1)]
    assert all(torch.equal(a["patches"], b["patches"]) for a, b in zip(got, whole, strict=True))
    assert re.search(
        r"a loader worker \(pid \d+\) died while reading .*; starting the workers again at step 2", caplog.text
    )
    monkeypatch.setattr(os, "kill", lambda pid, number: None)
    monkeypatch.setattr(data_loader, "_DYING_SECONDS", 0.1)
    monkeypatch.setattr(data_loader, "start_workers", HandsOver)
    with pytest.raises(ConnectionResetError):
        list(restartable_batches(data, 0, 5, 0, 1))


class Ends(Dataset):
    """Its second batch ends as `end` says."""

    def __init__(self, end: Callable[[], object]):
        self.end = end

    def __getitems__(self, rows: range) -> object:
        return self.end() if rows.start else rows


def _fails(error: Exception) -> object:
    raise error


@pytest.mark.parametrize(
    ("end", "kind", "words"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), OSError, r"died \(pid \d+\); give it more memory"),
        (lambda: os._exit(0), OSError, r"died \(pid \d+\)"),
        (lambda: _fails(RuntimeError("a fault of the model")), RuntimeError, "a fault of the model"),
        (lambda: ConnectionResetError("the server ended it"), ConnectionResetError, "^the server ended it"),
    ],
)
def test_a_worker_s_death_is_told_from_its_errors(
    monkeypatch: pytest.MonkeyPatch, end: Callable[[], object], kind: type[Exception], words: str
) -> None:
    monkeypatch.setattr(data_loader, "_DYING_SECONDS", 0.3)
    with pytest.raises(kind, match=words) as raised:
        list(decoded_batches(Ends(end), [range(0, 4), range(4, 8)], 1))
    assert type(raised.value) is kind


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_make_the_same_batches_on_one_thread_each(
    shards: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setenv("RAYON_NUM_THREADS", "8")
    monkeypatch.setattr(data_loader, "worker_context", lambda: method)
    data = pair_dataset(shards, tokenizer_dir, kind=Probe, num_workers=2)
    got = list(restartable_batches(data, 0, 6, 0, 1))
    whole = list(build_loader(pair_dataset(shards, tokenizer_dir, kind=Probe), 0, 6, 0, 1))
    for (ours,), theirs in zip(got, whole, strict=True):
        # Its main thread, the one that hands batches over, and what numpy's library starts; not the tokenizer's eight.
        assert ours["threads"].tolist()[0] < 8
        assert ours["threads"].tolist()[1] == 1
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs.keys() - {"threads"})
    # What a worker reads is seen here, for the message when it dies.
    pids = {pid for pid, _ in data.reading.tolist()}
    assert len(pids) == 2
    assert min(pids) > 0


SIGNALLED = """
import os, signal, sys
from multiprocessing import forkserver
from flipscale.data import loader

loader.worker_context = lambda: "forkserver"

def main():
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    for number in numbers:
        signal.signal(number, lambda *about: None)
    loader.prepare_workers([])
    batches = loader.start_workers(loader.DataLoader(
        range(1000), num_workers=2, worker_init_fn=loader.set_up_worker, multiprocessing_context="forkserver"
    ))
    next(batches)
    server = forkserver._forkserver._forkserver_pid
    for number in numbers:
        for pid in (os.getpid(), server, *(worker.pid for worker in batches._workers)):
            os.kill(pid, number)
    assert sum(1 for _ in batches) == 999
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()), "the trainer must hear its signals"

if __name__ == "__main__":
    main()
"""


def test_workers_of_a_server_outlive_a_batch_system_s_signals(tmp_path: Path) -> None:
    """With GPUs, workers are children of a server, which the signals reach too."""
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    done = launch([sys.executable, str(script)])
    assert done.returncode == 0, done.stderr
