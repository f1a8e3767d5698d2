"""A run that was cut and goes on ends with the numbers of one that was not."""

import dataclasses
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import yaml
from conftest import TOWERS, cut, metrics, trained
from safetensors.torch import load_file

from flipscale import pretrain
from flipscale.loop import loop
from flipscale.loop.step import seed_dropout
from flipscale.recipe.optim import StageRecipe
from flipscale.recipe.recipe import Recipe
from flipscale.start.complete_recipe import parse_recipe
from flipscale.start.run_files import is_done, open_run_directory

LEARNED = ("loss", "lr", "grad_norm", "logit_scale")


def assert_same_end(run_dir: Path, other: Path) -> None:
    """Bit for bit: weights, moments and every step's numbers."""
    ours, theirs = (load_file(d / "checkpoints/step-00000040/part-00000.safetensors") for d in (run_dir, other))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
    steps = [[{k: r[k] for k in LEARNED} for r in metrics(d) if "loss" in r] for d in (run_dir, other)]
    assert len(steps[0]) == 40
    assert steps[0] == steps[1]


def is_finished(recipe: Recipe) -> bool:
    return is_done(recipe, open_run_directory(recipe))


@pytest.fixture(scope="module")
def whole_run(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 steps without a break, every tenth saved: 24 masked (a schedule and an optimiser), 16 unmasked (others)."""
    folder = tmp_path_factory.mktemp("whole")
    run_dir, file = folder / "run", folder / "run.yaml"
    save = {"every_samples": 80, "total_limit": 20}
    file.write_text(yaml.safe_dump({**recipe, "save": save, "output_dir": str(run_dir)}))
    trained(file)
    return run_dir


# In the first stage, and in the second.
@pytest.mark.parametrize("step", [20, 25])
def test_resumed_equals_uninterrupted(whole_run: Path, write_recipe, tmp_path: Path, step: int) -> None:
    copy = tmp_path / "cut"
    cut(whole_run, copy, step)
    trained(write_recipe(copy, save={"every_samples": 80, "total_limit": 20}))
    assert_same_end(whole_run, copy)


def test_dropout_is_resumed_too(write_recipe, tmp_path: Path) -> None:
    whole, copy = tmp_path / "whole", tmp_path / "cut"
    changes = {"model": {"vision_config": {**TOWERS["vision_config"], "attention_dropout": 0.3}}}
    trained(write_recipe(whole, save={"every_samples": 320, "total_limit": 20}, **changes))
    cut(whole, copy, 20)
    trained(write_recipe(copy, save={"every_samples": 320, "total_limit": 20}, **changes))
    assert_same_end(whole, copy)


def test_dropout_differs_by_step() -> None:
    draws = []
    for step in (3, 4, 3):
        seed_dropout(0, step)
        draws.append(torch.rand(()).item())
    assert draws[2] == draws[0] != draws[1]


def test_a_stage_added_to_a_finished_run_is_learned_as_if_it_had_been_there(
    whole_run: Path, recipe: dict, write_recipe, tmp_path: Path
) -> None:
    run_dir = tmp_path / "longer"
    save = {"every_samples": 80, "total_limit": 20}
    trained(write_recipe(run_dir, save=save, stages=recipe["stages"][:1]))
    assert (run_dir / "DONE").exists()
    page = (run_dir / "report.html").read_text()
    saved = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    second = recipe["stages"][1]
    rateless = {name: value for name, value in second.items() if name != "base_lr"}
    added, without_rate = ({**saved, "stages": [*saved["stages"], stage]} for stage in (second, rateless))
    # The run's own recipe is edited, as one is tempted to.
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(without_rate))
    with pytest.raises(ValueError, match=r"stages\[1\]: None, now .*; a stage that is added needs a base_lr"):
        is_finished(parse_recipe(["--config", str(run_dir / "recipe.yaml")]))
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(added))
    trained(run_dir / "recipe.yaml")
    assert_same_end(whole_run, run_dir)
    assert (run_dir / "DONE").exists()
    assert (run_dir / "report.html").read_text() != page


TRUNK = {"name": "trunk", "mask_ratio": 0.5, "base_lr": 0.012, "warmup_samples": 64, "schedule": "constant"}
COOLDOWN = {"name": "cooldown", "samples": 240, "mask_ratio": 0.5, "schedule": "cooldown"}


def test_a_constant_rate_is_lengthened_then_cooled(write_recipe, tmp_path: Path) -> None:
    save = {"every_samples": 80, "total_limit": 20}
    whole, trunk, branch = tmp_path / "whole", tmp_path / "trunk", tmp_path / "branch"
    cooled = [{**TRUNK, "samples": 400}, COOLDOWN]
    trained(write_recipe(whole, save=save, stages=cooled))
    rates = [record["lr"] for record in metrics(whole) if "loss" in record]
    assert rates[8:26] == [rates[8]] * 18  # step 25 has the whole rate, and is the first of the cooldown
    assert rates[30] == pytest.approx(rates[8] * (1 - (5 / 15) ** 0.5))
    for samples in (160, 560):
        trained(write_recipe(trunk, save=save, stages=[{**TRUNK, "samples": samples}]))
        assert (trunk / f"checkpoints/step-{samples // 16:08d}").exists()
    # One trunk serves many cooldowns: each has a copy of the checkpoint at which it begins.
    (branch / "checkpoints").mkdir(parents=True)
    shutil.copytree(trunk / "checkpoints/step-00000025", branch / "checkpoints/step-00000025")
    trained(write_recipe(branch, save=save, stages=cooled))
    cut(whole, tmp_path / "cut", 35)  # in the middle of the cooldown
    trained(write_recipe(tmp_path / "cut", save=save, stages=cooled))
    assert_same_end(whole, tmp_path / "cut")
    ours, theirs = (load_file(d / "checkpoints/step-00000040/part-00000.safetensors") for d in (branch, whole))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    for stages, named in (
        ([{**TRUNK, "samples": 160}, COOLDOWN], "samples: 560, now 160"),  # the trunk has passed this end
        ([{**TRUNK, "samples": 800, "mask_ratio": 0.75}], "mask_ratio: 0.5, now 0.75"),
        ([{**TRUNK, "samples": 800, "schedule": None}], "schedule: constant, now None"),
    ):
        with pytest.raises(ValueError, match=rf"stages\[0\].{named}"):
            is_finished(parse_recipe(["--config", str(write_recipe(trunk, stages=stages))]))
    with pytest.raises(ValueError, match=r"stages\[0\].samples: 400, now 800"):  # its cooldown has begun
        is_finished(parse_recipe(["--config", str(write_recipe(whole, stages=[{**TRUNK, "samples": 800}, COOLDOWN]))]))
    shutil.rmtree(whole / "checkpoints/step-00000040")  # a finished run stays one without its last checkpoint
    assert is_finished(parse_recipe(["--config", str(write_recipe(whole, stages=cooled))]))


def test_a_finished_run_without_checkpoints_cannot_be_lengthened(whole_run: Path, write_recipe, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole_run, copy)
    shutil.rmtree(copy / "checkpoints")
    recipe = parse_recipe(["--config", str(write_recipe(copy))])
    assert is_finished(recipe)
    longer = dataclasses.replace(recipe, stages=[*recipe.stages, StageRecipe("third", 64, base_lr=1e-3)])
    with pytest.raises(ValueError, match=r"keeps no checkpoint .* with model.init_from .*/copy/model and another outp"):
        is_finished(longer)
    (copy / "recipe.yaml").write_text("torn: [")
    with pytest.raises(ValueError, match="is damaged"):
        is_finished(longer)


def train_and_be_signalled(file: str) -> None:
    consume, steps = loop.forward_backward, []

    def signalled(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        return consume(*arguments)

    loop.forward_backward = signalled
    pretrain.main(["--config", file])


def test_stop_signal_saves_and_the_next_run_goes_on(whole_run: Path, write_recipe, tmp_path: Path) -> None:
    run_dir = tmp_path / "stopped"
    file = write_recipe(run_dir, save={"every_samples": 80, "total_limit": 2})
    assert processes.exit_codes([processes.start(train_and_be_signalled, str(file))]) == [0]
    assert 5 <= max(int(path.name[5:]) for path in (run_dir / "checkpoints").iterdir()) < 10
    assert not (run_dir / "DONE").exists()
    trained(file)
    assert_same_end(whole_run, run_dir)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-00000035", "step-00000040"]
