"""What a step sends, by the formulas of docs/step.md."""

import math
from collections.abc import Collection

import pytest
import torch
from simulated.worlds import BATCH, RECIPE, step
from torch import nn

from flipscale.engines.first_weights import model_without_storage
from flipscale.training.recipe import parse_recipe

DIM, NODE = 512, 8


def padded(module: nn.Module, shards: int, without: Collection[int] = ()) -> int:
    """Elements of a module's parameters, each padded to rows that `shards` processes divide."""
    return sum(
        math.ceil(p.shape[0] / shards) * shards * p.shape[1:].numel()
        for p in module.parameters()
        if id(p) not in without
    )


def units(shards: int) -> list[tuple[int, int]]:
    """Elements of what FSDP2 gathers at once, and the bytes of each when it is gathered; the last is gathered once."""
    model = model_without_storage(parse_recipe(RECIPE).model_config())
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    inside = {id(p) for block in blocks for p in block.parameters()}
    found = [(padded(block, shards), 2) for block in blocks]
    for child in model.children():
        found.append((padded(child, shards, inside), 4 if isinstance(child, nn.Linear) else 2))
        inside |= {id(p) for p in child.parameters()}
    return [*found, (padded(model, shards, inside), 4)]


def loss_bytes(world: int) -> float:
    pairs = BATCH // world
    return 4 * pairs * (world - 1) * (2 * DIM + 4)


def agreement_bytes(world: int) -> float:
    return 2 * 4 * 7 * (world - 1) / world


@pytest.mark.parametrize("world", [8, 256])
def test_ddp_sends_gradients_around(world: int) -> None:
    found = step("ddp", world, 1).figures()
    parameters = sum(p.numel() for p in model_without_storage(parse_recipe(RECIPE).model_config()).parameters())
    expected = loss_bytes(world) + agreement_bytes(world) + 2 * 4 * parameters * (world - 1) / world
    assert found["bytes_sent"] == pytest.approx(expected, abs=16)
    # One bucket: gradients of less than a megabyte.
    assert found["collectives"] == {"all_gather": 2, "all_to_all": 1, "reduce_scatter": 1, "all_reduce": 2}


@pytest.mark.parametrize(("engine", "world", "shards"), [("fsdp2", 8, 8), ("fsdp2", 256, 256), ("hsdp", 256, NODE)])
def test_sharded_weights_are_gathered_and_gradients_scattered(engine: str, world: int, shards: int) -> None:
    found, parts, replicas = step(engine, world, 1), units(shards), world // shards
    gathered = sum(2 * size * width for size, width in parts[:-1]) + parts[-1][0] * parts[-1][1]
    whole = sum(size for size, _ in parts)
    expected = loss_bytes(world) + agreement_bytes(world)
    expected += (gathered + 4 * whole) * (shards - 1) / shards
    expected += 2 * 4 * whole / shards * (replicas - 1) / replicas
    # And the norm, a number of each process.
    assert found.figures()["bytes_sent"] == pytest.approx(expected, abs=100)
    counts = found.figures()["collectives"]
    assert counts["all_to_all"] == 1
    assert counts["reduce_scatter"] == 1 + len(parts)
    assert counts["all_gather"] == 2 + 2 * len(parts) - 1
    sums = [one for one in found.collectives if one.kind == "all_reduce" and one.dtype == torch.float32]
    assert len([one for one in sums if one.size > 7]) == (len(parts) - 1 if replicas > 1 else 0)
