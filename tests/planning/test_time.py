"""The time of a step by hand, the dry run's tables, and the errors of its options."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flipscale.cli import main
from flipscale.engines.device import GPUS
from flipscale.engines.launch import Launch
from flipscale.objectives.contrastive import contrastive_loss
from flipscale.objectives.sigmoid import sigmoid_loss
from flipscale.planning.memory import recipe_memory
from flipscale.planning.time import Hardware, Links, hardware_of, loss_seconds, messages, step_time, usual_share
from flipscale.recipe.recipe import Recipe
from flipscale.start.complete_recipe import parse_recipe

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
PARAMETERS = 966_394_881
# Parameters of a block of each tower: four square matrices, two of four times the width, their biases and two norms.
IMAGE_BLOCK, TEXT_BLOCK = (12 * width**2 + 13 * width for width in (1280, 1024))
BLOCKS = [IMAGE_BLOCK] * 32 + [TEXT_BLOCK] * 24
GROUPS = [*BLOCKS, PARAMETERS - sum(BLOCKS)]


@pytest.fixture(scope="module")
def h14() -> Recipe:
    return parse_recipe(["--config", "h14_laion2b", "--stages.masked.gradient_checkpointing", "null"])


def gathered(size: float, count: int, bandwidth: float) -> float:
    """Around a ring of nodes of 8: 1.9 us a hop within a node, 4 us between nodes."""
    crossings = max(0, -(-count // 8) - 1)
    return (count - 1 - crossings) * 1.9e-6 + crossings * 4e-6 + size * (count - 1) / count / bandwidth


# 8 adapters of 46 GB/s are more than NVLink's 350.
TEXTS = 2 * gathered(4 * 65536 * 1024, 256, 350e9)


def test_ddp_sends_twice_the_gradients(h14: Recipe) -> None:
    sent = messages(h14, Launch("ddp", 256, "bf16"), h14.stages[0], Links())
    buckets = -(-4 * PARAMETERS // (25 * 2**20))
    # Up and down a tree over 32 nodes: 7 hops within one and 5 between them, each way.
    hops = 2 * (7 * 1.9e-6 + 5 * 4e-6)
    every = buckets * hops + 2 * 4 * PARAMETERS * 255 / 256 / 350e9
    assert sent.backward + sent.last == pytest.approx(every, rel=1e-3)
    assert sent.last == pytest.approx(every / buckets, rel=1e-3)
    assert sent.forward == sent.first == 0.0
    assert sent.between == pytest.approx(TEXTS, rel=1e-6)


def test_hsdp_gathers_within_a_node_and_reduces_shards_between(h14: Recipe) -> None:
    links = Links(network_gb_s=2.0)
    sent = messages(h14, Launch("fsdp2", 256, "bf16", shard_size=8), h14.stages[0], links)
    assert sent.first + sent.forward == pytest.approx(sum(gathered(2 * size, 8, 350e9) for size in GROUPS), rel=1e-6)
    # Each GPU has its own adapter to the other 31 copies of its shard.
    reduces = [2 * 5 * 4e-6 + 2 * (4 * size // 8) * 31 / 32 / 2e9 for size in GROUPS]
    last = gathered(4 * GROUPS[-1], 8, 350e9) + reduces[-1]
    assert sent.last == pytest.approx(last, rel=1e-6)
    # One message at a time: weights and gradients within nodes, and shards between them.
    within = sum(gathered(2 * size, 8, 350e9) + gathered(4 * size, 8, 350e9) for size in GROUPS)
    assert sent.backward + sent.last == pytest.approx(within + sum(reduces), rel=1e-6)


def test_the_yardstick(h14: Recipe) -> None:
    # H/14, 50 % masked and recomputed, 256 pairs on each of 256 H100: 554 Gflop a pair at 38 %, and a third more.
    planned = step_time(h14, Launch("fsdp2", 256, "bf16", shard_size=8), h14.stages[0], Hardware())
    assert planned.compute == pytest.approx(256 * 554e9 * 4 / 3 / (0.38 * 989e12), rel=0.01)
    assert planned.seconds == pytest.approx(0.51, rel=0.03)
    assert planned.bottleneck == "compute"
    # 128k pairs/s of 40 kB over 32 nodes.
    assert planned.node_mb_s * 32 == pytest.approx(5_100, rel=0.05)
    plain = replace(h14, model=replace(h14.model, gradient_checkpointing=False))
    compute = step_time(plain, Launch("ddp", 256, "bf16"), h14.stages[0], Hardware()).compute
    assert planned.compute == pytest.approx(compute * 4 / 3)
    parts = replace(h14, data=replace(h14.data, micro_batch_size=128))
    assert step_time(parts, Launch("ddp", 256, "bf16"), h14.stages[0], Hardware()).compute == pytest.approx(
        compute * 5 / 3
    )


def test_a_stage_keeps_its_activations_and_the_other_recomputes(h14: Recipe) -> None:
    h14 = replace(h14, model=replace(h14.model, compile=False))
    masked, unmasked = h14.stages
    kept = replace(h14, stages=[replace(masked, gradient_checkpointing=False), unmasked])
    launch = Launch("fsdp2", 256, "bf16")
    before, after = (step_time(h14, launch, masked, Hardware()), step_time(kept, launch, kept.stages[0], Hardware()))
    assert after.compute == pytest.approx(before.compute * 3 / 4)
    assert after.host < before.host
    assert step_time(kept, launch, unmasked, Hardware()) == step_time(h14, launch, unmasked, Hardware())
    alone = replace(kept, stages=[kept.stages[0]])
    assert recipe_memory(h14, launch).total < recipe_memory(kept, launch).total == recipe_memory(alone, launch).total


def test_the_bottleneck_is_named(h14: Recipe) -> None:
    stage = h14.stages[0]
    few = replace(h14, data=replace(h14.data, global_batch_size=4))
    assert step_time(few, Launch("ddp", 1, "bf16"), stage, Hardware(call_s=10e-6)).bottleneck == "host"
    assert step_time(h14, Launch("ddp", 1024, "bf16"), stage, Hardware()).bottleneck == "small batch"
    slow = Hardware(links=Links(network_gb_s=0.5))
    assert step_time(h14, Launch("ddp", 256, "bf16"), stage, slow).bottleneck == "network"
    slow = Hardware(links=Links(node_gb_s=0.2))
    assert step_time(h14, Launch("ddp", 8, "bf16"), stage, slow).bottleneck == "node links"
    starved = step_time(h14, Launch("ddp", 256, "bf16"), stage, Hardware(images_per_worker_s=10.0))
    assert (starved.bottleneck, starved.seconds) == ("loader", pytest.approx(256 / 110))
    # 65,536 pairs of 40 kB at 1 GB/s for all nodes.
    starved = step_time(h14, Launch("ddp", 256, "bf16"), stage, Hardware(storage_gb_s=1.0))
    assert (starved.bottleneck, starved.seconds) == ("storage", pytest.approx(65536 * 40e-6))


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(("kind", "in_triton"), [("infonce", 2), ("sigmoid", 1)])
def test_the_loss_by_hand(h14: Recipe, kind: str, in_triton: int, bf16: bool) -> None:
    """1,024 numbers a logit; an exact product in Triton is three of TF32, which has half of bf16's peak."""
    recipe = replace(h14, loss=replace(h14.loss, kind=kind))
    launch, logits = Launch("ddp", 32, "bf16" if bf16 else "no"), 2048 * 65536
    products = 6 * in_triton / (0.4 * 989e12)
    products += 2 / (0.65 * 989e12 / 2 if bf16 else 0.77 * 67e12)
    seconds = 2 * 1024 * logits * products + 4 * 3 * logits / 3350e9
    assert loss_seconds(recipe, launch, 2048, Hardware()) == pytest.approx(seconds)
    step = step_time(recipe, launch, recipe.stages[0], Hardware())
    assert step.loss == pytest.approx(seconds)
    assert step.seconds == pytest.approx(step.compute + step.loss + step.exposed + step.optimizer)


class Products(TorchDispatchMode):
    """Counts the operations of matrix products by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            one, other = args[-2:]
            self.operations[one.dtype] += 2 * one.shape[0] * one.shape[1] * other.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("loss", "parameters", "products"), [(contrastive_loss, [10.0], 4), (sigmoid_loss, [10.0, -10.0], 3)]
)
def test_the_loss_has_the_planned_products(loss: Callable[..., Any], parameters: list[float], products: int) -> None:
    """Without Triton, all are in fp32."""
    pairs, dim = 300, 24
    images, texts = (torch.randn(pairs, dim, requires_grad=True) for _ in range(2))
    with Products() as counted:
        loss(images, texts, *(torch.tensor([one], requires_grad=True) for one in parameters)).backward()
    assert counted.operations == {torch.float32: products * 2 * pairs**2 * dim}


def test_a_day_on_stored_features_is_the_loss_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # next to a folder `runs`, the recipe's `runs/two_towers` must exist
    recipe = parse_recipe(["--config", "align_cc12m_day"])
    step = step_time(recipe, Launch("ddp", 1, "bf16"), recipe.stages[0], Hardware())
    # A product as three of TF32, two of TF32, and three passes over a billion logits.
    products = 3 * 2.2e12 / (0.4 * 494.5e12) + 4.4e12 / (0.65 * 494.5e12)
    assert step.loss == pytest.approx(products + 3 * 4 * 32768**2 / 3350e9, rel=0.01)
    assert step.bottleneck == "loss"


def test_wide_models_and_fast_memories_reach_more_of_the_peak(h14: Recipe) -> None:
    b16, l16 = (parse_recipe(["--config", name]) for name in ("b16_cc12m", "l16_laion400m"))
    assert [usual_share(one, GPUS["H100"]) for one in (b16, l16, h14)] == [0.28, 0.34, 0.38]
    speeds = [usual_share(h14, GPUS[name]) * GPUS[name].teraflops for name in ("H100", "A100", "L40S", "RTX 4090")]
    assert speeds == sorted(speeds, reverse=True)


def test_small_images_are_decoded_faster() -> None:
    assert [Hardware().decoded(pixels) for pixels in (32, 64, 128, 224)] == [1744, 1744, 1365, 897]
    assert Hardware().decoded(448) == pytest.approx(897 / 4)
    assert Hardware(images_per_worker_s=500.0).decoded(64) == 500.0


def test_stored_features_need_no_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # beside a folder `runs`, the recipe's `runs/two_towers` must exist
    recipe = parse_recipe(["--config", "align_cc12m_day"])
    step = step_time(recipe, Launch("ddp", 1, "bf16"), recipe.stages[0], Hardware(images_per_worker_s=1.0))
    assert (step.bottleneck, step.workers) == ("loss", 0.0)
    # Two rows of 1,024 numbers of two bytes.
    assert step.node_mb_s == pytest.approx(32768 / step.seconds * 4096 / 1e6)


def cells(printed: str) -> dict[str, list[str]]:
    """The cells of a printed table by the name of their row. Of the stages' rows, the last stage's count."""
    lines = [re.split(" {2,}", line.strip()) for line in printed.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) > 1}


@pytest.mark.long
def test_a_column_for_each_launch_and_an_advice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "gpu.json").write_text('{"planning": {"step_flops_per_s": {"": 494.5e12}}}\n')
    files = [str(DS_CONFIGS / f"{name}.yaml") for name in ("ddp", "fsdp2", "hsdp")]
    command = ["pretrain", "--dry_run", "--config", "h14_laion2b", "--cost.device_hour_dollars", "2", "--launch_file"]
    main([*command, *files, "--num_processes", "256,1024", "--gpu", "h100", "--bench", str(tmp_path / "gpu.json")])
    printed = capsys.readouterr().out
    assert "at 50% of 989 Tflop/s" in printed
    table = cells(printed)
    assert table["processes"] == ["256", "1,024"] * 3
    hours = [float(cell.removesuffix(" h").replace(",", "")) for cell in table["whole run"]]
    dollars = [float(cell.replace(",", "")) for cell in table["dollars"]]
    assert dollars == pytest.approx(
        [2 * count * time for count, time in zip([256, 1024] * 3, hours, strict=True)], rel=1e-3
    )
    # At 1,024 processes, the network limits fsdp2, and ddp is slower by its optimizer; at 256, all are equally fast.
    words = r"on ([\d,]+) processes, use (\w+): fits in 80 GiB with (.*) to spare, (.*)"
    for line, column, processes, name in zip(
        printed.splitlines()[-2:], (2, 5), ("256", "1,024"), ("fsdp2", "hsdp"), strict=True
    ):
        found = re.fullmatch(words, line)
        assert found is not None
        assert found.group(1, 2, 4) == (processes, name, table["whole run"][column])
        assert float(found[3]) == pytest.approx(0.94 * 80 - float(table["total"][column]), abs=0.51)


SMALL = ["pretrain", "--dry_run", "--config", "small_gpu", "--data.global_batch_size", "256", "--num_processes"]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["1", "--gpu_memory_gib", "24"], "--gpu"),
        (["1", "--bench", "gpu.json"], "--gpu"),
        (["8", "--gpu", "rtx_3060"], "--node_gb_s"),
        (["16", "--gpu", "a100"], "--network_gb_s"),
        (["1", "--gpu", "rtx_3060"], None),
        (["8", "--gpu", "rtx_3060", "--node_gb_s", "10"], None),
        (["8", "--gpu", "a100"], None),
        (["16", "--gpu", "h100"], None),
    ],
)
def test_only_a_known_gpu_has_times(
    flags: list[str], reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gpu.json").write_text('{"planning": {"step_flops_per_s": {"": 5e12}}}\n')
    main([*SMALL, *flags])
    printed = capsys.readouterr().out
    assert ("no times are computed" in printed) == (reason is not None)
    assert (reason or "") in printed
    figures = ("step, ms", "pairs/s", "whole run", "GPU-hours")
    assert [name for name in figures if name in cells(printed)] == ([] if reason else [*figures])
    assert " h\n" not in printed.splitlines(keepends=True)[-1] or reason is None
    assert "total" in cells(printed)


def test_the_optimiser_is_as_fast_as_the_gpu_s_memory(h14: Recipe) -> None:
    seconds = [
        step_time(h14, Launch("ddp", 1, "bf16"), h14.stages[0], hardware_of(name, 1)).optimizer
        for name in ("H100", "RTX 3060")
    ]
    assert seconds[1] / seconds[0] == pytest.approx(3350 / 360)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--matmul_share", "0.4", "--bench", "x.json"], "--matmul_share"),
        (["--num_processes", "48"], "global_batch_size 65536 is not divisible by 48 processes"),
        (["--num_processes", "8,x"], "--num_processes is 'x'"),
        (["--launch_file", str(DS_CONFIGS / "hsdp.yaml"), "--num_processes", "8,4"], "dp_shard_size 8"),
    ],
)
def test_errors_of_options(flags: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["pretrain", "--dry_run", "--config", "h14_laion2b", *flags])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
