"""What an engine sends and dispatches in worlds that no machine of ours has, under torch's fake process group."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from conftest import TOWER
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from flipscale.engines.engine import Engine
from flipscale.engines.first_weights import fresh_weights
from flipscale.engines.launch import Launch
from flipscale.engines.optimizers import OptimRecipe
from flipscale.engines.start import engine_class
from flipscale.model import FlipConfig


@contextmanager
def fake_world(rank: int, world: int) -> Iterator[None]:
    """This process as one of a world whose collectives send nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Operations(TorchDispatchMode):
    """Counts the operations that reach the device, and the bytes that collectives receive."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(function._overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


def build(launch: Launch, rank: int, recipe: OptimRecipe, layers: int = 2) -> Engine:
    """An engine whose every gradient is 1."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=launch.num_processes, process_index=rank, autocast=None
    )
    engine = engine_class(launch)(cast("Any", accelerator), launch, recipe, launch.num_processes)
    tower = {**TOWER, "num_hidden_layers": layers}
    towers = {
        "vision_config": {**tower, "image_size": 16, "patch_size": 8},
        "text_config": {**tower, "vocab_size": 16, "max_position_embeddings": 8},
    }
    engine.build(FlipConfig(**towers), lambda model: None, fresh_weights(0))
    engine.prepare()
    for parameter in engine.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return engine


@pytest.mark.parametrize("rank", [0, 31, 255])
def test_a_sharded_adamw_dispatches_no_more_for_more_parameters(rank: int) -> None:
    """And takes a process that has no row of most parameters."""
    counts = []
    with fake_world(rank, 256):
        for layers in (2, 4):
            engine = build(Launch("fsdp2", 256), rank, OptimRecipe(max_grad_norm=1e9), layers)
            for _ in range(2):
                for parameter in engine.model.parameters():
                    parameter.grad = torch.ones_like(parameter)
                with Operations() as operations:
                    norm = engine.gradient_norm()
                    engine.step(1e-3, torch.ones(()))
            shapes = [parameter.to_local().shape for parameter in engine.model.parameters()]
            assert norm == pytest.approx(sum(shape.numel() for shape in shapes) ** 0.5)
            assert any(shape.numel() == 0 for shape in shapes) is (rank > 0)
            del operations.counts["aten.detach"], operations.counts["aten.view"]
            counts.append(operations.counts)
    assert counts[0] == counts[1]
    assert 1 <= counts[0]["aten._fused_adamw_"] <= 2
