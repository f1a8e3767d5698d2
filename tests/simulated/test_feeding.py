"""The feeding thread pins and copies batches on the GPU of its process, and leaves the other seven alone."""

import threading
import weakref
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from simulated.fake_gpu import DEVICE, Devices, fake_gpu

from flipscale.data import loader
from flipscale.data.loader import PackedBatch, loader_of, on_device, start_workers


@pytest.mark.parametrize("device", [DEVICE, torch.device("cuda")], ids=str)
def test_the_feeder_works_on_its_own_gpu_and_lends_no_memory(device: torch.device) -> None:
    """`cuda` without a number is what accelerate gives a single process."""
    lent: list[tuple[int, int]] = []
    pending: list[PackedBatch] = []
    pinned: list[weakref.ref] = []
    most: list[int] = []

    def source() -> Iterator[list[PackedBatch]]:
        for step in range(4):
            yield [PackedBatch.of({"step": torch.tensor([step]), "faults": []})]

    def record(tensor: torch.Tensor, stream: torch.cuda.Stream) -> None:
        lent.append((tensor.untyped_storage()._cdata, stream.device.index))

    def send(batch: PackedBatch, target: torch.device) -> PackedBatch:
        assert torch.cuda.current_stream().device == target == DEVICE
        pending.append(PackedBatch(batch.buffer.clone(), batch.layout, batch.faults))
        return pending[-1]

    def pin(batch: PackedBatch) -> PackedBatch:
        assert torch.cuda.current_device() == DEVICE.index
        assert threading.current_thread().name == "feeder"
        pinned.append(weakref.ref(copy := PackedBatch(batch.buffer.clone(), batch.layout, batch.faults)))
        most.append(sum(one() is not None for one in pinned))
        return copy

    with fake_gpu(lambda _: None, []), patch.object(torch.Tensor, "record_stream", record):
        torch.cuda.set_device(DEVICE)
        Devices.touched.clear()
        with patch.object(PackedBatch, "to", send), patch.object(PackedBatch, "pin_memory", pin):
            steps = [batch[0]["step"].item() for batch in on_device(source(), device)]
    assert steps == list(range(4))
    assert Devices.touched == {DEVICE.index}
    assert most == [1] * 4, "no batch is pinned before the one ahead of it is on its way"
    assert lent == [(batch.buffer.untyped_storage()._cdata, DEVICE.index) for batch in pending]


class Steps(torch.utils.data.Dataset):
    """Batches of a real DataLoader."""

    def __getitems__(self, positions: list[int]) -> PackedBatch:
        return PackedBatch.of({"step": torch.tensor(positions), "faults": []})


@pytest.mark.parametrize("device", [DEVICE, torch.device("cuda")], ids=str)
def test_a_dataloader_is_made_and_pinned_on_the_gpu_of_its_process(device: torch.device) -> None:
    """A pinning thread of torch would take the device of the thread that makes the DataLoader."""
    pinned, made = [], []

    def source() -> Iterator[list[PackedBatch]]:
        made.append(torch.cuda.current_device())
        for batch in start_workers(loader_of(Steps(), [[step] for step in range(4)], 1)):
            yield [batch]

    def pin(batch: PackedBatch) -> PackedBatch:
        pinned.append(torch.cuda.current_device())
        return batch

    with fake_gpu(lambda _: None, []), patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None):
        torch.cuda.set_device(DEVICE)
        Devices.touched.clear()
        with (
            patch.object(PackedBatch, "pin_memory", pin),
            patch.object(PackedBatch, "to", lambda batch, device: batch),
            patch.object(loader, "worker_context", lambda: "fork"),
        ):
            steps = [batch[0]["step"].item() for batch in on_device(source(), device)]
    assert steps == list(range(4))
    assert made == [DEVICE.index]
    assert pinned == [DEVICE.index] * 4
    assert Devices.touched == {DEVICE.index}
