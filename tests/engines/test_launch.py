"""Which engine a launch asks for, and what it may not ask for."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator

from flipscale.engines.engine import Engine
from flipscale.engines.launch import build_engine, deepspeed_settings, launched_shard_size, start_accelerator
from flipscale.engines.optimizers import OptimRecipe

FOLDER = Path(__file__).parents[2] / "ds_configs"


def test_plain_processes_are_data_parallel() -> None:
    assert type(build_engine(Accelerator(cpu=True), OptimRecipe(), 8)) is Engine


def test_the_first_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"fsdp_version is 1; write fsdp_version: 2 \(ds_configs/fsdp2.yaml\)"):
        build_engine(Accelerator(cpu=True), OptimRecipe(), 8)


SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}


@pytest.mark.parametrize(("sizes", "found"), [((1, 8), 8), ((4, 8), 8), ((2, 16), 16), ((1, 32), 32), ((32, 1), 1)])
def test_copies_follow_from_the_processes_that_share_one(sizes: tuple[int, int], found: int) -> None:
    names = ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE")
    asked = {name: str(size) for name, size in zip(names, sizes, strict=True)}
    assert launched_shard_size({**SHARDED, **asked}, 32) == found
    assert launched_shard_size({**SHARDED, **asked, "ACCELERATE_USE_PARALLELISM_CONFIG": "false"}, 32) is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, r"parallelism_config_tp_size is 2; leave it out: flipscale has only dp_"),
        ({"PARALLELISM_CONFIG_CP_SIZE": "4"}, r"parallelism_config_cp_size is 4; leave it out: flipscale has only dp_"),
        ({"PARALLELISM_CONFIG_SP_SIZE": "8"}, r"parallelism_config_sp_size is 8; leave it out: flipscale has only dp_"),
        (
            {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8"},
            "replicate_size 2 times parallelism_config_dp_shard_size 8 is not the number of processes, 1; use a dp_sh",
        ),
        ({"PARALLELISM_CONFIG_DP_SHARD_SIZE": "8"}, "1 times parallelism_config_dp_shard_size 8 is not the number of"),
        ({"ACCELERATE_USE_FSDP": "false"}, "has a parallelism_config, but no distributed_type: FSDP; leave it out, or"),
    ],
)
def test_other_parallelism_is_refused(asked: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SHARDED, **asked}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        build_engine(start_accelerator([], ""), OptimRecipe(), 8)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_s_stage_is_the_file_s_or_the_launch_s(stage: int) -> None:
    file = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(FOLDER / f"zero{stage}.json")}
    assert deepspeed_settings(file)["zero_optimization"]["stage"] == stage
    flag = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "none", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    assert deepspeed_settings(flag) == {"zero_optimization": {"stage": stage}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, r"fp16 is .*; leave it out: the recipe and"),
        ({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}, r"gradient_clipping is 1.0; leave it out"),
        ({"zero_optimization": {"stage": 0}}, r"zero_optimization.stage is 0; use 1, 2 or 3, or ds_configs/ddp.yaml"),
        ({"steps_per_print": 1}, r"zero_optimization.stage is None; use 1, 2 or 3"),
    ],
)
def test_what_the_recipe_decides_is_refused(given: dict, message: str, tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(given))
    with pytest.raises(ValueError, match=message):
        deepspeed_settings({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})


def test_what_is_left_to_the_recipe_by_auto_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": "auto", "fp16": "auto"}))
    assert deepspeed_settings({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}) == {"zero_optimization": {"stage": 1}}


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"deepspeed_config_file no/such.json cannot be read \(.*No such file"):
        deepspeed_settings({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "no/such.json"})


def test_an_average_needs_a_decay_between_zero_and_one() -> None:
    with pytest.raises(ValueError, match=r"optim.ema_decay is 1.0; it must be in \(0, 1\), such as 0.9999"):
        OptimRecipe(ema_decay=1.0)


def test_launch_files_differ_where_they_must() -> None:
    """One page each, a sentence on when to choose it, and the same lines but for the engine's own."""
    texts = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.yaml"))}
    assert list(texts) == ["ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"]
    files = {name: yaml.safe_load(text) for name, text in texts.items()}
    for name, text in texts.items():
        assert len(text.splitlines()) <= 30
        assert "Choose it" in text, name
        own = {"distributed_type", "fsdp_config", "parallelism_config", "deepspeed_config"}
        assert {k: v for k, v in files[name].items() if k not in own} == {
            k: v for k, v in files["ddp"].items() if k not in own
        }
