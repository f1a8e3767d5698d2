"""The step of large worlds, as one process of them takes it: waits, operations, and the messages of docs/step.md."""

import functools
import itertools
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from foreign_towers import SMALL_TIMM, save_text, save_timm
from simulated.fake_gpu import DEVICE
from simulated.world import StepReport, World, main, simulate
from torch import nn

from flipscale.engines.first_weights import model_without_storage
from flipscale.engines.fsdp2 import Fsdp2Engine
from flipscale.engines.launch import read_launch_file
from flipscale.objectives.build_objective import build_config
from flipscale.planning.time import host_calls
from flipscale.recipe.schedule import schedule_stages
from flipscale.start.complete_recipe import parse_recipe

LAUNCH_FILES = Path(__file__).parents[2] / "ds_configs"
BATCH = 4096
_TOWER = "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64"
RECIPE = [
    f"--model.vision_config={_TOWER}, image_size: 32, patch_size: 8}}",
    f"--model.text_config={_TOWER}, vocab_size: 16, max_position_embeddings: 8}}",
    "--data.shards=none",
    f"--data.global_batch_size={BATCH}",
    "--stages=[{name: masked, samples: 40960000, mask_ratio: 0.75, base_lr: 1e-6}, "
    "{name: whole, samples: 4096000, base_lr: 1e-7}]",
]
ENGINES = ("ddp", "fsdp2", "hsdp")
MUON, PARTS = "--optim.name=muon", "--data.micro_batch_size=256"
DIM, NODE = 512, 8
ENDS = "--model.decoder_config={bos_token_id: 1, eos_token_id: 2}"
# What else a recipe can ask of a step; micro-batches make the exchange of texts another.
KINDS = [
    ("--optim.ema_decay=0.999", "--optim.max_grad_norm=1"),
    ("--loss.kind=sigmoid", PARTS),
    ("--mask.views=2",),
    ("--loss.captions_per_image=2",),
    ("--loss.kind=sigmoid", "--loss.positives=equal_captions"),
    ("--loss.caption_weight=1", ENDS),
    ("--loss.kind=captioning", ENDS),
    ("--loss.reconstruction_weight=1",),
]
_STAGE = "--stages=[{name: one, samples: 40960000, mask_ratio: 0.5, base_lr: 1e-6, "
LARGER = _STAGE + "image_size: 48}]"
# Other inputs of the towers, and other towers.
INPUTS = [
    (LARGER,),
    (_STAGE + "text_mask_ratio: 0.5}]",),
    ("--data.pack_captions=true", "--model.text_config.attend_to_padding=false"),
    ("--model.family=clip", LARGER),
    ("--model.family=clip", "--data.pack_captions=true"),
    ("--model.family=siglip", "--loss.kind=sigmoid", LARGER),
]


@functools.cache
def step(engine: str, processes: int, rank: int, *flags: str) -> StepReport:
    """What a step of the small recipe, changed by `flags`, does."""
    return report_of([*RECIPE, *flags], engine, processes, rank)


def report_of(flags: Sequence[str], engine: str, processes: int, rank: int, compiles: bool = False) -> StepReport:
    recipe = parse_recipe(flags)
    launch = read_launch_file(LAUNCH_FILES / f"{engine}.yaml", processes)
    return simulate(World(recipe, launch, schedule_stages(recipe.stages, BATCH)[0], rank, compiles))


@pytest.mark.long
@pytest.mark.parametrize("world", [8, 256])
@pytest.mark.parametrize(
    ("engine", "flags"),
    [
        *itertools.product(ENGINES, [(), (MUON, PARTS)]),
        *((ENGINES[number % 3], flags) for number, flags in enumerate([*KINDS, *INPUTS])),
    ],
)
def test_the_host_waits_once(engine: str, flags: tuple[str, ...], world: int) -> None:
    if world == 256 and PARTS in flags:
        flags = tuple("--data.micro_batch_size=8" if flag == PARTS else flag for flag in flags)
    assert_waits_once(step(engine, world, 1, *flags))


@pytest.mark.long
@pytest.mark.parametrize("world", [8, 256])
def test_the_host_waits_once_for_towers_of_other_libraries(world: int, tmp_path: Path) -> None:
    save_timm("vit_tiny_patch16_224", tmp_path / "vit", **SMALL_TIMM)
    save_text("bert", tmp_path / "bert")
    towers = [f"--model.vision={tmp_path / 'vit'}", f"--model.text={tmp_path / 'bert'}", "--model.vision_config={}"]
    towers.append("--model.text_config={caption_tokens: 8, projection_dim: 24}")
    others = [flag for flag in RECIPE if "_config" not in flag]
    assert_waits_once(report_of([*others, "--model.family=towers", *towers], "fsdp2", world, 1))


@pytest.mark.parametrize(
    ("engine", "flags", "graphs"),
    [
        ("ddp", (), 2),  # one for each tower
        pytest.param("fsdp2", (MUON, PARTS), 4, marks=pytest.mark.long),  # with gradients and without
        pytest.param("hsdp", ("--model.gradient_checkpointing=true",), 2, marks=pytest.mark.long),
        pytest.param("ddp", INPUTS[2], 2, marks=pytest.mark.long),
        pytest.param("fsdp2", KINDS[2], 2, marks=pytest.mark.long),
        pytest.param("fsdp2", INPUTS[3], 2, marks=pytest.mark.long),
    ],
)
def test_compiled_blocks_add_no_wait(engine: str, flags: tuple[str, ...], graphs: int) -> None:
    compiled = report_of([*RECIPE, *flags], engine, 8, 1, compiles=True)
    assert_waits_once(compiled)
    plain = step(engine, 8, 1, *flags)
    assert compiled.graphs == graphs
    # A recomputed graph runs to its end, uncompiled operations to the last that is asked for.
    assert {**compiled.figures(), "aten_ops": plain.ops.total()} == plain.figures()
    assert compiled.attention == plain.attention


def assert_waits_once(found: StepReport) -> None:
    # It reads the verdict on the step before.
    assert [where.partition(":")[0] for where in found.host_syncs] == ["loop/sync.py"], found.host_syncs
    assert found.devices == {DEVICE.index}
    assert {device for one in found.collectives for device in one.devices} == {"cuda"}


@pytest.mark.long
def test_the_loss_does_as_much_in_any_world() -> None:
    small, large = (step("fsdp2", world, 1).loss_ops for world in (8, 1024))
    assert small == large
    assert small.total() > 50


@pytest.mark.parametrize(("engine", "flags"), [("fsdp2", ()), ("ddp", KINDS[1]), ("fsdp2", KINDS[4])])
def test_texts_are_gathered_beside_the_image_tower(engine: str, flags: tuple[str, ...]) -> None:
    found, parts = step(engine, 8, 1, *flags), BATCH // 8 // 256 if PARTS in flags else 1
    (gather,) = (one for one in found.collectives if one.kind == "all_gather" and one.size == BATCH // 8 * DIM)
    assert gather.place.startswith("objectives/contrastive.py")
    # A third of the kernels are those of the forward passes. All but the last image tower's are done.
    assert (parts - 1) / parts * found.work.kernels / 4 < gather.kernels < found.work.kernels / 3


def hsdp_step(reshards: bool, *flags: str, nodes: int = 2) -> StepReport:
    """A step of nodes, whose replicas gather their weights again in the backward pass if they reshard them."""
    recipe = parse_recipe([*RECIPE, *flags])
    launch = replace(read_launch_file(LAUNCH_FILES / "hsdp.yaml", nodes * NODE), reshard_after_forward=reshards)
    return simulate(World(recipe, launch, schedule_stages(recipe.stages, BATCH)[0], 1))


_LONG_HSDP = [(False, (), 2), (True, (MUON, PARTS), 2), (True, (), 32), (False, (MUON,), 32)]


@pytest.mark.parametrize(
    ("reshards", "flags", "nodes"),
    [(True, (), 2), *(pytest.param(*case, marks=pytest.mark.long) for case in _LONG_HSDP)],
)
def test_hsdp_has_messages_of_one_group_in_flight(reshards: bool, flags: tuple[str, ...], nodes: int) -> None:
    found = hsdp_step(reshards, *flags, nodes=nodes)
    assert {len(one.group) for one in found.collectives} == {nodes, NODE, nodes * NODE}
    assert found.side_by_side == []


@pytest.mark.long
def test_fsdp2_s_own_streams_have_messages_of_several_groups_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fsdp2Engine, "_put_in_order", lambda *_: None)
    pairs = {(one.kind, other.kind) for one, other in hsdp_step(True).side_by_side}
    # The texts beside the image tower's weights, the loss beside the backward pass's, and both sums of gradients.
    assert {("all_gather", "all_gather"), ("all_reduce", "all_gather"), ("all_reduce", "reduce_scatter")} <= pairs


@pytest.mark.long
@pytest.mark.parametrize("flags", [(), (PARTS,), ("--stages.masked.gradient_checkpointing=true",)])
def test_the_plan_knows_how_many_operations_the_host_queues(flags: tuple[str, ...]) -> None:
    recipe = parse_recipe([*RECIPE, "--model.compile=false", *flags])
    micro_batches = BATCH // 8 // 256 if PARTS in flags else 1
    passes = 2 * micro_batches if PARTS in flags else 1
    for engine in ENGINES:
        launch = read_launch_file(LAUNCH_FILES / f"{engine}.yaml", 8)
        planned = host_calls(recipe, launch, recipe.stages[0], passes, micro_batches)
        assert planned == pytest.approx(step(engine, 8, 1, *flags).ops.total(), rel=0.05), engine


@pytest.mark.parametrize("engine", ENGINES)
def test_attention_is_flash(engine: str) -> None:
    found = step(engine, 8, 1)
    assert not found.uses_cudnn
    calls = found.attention
    assert len(calls) == 4
    assert {(dtype, has_mask) for dtype, _, has_mask in calls} == {(torch.bfloat16, False)}
    assert all(width % 8 == 0 for _, width, _ in calls)


def padded(module: nn.Module, shards: int, without: Collection[int] = ()) -> int:
    """Elements of a module's parameters, each padded to rows that `shards` processes divide."""
    return sum(
        math.ceil(p.shape[0] / shards) * shards * p.shape[1:].numel()
        for p in module.parameters()
        if id(p) not in without
    )


def units(shards: int) -> list[tuple[int, int]]:
    """Elements of what FSDP2 gathers at once, and the bytes of each when it is gathered; the last is gathered once."""
    model = model_without_storage(build_config(parse_recipe(RECIPE)))
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    inside = {id(p) for block in blocks for p in block.parameters()}
    found = [(padded(block, shards), 2) for block in blocks]
    for child in model.children():
        found.append((padded(child, shards, inside), 4 if isinstance(child, nn.Linear) else 2))
        inside |= {id(p) for p in child.parameters()}
    return [*found, (padded(model, shards, inside), 4)]


def loss_bytes(world: int) -> float:
    pairs = BATCH // world
    return 4 * pairs * (world - 1) * (2 * DIM + 6)


def agreement_bytes(world: int) -> float:
    return 2 * 4 * 8 * (world - 1) / world


@pytest.mark.parametrize("world", [8, 256])
def test_ddp_sends_gradients_around(world: int) -> None:
    found = step("ddp", world, 1).figures()
    parameters = sum(p.numel() for p in model_without_storage(build_config(parse_recipe(RECIPE))).parameters())
    expected = loss_bytes(world) + agreement_bytes(world) + 2 * 4 * parameters * (world - 1) / world
    assert found["bytes_sent"] == pytest.approx(expected, abs=16)
    # One bucket: gradients of less than a megabyte.
    assert found["collectives"] == {"all_gather": 2, "reduce_scatter": 1, "all_reduce": 4}


@pytest.mark.long
@pytest.mark.parametrize(("engine", "world", "shards"), [("fsdp2", 8, 8), ("fsdp2", 256, 256), ("hsdp", 256, NODE)])
def test_sharded_weights_are_gathered_and_gradients_scattered(engine: str, world: int, shards: int) -> None:
    found, parts, replicas = step(engine, world, 1), units(shards), world // shards
    # Under hsdp, weights stay whole from the forward to the backward pass.
    times = 1 if engine == "hsdp" else 2
    gathered = sum(times * size * width for size, width in parts[:-1]) + parts[-1][0] * parts[-1][1]
    whole = sum(size for size, _ in parts)
    expected = loss_bytes(world) + agreement_bytes(world)
    expected += (gathered + 4 * whole) * (shards - 1) / shards
    expected += 2 * 4 * whole / shards * (replicas - 1) / replicas
    # And the norm, a number of each process.
    assert found.figures()["bytes_sent"] == pytest.approx(expected, abs=100)
    counts = found.figures()["collectives"]
    assert "all_to_all" not in counts
    assert counts["reduce_scatter"] == 1 + len(parts)
    assert counts["all_gather"] == 2 + times * (len(parts) - 1) + 1
    sums = [one for one in found.collectives if one.kind == "all_reduce" and one.dtype == torch.float32]
    of_weights = [one for one in sums if one.size > 7 and not one.place.startswith(("loop/sync", "objectives/"))]
    assert len(of_weights) == (len(parts) - 1 if replicas > 1 else 0)
    # Of the softmax: its largest logits and its sums.
    assert len([one for one in sums if one.place.startswith("objectives/")]) == 2


def test_weights_that_stay_whole_are_gathered_once_for_all_micro_batches() -> None:
    counts = step("hsdp", 8, 1, PARTS).figures()["collectives"]
    assert counts["all_gather"] == 2 + len(units(8))
    assert counts["reduce_scatter"] == 1 + len(units(8))


def test_one_line_of_json(recipe: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(recipe))
    launch_file = str(LAUNCH_FILES / "fsdp2.yaml")
    arguments = ["--recipe", str(recipe_file), "--launch_file", launch_file, "--num_processes", "4", "--rank", "3"]
    main([*arguments, "--stage", "unmasked", "--json"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    figures = json.loads(printed)
    assert figures["aten_ops"] > figures["loss_aten_ops"] > 0
    assert figures["collectives"]["reduce_scatter"] == 12
    assert figures["bytes_sent"] == figures["bytes_received"] > 0
    (place,) = figures["host_syncs"]
    assert "loop/sync.py" in place
    assert figures["peak_memory_bytes"] > 0
    assert not dist.is_initialized()
    assert not torch.cuda.is_available()
