"""Messages and operations of engines in large worlds, under torch's fake process group."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from conftest import TOWER
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from flipscale.engines import checkpoint
from flipscale.engines.build_engine import engine_class
from flipscale.engines.checkpoint import CheckpointReader, part_of
from flipscale.engines.ddp import DdpEngine
from flipscale.engines.engine import Engine, Layout
from flipscale.engines.first_weights import fresh_weights
from flipscale.engines.fsdp2 import _RowLayout
from flipscale.engines.launch import Launch
from flipscale.engines.muon import Muon, assign_owners, buffer_elements
from flipscale.model import FlipConfig
from flipscale.recipe.optim import OptimRecipe


@contextmanager
def fake_world(rank: int, world: int) -> Iterator[None]:
    """A world whose collectives send nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Recorder(TorchDispatchMode):
    """Counts operations, and keeps the collectives in their order with the numbers in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.collectives: list[tuple[str, int, int]] = []
        self.devices: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function._overloadpacket)
        if function.namespace != "prim":  # asking for a device
            self.counts[name] += 1
        if function.namespace == "c10d":
            tensors = [a[0] if isinstance(a, list) else a for a in args[:2]]
            received, sent = tensors if isinstance(tensors[1], torch.Tensor) else tensors[:1] * 2
            self.collectives.append((name.removeprefix("c10d."), sent.numel(), received.numel()))
            self.devices |= {sent.device.type, received.device.type}
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
    for parameter in engine.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return engine


@pytest.mark.parametrize("rank", [0, 255])
def test_sharded_adamw_dispatches_do_not_grow_with_parameters(rank: int) -> None:
    counts = []
    with fake_world(rank, 256):
        for layers in (2, 4):
            engine = build(Launch("fsdp2", 256), rank, OptimRecipe(max_grad_norm=1e9), layers)
            for _ in range(2):
                for parameter in engine.model.parameters():
                    parameter.grad = torch.ones_like(parameter)
                with Recorder() as operations:
                    norm = engine.gradient_norm()
                    engine.step(1e-3, torch.ones(()))
            shapes = [parameter.to_local().shape for parameter in engine.model.parameters()]
            assert norm == pytest.approx(sum(shape.numel() for shape in shapes) ** 0.5)
            assert any(shape.numel() == 0 for shape in shapes) is (rank > 0)
            del operations.counts["aten.detach"], operations.counts["aten.view"]
            counts.append(operations.counts)
    assert counts[0] == counts[1]
    assert 1 <= counts[0]["aten._fused_adamw_"] <= 2


def h14_shapes(divisor: int = 1) -> tuple[torch.Size, ...]:
    """The 336 matrices of H/14's blocks, their sides divided."""
    found = []
    for width, layers in ((1280 // divisor, 32), (1024 // divisor, 24)):
        block = [*[(width, width)] * 4, (4 * width, width), (width, 4 * width)]
        found += [torch.Size(shape) for shape in block] * layers
    return tuple(found)


def muon_step(matrices: list[nn.Parameter], group: dist.ProcessGroup | None) -> Recorder:
    for matrix in matrices:
        matrix.grad = torch.ones_like(matrix)
    muon = Muon(matrices, 0.1, 0.95, torch.bfloat16, group)
    with Recorder() as recorder:
        muon.step()
    return recorder


@pytest.mark.parametrize("world", [8, 1024])
def test_muon_under_ddp_receives_each_matrix_once(world: int) -> None:
    shapes = h14_shapes(divisor=32)
    with fake_world(world - 1, world):
        engine = DdpEngine(
            cast("Any", SimpleNamespace(num_processes=world, process_index=world - 1)),
            Launch("ddp", world, processes_per_node=8),
            OptimRecipe(name="muon"),
            world,
        )
        group = engine._muon_group()
        assert group is not None
        assert dist.get_process_group_ranks(group) == list(range(world - 8, world))
        operations = muon_step([nn.Parameter(torch.ones(shape)) for shape in shapes], group)
    useful = sum(shape.numel() for shape in shapes)
    ((name, _, received),) = operations.collectives
    assert name == "_allgather_base_"
    assert useful <= received < 1.02 * useful


@pytest.mark.parametrize("world", [8, 1024])
def test_muon_of_rows_receives_no_more_than_it_needs(world: int) -> None:
    """A process receives its rows of all matrices and the matrices that it computes, in any world."""
    shapes, counts = h14_shapes(divisor=32), []
    for rank in (0, world - 1):
        with fake_world(rank, world):
            mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
            matrices = [
                nn.Parameter(distribute_tensor(torch.ones(s), mesh, [Shard(0)], src_data_rank=None)) for s in shapes
            ]
            operations = muon_step(matrices, None)
            rows = sum(matrix.to_local().numel() for matrix in matrices)
        # The widest has 160 rows, so no more processes than that have a row.
        owners = assign_owners(shapes, min(world, 160))
        own = sum(shape.numel() for shape, owner in zip(shapes, owners, strict=True) if owner == rank)
        assert [name for name, *_ in operations.collectives] == ["alltoall_base_"] * 2
        assert sum(received for *_, received in operations.collectives) == rows + own
        counts.append(operations.counts["aten.cat"])
    assert max(counts) < 300


def test_muon_s_work_and_buffers_are_shared_equally() -> None:
    shapes = h14_shapes()
    for count in (8, 72):
        parts = [0] * count
        for shape, owner in zip(shapes, assign_owners(shapes, count), strict=True):
            parts[owner] += shape.numel()
        assert max(parts) < {8: 1.01, 72: 1.4}[count] * sum(parts) / count
    whole = sum(shape.numel() for shape in shapes)
    assert whole * 2 == pytest.approx(1.86e9, rel=0.01)
    assert 1.3 * whole < buffer_elements(shapes, 8, is_sharded=False) < 1.7 * whole
    assert buffer_elements(shapes, 256, is_sharded=True) < 0.3 * whole
    assert buffer_elements((), 8, is_sharded=True) == 0


@contextmanager
def layout_of(engine: str, rank: int, world: int) -> Iterator[Layout]:
    """The layout of some weights, the same on all processes, in a fake world; under HSDP, each node has a copy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 32), nn.Linear(32, 24), nn.Linear(24, 8))
    with fake_world(rank, world):
        if engine == "ddp":
            yield Layout(model, rank, world)
            return
        replicas = world // 8 if engine == "hsdp" else 1
        # Its meshes are those of another rank.
        _clear_sharding_prop_cache()
        sizes = {"replicate": replicas, "shard": world // replicas} if replicas > 1 else {"shard": world}
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        places = [Replicate(), Shard(0)][-mesh.ndim :]
        for module in model:
            for name, parameter in [*module.named_parameters()]:
                held = distribute_tensor(parameter.detach(), mesh, places, src_data_rank=None)
                module.register_parameter(name, nn.Parameter(held))
        yield _RowLayout(model, rank, world, mesh.get_group("replicate") if replicas > 1 else None)


@pytest.mark.parametrize(
    ("engine", "saved", "resumed"),
    [("ddp", 8, 256), ("ddp", 256, 8), ("fsdp2", 8, 256), ("hsdp", 256, 8), ("hsdp", 8, 8)],
)
def test_a_resume_opens_no_more_files_than_its_world_has_shares(
    engine: str, saved: int, resumed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds: dict[str, list[int]] = {}
    for rank in range(saved):
        with layout_of(engine, rank, saved) as layout:
            chunks = {f"weight.{one.name}": one.values for one in layout.tensor_chunks({}) if one.values.numel()}
            save_file(chunks, part_of(tmp_path, rank))
            shapes = {name: list(shape) for name, shape in layout.shapes().items()}
            for name, part in layout.saved_ranges().items():
                bounds.setdefault(name, [0]).append(part.stop if part else bounds[name][-1])
    (tmp_path / "index.json").write_text(json.dumps({"shapes": shapes, "bounds": bounds}))
    opened: list[Path] = []
    monkeypatch.setattr(checkpoint, "safe_open", lambda path, kind: (opened.append(path), safe_open(path, kind))[1])
    found = {name: torch.zeros(math.prod(shape)) for name, shape in shapes.items()}
    messages = []
    for rank in range(resumed):
        with layout_of(engine, rank, resumed) as layout, ExitStack() as stack:
            for values in layout.all_weights().values():
                values.zero_()
            if rank in (0, 5, resumed - 1):
                messages.append(stack.enter_context(Recorder()).collectives)
            layout.load_weights(CheckpointReader(tmp_path))
            stack.close()
            for name, parameter in layout.model.named_parameters():
                values, first = layout.weights(parameter)
                found[name][first : first + len(values)] += values
    # Nothing arrives in a fake world, so the sum has each element once if one process read it.
    with layout_of("ddp", 0, 1) as layout:
        for name, values in layout.all_weights().items():
            assert torch.equal(found[name], values), name
    # A share may lie in several parts of another world.
    assert len(opened) <= (resumed if saved == resumed else saved + resumed)
    if engine == "ddp":
        assert all(of_rank == messages[0] for of_rank in messages)
        assert len(messages[0]) <= resumed + len(shapes)
    else:  # of a copy's weights to the other copies
        assert [name for name, *_ in messages[0]] == ["broadcast_"] * (engine == "hsdp" and resumed > 8) * len(shapes)
