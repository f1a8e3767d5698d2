"""The step of large worlds, as one process of them takes it."""

import pytest
import torch
from simulated.worlds import step

ENGINES = ("ddp", "fsdp2", "hsdp")
MUON, PARTS = "--optim.name=muon", "--data.micro_batch_size=256"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("flags", [(), (MUON,), (PARTS,), (MUON, PARTS)])
def test_the_host_waits_once(engine: str, flags: tuple[str, ...]) -> None:
    found = step(engine, 8, 1, *flags)
    # It reads the verdict on the step before.
    assert [where.partition(":")[0] for where in found.host_syncs] == ["engines/device.py"], found.host_syncs


def test_the_loss_does_as_much_in_any_world() -> None:
    small, large, huge = (step("fsdp2", world, 1).loss_ops for world in (8, 256, 1024))
    assert small == large == huge
    assert small.total() > 50


@pytest.mark.parametrize("engine", ENGINES)
def test_all_that_is_sent_is_on_the_accelerator(engine: str) -> None:
    found = step(engine, 8, 1, MUON, PARTS)
    assert found.collectives
    assert {device for one in found.collectives for device in one.devices} == {"cuda"}


@pytest.mark.parametrize("engine", ENGINES)
def test_attention_is_flash(engine: str) -> None:
    calls = step(engine, 8, 1).attention
    assert len(calls) == 4
    assert {(dtype, has_mask) for dtype, _, has_mask in calls} == {(torch.bfloat16, False)}
    assert all(width % 8 == 0 for _, width, _ in calls)
