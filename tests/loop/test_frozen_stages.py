"""Parts that are frozen in one stage only: every engine learns the same, and goes on bit for bit."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import losses
from distributed.crowd import ENVIRONMENTS, LAUNCH_FILES, Crowds
from distributed.test_engines import Trainings, close

from flipscale.engines.checkpoint import CheckpointReader, checkpoint_of
from flipscale.start.complete_recipe import parse_recipe
from flipscale.start.setup import open_setup

TOWERS = ["vision_model", "text_model"]
STAGES = [
    {"name": "projections", "samples": 80, "mask_ratio": 0.75, "base_lr": 0.02, "frozen": TOWERS},
    {"name": "all", "samples": 160, "mask_ratio": 0.5, "base_lr": 0.006},
    {"name": "text", "samples": 80, "base_lr": 0.006, "frozen": ["vision_model", "logit_scale"]},
]
FROZEN = {"stages": STAGES, "optim": {"ema_decay": 0.9}, "model": {"frozen": ["text_projection"]}}


@pytest.fixture(scope="module")
def trainings(recipe: dict, crowds: Crowds, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("frozen"), recipe, crowds)


def tensors(run_dir: Path, step: int, kind: str = "weight") -> dict[str, torch.Tensor]:
    stored = CheckpointReader(checkpoint_of(run_dir, step))
    return {name: stored.tensor(kind, name) for name in stored.shapes}


def moved(run_dir: Path, first: int, last: int) -> set[str]:
    """Return the parts that changed between two steps."""
    before, after = tensors(run_dir, first), tensors(run_dir, last)
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def has_moments(run_dir: Path, step: int, name: str) -> bool:
    try:
        CheckpointReader(checkpoint_of(run_dir, step)).tensor("exp_avg", name)
    except ValueError:
        return False
    return True


@pytest.fixture
def partitioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 also of small weights, which its launch file keeps whole."""
    settings = json.loads((LAUNCH_FILES["zero3"].parent / "zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    changed = {**ENVIRONMENTS["zero3"], "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero3.json")}
    monkeypatch.setitem(ENVIRONMENTS, "partitioned", changed)


@pytest.mark.long
@pytest.mark.parametrize(("engine", "world"), [("ddp", 1), ("partitioned", 2), ("zero2", 2), ("hsdp", 4)])
def test_every_engine_trains_what_a_stage_leaves_free(
    trainings: Trainings, partitioned: None, engine: str, world: int
) -> None:
    run_dir = trainings.run(engine, world, **FROZEN)
    assert close(losses(run_dir), losses(trainings.run("ddp", 1, **FROZEN)))
    # Saves are after every fifth step, and the stages begin at 0, 5 and 15.
    assert moved(run_dir, 5, 10) == moved(run_dir, 10, 15) == {*TOWERS, "image_projection", "logit_scale"}
    assert moved(run_dir, 15, 20) == {"text_model", "image_projection"}
    block = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert [has_moments(run_dir, step, block) for step in (5, 10, 20)] == [False, True, False]
    assert not has_moments(run_dir, 10, "text_projection.weight")
    # A stop at the border of two stages, and one within a stage.
    for step in (5, 10):
        again = trainings.resume(run_dir, step, engine, world, **FROZEN)
        for kind in ("weight", "ema"):
            ours, theirs = tensors(run_dir, 20, kind), tensors(again, 20, kind)
            assert all(torch.equal(ours[name], theirs[name]) for name in ours), (step, kind)


def test_the_first_weights_are_not_touched_in_a_stage_that_freezes_them(trainings: Trainings) -> None:
    run_dir = trainings.run("ddp", 1, **FROZEN)
    other = [{**STAGES[0], "base_lr": 0.001}, *STAGES[1:]]
    towers = [tensors(one, 5) for one in (run_dir, trainings.run("ddp", 1, **{**FROZEN, "stages": other}))]
    assert all(torch.equal(towers[0][name], towers[1][name]) for name in towers[0] if name.split(".")[0] in TOWERS)
    assert not torch.equal(*(weights["image_projection.weight"] for weights in towers))


@pytest.mark.long
def test_another_engine_goes_on(trainings: Trainings) -> None:
    whole = trainings.run("fsdp2", 2, **FROZEN)
    assert close(losses(trainings.resume(whole, 5, "ddp", 1, **FROZEN)), losses(whole))


@pytest.mark.long
def test_muon_without_matrices_in_a_stage(trainings: Trainings) -> None:
    muon = {"stages": STAGES, "optim": {"name": "muon", "muon_lr_ratio": 2.0}}
    one, many = (trainings.run(*on, **muon) for on in (("ddp", 1), ("fsdp2", 2)))
    assert losses(one) == pytest.approx(losses(many), abs=1e-4)
    assert moved(many, 5, 10) >= {*TOWERS}


@pytest.mark.parametrize(
    ("frozen", "stages", "said"),
    [
        (["logit_scale", "image_tower"], STAGES, "model.frozen has 'image_tower'; expected logit_"),
        ([*TOWERS, "image_projection", "text_projection", "logit_scale"], STAGES[1:2], "nothing to learn"),
        ([], [{**STAGES[0], "frozen": ["towers"]}], "stages.projections.frozen has 'towers'; expected logit_scale"),
        (
            ["text_projection"],
            [{**STAGES[0], "frozen": [*TOWERS, "logit_scale", "image_projection"]}],
            "leaves nothing to learn",
        ),
    ],
)
def test_refused(
    write_recipe: Callable[..., Path], tmp_path: Path, frozen: list[str], stages: list[dict], said: str
) -> None:
    file = write_recipe(tmp_path / "refused", stages=stages, model={"frozen": frozen})
    with pytest.raises(ValueError, match=re.escape(said)):
        open_setup(parse_recipe(["--config", str(file)]))
