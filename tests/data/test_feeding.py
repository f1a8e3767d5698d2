"""The feeder has the next batches on the device ahead, in order, and can be closed at any time."""

import threading
import weakref
from collections.abc import Callable, Generator

import pytest
import torch

from flipscale.data import loader
from flipscale.data.loader import PackedBatch, on_device, prefetch

Batch = list[PackedBatch]


def packed(step: int) -> PackedBatch:
    return PackedBatch.of({"step": torch.tensor([step]), "faults": []})


class Device:
    """The other end of a transfer that copies, and knows which of its batches are still there."""

    def __init__(self) -> None:
        self.there: list[weakref.ref] = []
        self.received: list[int] = []
        self.sent = threading.Semaphore(0)

    def send(self, batch: Batch) -> Batch:
        copies = [PackedBatch(one.buffer.clone(), one.layout, one.faults) for one in batch]
        self.there += [weakref.ref(one) for one in copies]
        self.sent.release()
        return copies

    def receive(self, sent: Batch) -> Batch:
        self.received.append(sent[0]["step"].item())
        return sent

    def count(self) -> int:
        return sum(one() is not None for one in self.there)


class Source:
    """Batches of steps, and whether their generator was closed, and in which thread each was made."""

    def __init__(self, count: int, error: Exception | None = None):
        self.count, self.error = count, error
        self.closed = threading.Event()
        self.threads: set[str] = set()

    def batches(self) -> Generator[Batch, None, None]:
        try:
            for step in range(self.count):
                self.threads.add(threading.current_thread().name)
                yield [packed(step)]
            if self.error is not None:
                raise self.error
        finally:
            self.closed.set()


@pytest.fixture
def feeders() -> Callable[[], int]:
    """Counts the feeders that live and that this test began."""
    before = set(threading.enumerate())
    return lambda: sum(thread.name == "feeder" for thread in set(threading.enumerate()) - before)


def test_batches_come_in_order_from_another_thread_then_the_error(feeders: Callable[[], int]) -> None:
    source, device = Source(4, OSError("the disk is gone")), Device()
    batches = prefetch(source.batches(), device)
    assert [next(batches)[0]["step"].item() for _ in range(4)] == device.received == [0, 1, 2, 3]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert source.threads == {"feeder"}
    assert source.closed.is_set()
    assert feeders() == 0


def test_two_batches_are_there_before_they_are_asked_for_and_no_more() -> None:
    device = Device()
    batches = prefetch(Source(9).batches(), device)
    for step in range(7):
        batch = next(batches)
        for _ in range(3 if step == 0 else 1):
            assert device.sent.acquire(timeout=30)
        assert batch[0]["step"].item() == step
        assert not device.sent.acquire(timeout=0.02)
        assert device.count() == 3 == loader.BATCHES_ON_DEVICE - 1  # no step runs on behind the host's back here
        # As `forward_backward` does: the caller still holds the list.
        batch.clear()
        assert device.count() == 2
    batches.close()


@pytest.mark.parametrize("taken", [1, 6])
def test_closing_amid_a_run_ends_the_thread_and_what_it_reads(taken: int, feeders: Callable[[], int]) -> None:
    source = Source(6)
    batches = prefetch(source.batches(), Device())
    assert len([next(batches) for _ in range(taken)]) == taken
    batches.close()
    assert source.closed.wait(30)
    assert feeders() == 0


def test_closing_does_not_wait_for_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_CLOSING_SECONDS", 0.1)
    is_stuck, disk_answers, closed = threading.Event(), threading.Event(), threading.Event()

    def stuck() -> Generator[Batch, None, None]:
        try:
            yield [packed(0)]
            is_stuck.set()
            disk_answers.wait(600)
            yield [packed(1)]
        finally:
            closed.set()

    device = Device()
    batches = prefetch(stuck(), device)
    next(batches)
    assert is_stuck.wait(60)
    batches.close()
    assert not closed.is_set()
    disk_answers.set()
    assert closed.wait(30), "the thread closes what it read as soon as it can"
    assert device.count() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_batches_arrive_whole_on_a_gpu() -> None:
    values = [torch.arange(1 << 20, dtype=torch.int32) + step for step in range(8)]
    source = ([PackedBatch.of({"values": value, "faults": []}).pin_memory()] for value in values)
    for step, batch in enumerate(on_device(source, torch.device("cuda", 0))):
        assert torch.equal(batch[0]["values"].cpu(), values[step])
        batch.clear()
