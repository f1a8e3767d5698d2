"""Which engine a launch asks for, and what it may not ask for."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator

from flipscale.training.engine import Engine
from flipscale.training.launch import build_engine, deepspeed_settings
from flipscale.training.optimizer import OptimRecipe

FOLDER = Path(__file__).parents[2] / "ds_configs"


def test_plain_processes_are_data_parallel() -> None:
    assert type(build_engine(Accelerator(cpu=True), OptimRecipe(), 8)) is Engine


def test_the_first_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"fsdp_version is 1; write fsdp_version: 2 \(ds_configs/fsdp2.yaml\)"):
        build_engine(Accelerator(cpu=True), OptimRecipe(), 8)


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
    assert list(texts) == ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
    files = {name: yaml.safe_load(text) for name, text in texts.items()}
    for name, text in texts.items():
        assert len(text.splitlines()) <= 30
        assert "Choose it" in text, name
        own = {"distributed_type", "fsdp_config", "deepspeed_config"}
        assert {k: v for k, v in files[name].items() if k not in own} == {
            k: v for k, v in files["ddp"].items() if k not in own
        }
