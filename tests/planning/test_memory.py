"""The bytes that a dry run prints: activations against the allocator's own count, shards against FSDP2's."""

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

import flipscale
from flipscale.cli import main
from flipscale.engines.fsdp2 import Fsdp2Engine
from flipscale.engines.launch import Launch, read_launch_file
from flipscale.model import FlipConfig, FlipModel
from flipscale.planning.flops import StepShape
from flipscale.planning.memory import (
    activation_bytes,
    fitting_changes,
    host_bytes,
    measured,
    planned_model,
    recipe_memory,
    trained_model,
)
from flipscale.recipe.optim import LoraRecipe
from flipscale.recipe.recipe import Recipe
from flipscale.start.complete_recipe import parse_recipe

LAUNCH_FILES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.yaml"))
TOWER = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 768}
SMALL = FlipConfig.from_size("b16", {**TOWER, "image_size": 112}, {**TOWER, "vocab_size": 500})


# The recipe of H/14, recomputed, with four blocks in each tower.
H14 = ["--config", "h14_laion2b", "--stages.masked.gradient_checkpointing", "true"]
H14 += [f"--model.{tower}_config={{num_hidden_layers: 4}}" for tower in ("vision", "text")]


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that the CPU's allocator had given out at once during `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@functools.cache
def bf16_is_emulated() -> bool:
    """Whether this CPU computes bf16 products in fp32 copies, which take memory that the plan rightly leaves out."""
    rows, weights = torch.randn(512, 192).bfloat16(), torch.randn(768, 192).bfloat16()
    output_bytes = 2 * 512 * 768
    return peak_bytes(lambda: torch.nn.functional.linear(rows, weights)) > 1.5 * output_bytes


def allocated_at_most(step: StepShape) -> int:
    """The peak memory of a real step of `SMALL`, in bytes, without the weights and the batch."""
    most = peak_bytes(lambda: measured(SMALL, step))
    width = 2 if step.bf16 and not step.autocast else 4
    model = FlipModel(SMALL)
    weights = width * sum(parameter.numel() for parameter in model.parameters())
    patches = int(((step.image_size or 112) // 16) ** 2 * (1 - step.mask_ratio))
    batch = step.batch_size * (patches * 768 + 2 * 8 * 32 + (2 * patches if step.mask_ratio else 0))
    return most - weights - batch


@pytest.mark.parametrize(
    ("mask_ratio", "recompute", "bf16", "autocast", "image_size"),
    [
        (0.75, True, True, True, None),
        (0.5, False, False, True, 160),
        pytest.param(0.0, False, True, True, None, marks=pytest.mark.long),
        pytest.param(0.75, False, True, False, None, marks=pytest.mark.long),
        pytest.param(0.0, True, True, False, None, marks=pytest.mark.long),
    ],
)
def test_activations_are_what_the_allocator_gives(
    mask_ratio: float, recompute: bool, bf16: bool, autocast: bool, image_size: int | None
) -> None:
    bf16 = bf16 and not bf16_is_emulated()
    step = StepShape(32, mask_ratio, 1, 0.0, recompute, bf16, autocast, "cpu", image_size=image_size)
    found, allocated = activation_bytes(SMALL, step).peak, allocated_at_most(step)
    assert allocated > 10 * 2**20
    # What a kernel takes for itself is not seen: a larger part of the little that recomputation leaves.
    assert (0.9 if recompute else 0.95) * allocated < found < 1.01 * allocated


@pytest.mark.parametrize("mesh_sizes", [(256,), (32, 8)])
def test_rows_are_those_that_fsdp2_gives_the_first_of_256(mesh_sizes: tuple[int, ...]) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=256)
    try:
        config = FlipConfig.from_size("h14")
        with torch.device("meta"):
            model = FlipModel(config)
        mesh = init_device_mesh("cpu", mesh_sizes, mesh_dim_names=("replicate", "shard")[-len(mesh_sizes) :])
        for tower in (model.vision_model, model.text_model):
            for layer in tower.encoder.layers:
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        local = {}
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            local[name] = parameter.to_local().numel()
    finally:
        dist.destroy_process_group()
    launch = Launch("fsdp2", 256, shard_size=mesh_sizes[-1])
    assert Fsdp2Engine.memory(planned_model(config), launch).moments == local


@pytest.fixture(scope="module")
def h14() -> Recipe:
    return parse_recipe(H14)


def weight_bytes(recipe: Recipe) -> int:
    return 4 * sum(parameter.numel() for parameter in trained_model(recipe).parameters())


def test_what_each_engine_keeps(h14: Recipe) -> None:
    whole = weight_bytes(h14)
    part = pytest.approx(whole / 256, rel=0.02)
    kept = {
        engine: recipe_memory(h14, Launch(engine, 256, precision="bf16"))
        for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3")
    }
    weights = {engine: memory.weights for engine, memory in kept.items()}
    gradients = {engine: memory.gradients for engine, memory in kept.items()}
    assert (weights["ddp"], gradients["ddp"], kept["ddp"].moments) == (whole, whole, 2 * whole)
    assert weights["fsdp2"] == part
    # Activations are most before all gradients are there.
    assert 0 < gradients["fsdp2"] < whole / 256
    assert all(kept[engine].moments == pytest.approx(2 * whole / 256, rel=0.02) for engine in kept if engine != "ddp")
    assert weights["zero1"] == weights["zero2"] == pytest.approx(whole * 257 / 256)
    assert weights["zero3"] == pytest.approx(2 * whole / 256, rel=0.02)
    assert gradients["zero1"] == whole
    assert all(0 < gradients[engine] < whole / 256 for engine in ("zero2", "zero3"))


def test_dry_run_of_a_large_model(h14: Recipe, capsys: pytest.CaptureFixture) -> None:
    command = ["pretrain", *H14, "--dry_run", "--launch_file"]
    main([*command, *map(str, LAUNCH_FILES), "--num_processes", "256", "--gpu_memory_gib", "80"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"h14: {weight_bytes(h14) // 4:,} parameters")
    head, *lines = (line.split() for line in printed.split("\n\n")[1].splitlines())
    assert head == [file.stem for file in LAUNCH_FILES]
    first = lines.index(["memory,", "GiB"])
    kinds = [list(map(float, line[1:])) for line in lines[first + 1 : first + 9]]
    totals = list(map(float, lines[first + 9][1:]))
    assert totals == pytest.approx([sum(column) for column in zip(*kinds, strict=True)], abs=0.04)
    assert lines[first + 10] == ["fits", "80", "GiB", *["yes"] * len(head)]
    assert f"use {head[totals.index(min(totals))]}: fits" in printed.splitlines()[-1]


def test_batches_in_host_memory(h14: Recipe) -> None:
    """Whole images of 256 pairs: 256 patches of 588 bytes, and 32 tokens, each with its mask in 8 bytes."""
    size = 256 * (256 * 588 + 2 * 32 * 8)
    assert host_bytes(h14, Launch("ddp", 256), 11) == 8 * (3 * 2**26 + 22 * size)
    assert host_bytes(h14, Launch("ddp", 4), 11) == 4 * (3 * 2**32 + 22 * 64 * size)
    parts = replace(h14, data=replace(h14.data, micro_batch_size=64))
    assert host_bytes(parts, Launch("ddp", 256), 11) == 8 * (3 * 4 * 2**24 + 22 * size // 4)


@pytest.mark.long
def test_no_shipped_stage_recomputes_that_fits_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each recipe that recomputes says for how many GPUs of 80 GB it is, and under which launch file."""
    monkeypatch.chdir(tmp_path)  # a checkout may have a folder `runs`, where the runs of recipes would be missed
    recomputing = []
    for file in sorted((Path(flipscale.__file__).parent / "recipes").glob("*.yaml")):
        recipe, text = parse_recipe(["--config", str(file)]), file.read_text()
        count = re.search(r"(\d+) GPUs of 80 GB", text)
        if count is None:
            assert not any(map(recipe.recomputes, recipe.stages)), file.stem
            continue
        (launch_file,) = re.findall(r"ds_configs/\w+\.yaml", text)
        launch = read_launch_file(LAUNCH_FILES[0].parents[1] / launch_file, int(count[1]))
        assert recipe_memory(recipe, launch).fits(80), file.stem
        for stage in filter(recipe.recomputes, recipe.stages):
            kept = replace(recipe, stages=[replace(stage, gradient_checkpointing=False)])
            assert not recipe_memory(kept, launch).fits(80), f"{file.stem}: {stage.name}"
            recomputing.append((file.stem, stage.name))
    assert recomputing == [
        ("b16_datacomp_node", "tuned"),
        ("h14_laion2b", "unmasked tuning"),
        ("h14_laion400m", "unmasked tuning"),
    ]


@pytest.mark.long
def test_the_stage_that_must_recompute_is_named(h14: Recipe) -> None:
    masked, launch = h14.stages[0], Launch("ddp", 8, precision="bf16")
    kept = replace(h14, stages=[replace(masked, gradient_checkpointing=False)])
    fits = fitting_changes(kept, launch, recipe_memory(kept, launch).total - 2**30)
    assert fits[0].startswith("stages.masked.gradient_checkpointing (")


@pytest.mark.long
def test_copies_follow_the_number_of_processes(h14: Recipe) -> None:
    fsdp2, hsdp = (read_launch_file(file, 256) for file in LAUNCH_FILES if file.stem in ("fsdp2", "hsdp"))
    assert hsdp == replace(fsdp2, shard_size=8, reshard_after_forward=False)
    kept, other = recipe_memory(h14, hsdp), recipe_memory(h14, fsdp2)
    assert kept.weights == kept.moments // 2 == pytest.approx(weight_bytes(h14) / 8, rel=0.001)
    assert (
        recipe_memory(h14, replace(hsdp, reshard_after_forward=True)).communication
        == other.communication
        < kept.communication
    )
    assert recipe_memory(h14, replace(hsdp, num_processes=512)).weights == kept.weights
    assert any(words.startswith("fsdp2 (") for words in fitting_changes(h14, hsdp, other.total))


@pytest.mark.long
def test_what_cannot_fit_is_refused_with_what_would(capsys: pytest.CaptureFixture) -> None:
    command = ["pretrain", "--dry_run", "--config", "b16_laion400m", "--launch_file", str(LAUNCH_FILES[0])]
    with pytest.raises(SystemExit) as exit_info:
        main([*command, "--num_processes", "64", "--gpu_memory_gib", "40"])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(
        words in error for words in ("ddp on 64", "model.gradient_checkpointing (", "data.micro_batch_size 256 (")
    )
    assert re.search(r", (128|256) processes \(\d+\.\d GiB\)$", error)
    assert "fsdp2" not in error
    # Pairs of changes where no single one does.
    recipe, launch = parse_recipe(["--config", "b16_laion400m"]), Launch("ddp", 64, precision="bf16")
    recipe = replace(recipe, data=replace(recipe.data, micro_batch_size=512))
    together = fitting_changes(recipe, launch, 11 * 2**29)
    assert {words.rpartition(" and ")[0] for words in together} == {"model.gradient_checkpointing"}
    assert fitting_changes(recipe, launch, 2**29) == []


def test_micro_batches_and_averages_count(h14: Recipe) -> None:
    launch = Launch("ddp", 256, precision="bf16")
    plain = recipe_memory(h14, launch)
    small = recipe_memory(replace(h14, data=replace(h14.data, micro_batch_size=64)), launch)
    assert small.activations < 0.6 * plain.activations
    assert small.batches == plain.batches
    averaged = recipe_memory(replace(h14, optim=replace(h14.optim, ema_decay=0.999)), launch)
    assert averaged.weights == 2 * plain.weights


@pytest.mark.parametrize(
    ("flags", "engine", "message"),
    [
        (["--optim.name", "muon"], "zero2", "optim.name is 'muon'; the launch file's engine zero2 has adamw"),
        (["--model.compile", "true"], "zero3", "model.compile is true; expected false with ZeRO-3"),
    ],
)
def test_what_an_engine_refuses_is_refused_by_a_dry_run(flags: list[str], engine: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_memory(parse_recipe(["--config", "h14_laion2b", *flags]), Launch(engine, 8))


@pytest.mark.long
def test_frozen_parts_need_no_gradients_moments_and_activations() -> None:
    recipe, launch = parse_recipe(["--config", "b16_cc3m"]), Launch("ddp", 8, precision="bf16")
    plain, model = recipe_memory(recipe, launch), trained_model(recipe)
    tower = sum(parameter.numel() for parameter in model.vision_model.parameters())
    everything = sum(parameter.numel() for parameter in model.parameters())
    frozen = recipe_memory(replace(recipe, model=replace(recipe.model, frozen=["vision_model"])), launch)
    assert frozen.moments == 8 * (everything - tower) < plain.moments == 8 * everything
    assert frozen.weights == plain.weights
    assert frozen.gradients + frozen.activations < 0.5 * (plain.gradients + plain.activations)
    first, second = recipe.stages
    # The run needs what its fullest stage needs, which is the one without frozen parts.
    stages = [replace(first, frozen=("vision_model", "text_model")), replace(second, mask_ratio=0.5, base_lr=1e-5)]
    assert recipe_memory(replace(recipe, stages=stages), launch).total == pytest.approx(
        recipe_memory(replace(recipe, stages=[stages[1]]), launch).total
    )
    lora = replace(recipe.optim, lora=LoraRecipe(rank=8))
    changed = recipe_memory(replace(recipe, optim=lora), launch)
    # Two matrices of rank 8 for the query and the value of each block.
    wide = [(12, 768), (12, 512)]
    assert changed.moments == 8 * sum(2 * blocks * 2 * 8 * width for blocks, width in wide)
