"""The feeding thread copies batches on the GPU of its process, and leaves the other seven alone."""

import threading
import weakref
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from simulated.fake_gpu import DEVICE, Devices, fake_gpu

from flipscale.data.loader import PackedBatch, on_device


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
