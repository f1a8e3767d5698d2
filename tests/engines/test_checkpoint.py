"""Checkpoints: their content for both optimisers, resumed training, and failing disks."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import TOWERS, changed_recipe
from safetensors.torch import load_file

from flipscale.engines.checkpoint import CheckpointReader, CheckpointWriter, latest_checkpoint
from flipscale.engines.ddp import DdpEngine
from flipscale.engines.engine import Engine, gradient_norm
from flipscale.engines.first_weights import fresh_weights
from flipscale.engines.launch import Launch
from flipscale.model import FlipConfig
from flipscale.objectives.contrastive import contrastive_loss
from flipscale.recipe.optim import OptimRecipe
from flipscale.recipe.outputs import SaveRecipe

CONFIG = FlipConfig(**changed_recipe(TOWERS, {"vision_config": {"image_size": 16}}))


def build(name: str = "adamw", seed: int = 0, **checkpoint: Any) -> Engine:
    engine = DdpEngine(Accelerator(cpu=True), Launch(), OptimRecipe(name=name), global_batch_size=6)
    engine.build(CONFIG, lambda model: None, fresh_weights(seed), **checkpoint)
    return engine


def steps(engine: Engine, numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randn(6, 3, 16, 16, generator=generator)
        ids = torch.randint(0, 16, (6, 8), generator=generator)
        output = engine(input_ids=ids, pixel_values=pixels)
        engine.backward(contrastive_loss(output.image_embeds, output.text_embeds, output.logit_scale))
        assert engine.gradient_norm() > 0
        engine.step(1e-3, should_step=torch.ones(()))


def save(engine: Engine, run_dir: Path, step: int, total_limit: int = 1) -> Path:
    writer = CheckpointWriter(engine.accelerator, run_dir, SaveRecipe(total_limit=total_limit), None)
    writer.save(engine.tensor_chunks(), engine.layout.shapes(), {"step": step}, "seed: 0\n")
    assert writer.commit() == step
    return run_dir / f"checkpoints/step-{step:08d}"


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resumed_training_has_the_same_bits(name: str, tmp_path: Path) -> None:
    engine = build(name)
    steps(engine, range(3))
    assert engine.layout.optimizer_steps() == 3
    save(engine, tmp_path, 3)
    steps(engine, range(3, 6))

    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert json.loads((checkpoint / "state.json").read_text())["step"] == 3
    other = build(name, 1, reader=CheckpointReader(checkpoint), num_steps=3)
    steps(other, range(3, 6))
    for key, value in engine.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[key]), key


def test_tensors_of_a_part(tmp_path: Path) -> None:
    engine = build("muon")
    steps(engine, range(1))
    fields: dict[str, set[str]] = {}
    for key in load_file(save(engine, tmp_path, 1) / "part-00000.safetensors"):
        field, _, parameter = key.partition(".")
        fields.setdefault(parameter, set()).add(field)
    assert fields.keys() == dict(engine.model.named_parameters()).keys()
    assert fields["vision_model.encoder.layers.1.mlp.fc1.weight"] == {"weight", "momentum_buffer"}
    for parameter in ("vision_model.encoder.layers.1.mlp.fc1.bias", "image_projection.weight", "logit_scale"):
        assert fields[parameter] == {"weight", "exp_avg", "exp_avg_sq"}


def test_checkpoints_of_other_optimisers_and_models_are_refused(tmp_path: Path) -> None:
    engine = build("muon")
    steps(engine, range(1))
    reader = CheckpointReader(save(engine, tmp_path, 1))
    with pytest.raises(ValueError, match=r"has no exp_avg of .*optim.name"):
        build(reader=reader, num_steps=1)
    with pytest.raises(ValueError, match=r"has no weight of head.weight"):
        reader.fill("weight", "head.weight", torch.zeros(3), 0)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    engine = build()
    writer = CheckpointWriter(engine.accelerator, tmp_path, SaveRecipe(), None)
    before = engine.model.logit_scale.item()
    writer.save(engine.tensor_chunks(), engine.layout.shapes(), {"step": 1}, "")
    assert writer.is_open
    assert list((tmp_path / "checkpoints").glob(".step-*.partial"))
    assert latest_checkpoint(tmp_path) is None, "it exists before commit"
    steps(engine, range(3))
    assert writer.commit() == 1
    assert not writer.is_open
    assert CheckpointReader(tmp_path / "checkpoints/step-00000001").tensor("weight", "logit_scale") == before
    assert engine.model.logit_scale.item() != before


def test_the_clock_asks_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    with_clock, without = (
        CheckpointWriter(Accelerator(cpu=True), tmp_path, SaveRecipe(every_minutes=minutes), None)
        for minutes in (10.0, 0.0)
    )
    for second, due in ((599, False), (601, True)):
        monkeypatch.setattr(time, "monotonic", lambda second=second: now + second)
        assert (with_clock.clock_is_due, without.clock_is_due) == (due, False)


@pytest.mark.parametrize(
    ("fields", "minutes"),
    [({}, 30.0), ({"every_samples": 64}, 0.0), ({"every_minutes": 0.0}, 0.0), ({"every_minutes": 5.0}, 5.0)],
)
def test_a_recipe_without_save_is_saved_by_the_clock(fields: dict[str, Any], minutes: float) -> None:
    assert SaveRecipe(**fields).clock_minutes == minutes


def test_gradients_are_clipped_only_when_asked() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 3.0)
    assert gradient_norm([weight], None) == pytest.approx(6.0)
    assert weight.grad[0] == 3.0
    assert gradient_norm([weight], 1.5) == pytest.approx(6.0)
    assert weight.grad[0] == pytest.approx(0.75)
