"""transformers' dual encoders, masked: every engine learns what one process does, and goes on bit for bit."""

from pathlib import Path

import pytest
import torch
from conftest import TOWER, losses
from distributed.crowd import Crowds
from distributed.test_engines import Trainings, assert_learned_alike, close
from foreign_towers import SMALL_TIMM, VISION, save_text, save_timm

CLIP = {"family": "clip", "text_config": {**TOWER, "max_position_embeddings": 8}}
SIGLIP = {**CLIP, "family": "siglip"}
# The family, the loss, and a field that the engines shard, scale or recompute.
CASES: dict[str, dict] = {
    "clip": {"model": CLIP, "optim": {"layer_decay": 0.7}},
    "clip, packed": {"model": {**CLIP, "gradient_checkpointing": True}, "data": {"pack_captions": True}},
    "clip, captions": {"model": CLIP, "loss": {"captions_per_image": 2}, "data": {"pack_captions": True}},
    "siglip": {"model": {**SIGLIP, "gradient_checkpointing": True}, "loss": {"kind": "sigmoid"}},
    "siglip, infonce": {"model": SIGLIP, "mask": {"views": 2}, "optim": {"ema_decay": 0.9}},
    # The fixture adds the folders of both towers.
    "towers": {"model": {"gradient_checkpointing": True}, "optim": {"layer_decay": 0.7}},
    "towers, dinov3": {"model": {"gradient_checkpointing": True}, "mask": {"views": 2}},
    "towers, sigmoid": {"model": {}, "loss": {"kind": "sigmoid"}, "data": {"micro_batch_size": 4}},
}
STAGES = [
    {"name": "masked", "samples": 800, "mask_ratio": 0.75, "base_lr": 0.012, "warmup_samples": 64},
    {"name": "small", "samples": 64, "image_size": 16},
]


@pytest.fixture(scope="module")
def trainings(
    recipe: dict, caption_tokenizer: Path, crowds: Crowds, tmp_path_factory: pytest.TempPathFactory
) -> Trainings:
    folder = tmp_path_factory.mktemp("families")
    data = {**recipe["data"], "tokenizer": str(caption_tokenizer)}
    trainings = Trainings(folder, {**recipe, "data": data}, crowds)
    trainings.recipe |= {"stages": STAGES, "save": {"every_samples": 160, "total_limit": 20}}
    torch.manual_seed(0)
    save_timm("vit_tiny_patch16_224", folder / "vit", **SMALL_TIMM)
    save_text("bert", folder / "bert", initializer_range=0.2)
    towers: dict = {"family": "towers", "vision": str(folder / "vit"), "text": str(folder / "bert")}
    towers |= {"vision_config": {}, "text_config": {"caption_tokens": 8, "projection_dim": 24}}
    VISION["`DINOv3ViTModel`"](folder / "dino")
    for case in ("towers", "towers, sigmoid"):
        CASES[case]["model"] |= towers
    CASES["towers, dinov3"]["model"] |= {**towers, "vision": str(folder / "dino")}
    return trainings


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "engine"),
    [
        # Each family under FSDP2 and ZeRO-3, which shard its modules; DDP for the one with most columns.
        ("clip", "zero3"),
        ("clip, packed", "fsdp2"),
        ("clip, captions", "ddp"),
        ("siglip", "zero3"),
        ("siglip, infonce", "fsdp2"),
        ("towers", "fsdp2"),
        ("towers", "zero3"),
        ("towers, dinov3", "fsdp2"),
        ("towers, dinov3", "zero3"),
        ("towers, sigmoid", "zero2"),
    ],
)
def test_engines_learn_what_one_process_does(trainings: Trainings, case: str, engine: str) -> None:
    one, many = trainings.run("ddp", 1, **CASES[case]), trainings.run(engine, 2, **CASES[case])
    assert_learned_alike(one, many, 0.02, 54)


@pytest.mark.parametrize(
    "case",
    [pytest.param("clip, packed", marks=pytest.mark.long), "siglip", pytest.param("towers", marks=pytest.mark.long)],
)
def test_a_resumed_run_ends_with_the_same_bits(trainings: Trainings, case: str) -> None:
    whole = trainings.run("ddp", 1, **CASES[case])
    trainings.assert_resumed_alike(whole, 10, "ddp", 1, **CASES[case])


@pytest.mark.long
@pytest.mark.parametrize("case", ["siglip", "towers", "towers, dinov3"])
def test_in_bf16_a_sharded_run_learns_what_one_process_does(trainings: Trainings, case: str) -> None:
    one, many = (trainings.run(*on, precision="bf16", **CASES[case]) for on in (("ddp", 1), ("fsdp2", 2)))
    assert losses(many) == pytest.approx(losses(one), abs=0.05)


@pytest.mark.long
@pytest.mark.parametrize("case", ["clip, packed", "siglip", "towers"])
def test_a_compiled_run_learns_the_same(trainings: Trainings, case: str) -> None:
    compiled = {**CASES[case], "model": {**CASES[case]["model"], "compile": True}}
    assert close(losses(trainings.run("fsdp2", 2, **compiled)), losses(trainings.run("ddp", 1, **CASES[case])))
