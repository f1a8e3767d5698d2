"""The loss section of a recipe: options of a kind, and new kinds such as a contributor would add."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from conftest import TOWER, metrics

from flipscale.cli import main
from flipscale.engines.optimizers import build_optimizers
from flipscale.model import FlipConfig, FlipModel, FlipOutput
from flipscale.objectives.build_objective import build_objective, loss_kinds, with_options
from flipscale.objectives.contrastive import Contrastive, PairLoss, contrastive_loss
from flipscale.objectives.objective import Objective
from flipscale.objectives.reconstruction import WithReconstruction
from flipscale.objectives.sigmoid import Sigmoid
from flipscale.recipe.loss import LossRecipe
from flipscale.recipe.optim import OptimRecipe
from flipscale.recipe.recipe import Recipe, differences, to_yaml
from flipscale.recipe.rules import check_rules
from flipscale.start.complete_recipe import parse_recipe


@dataclass(frozen=True, kw_only=True)
class Scaled(Contrastive):
    """A loss with options."""

    factor: float = 2.0
    rounds: int = 1

    def coupled_loss(self, *loss_inputs: torch.Tensor, **parameters: torch.Tensor) -> torch.Tensor:
        return self.factor * super().coupled_loss(*loss_inputs, **parameters)


@dataclass
class TemperedOutput(FlipOutput):
    text_power: torch.Tensor | None = None


class TemperedModel(FlipModel):
    """A model with one more parameter of the loss."""

    loss_parameters: ClassVar[dict[str, bool]] = {**FlipModel.loss_parameters, "text_power": False}

    def forward(self, *inputs: Any, **kwargs: Any) -> TemperedOutput:
        return TemperedOutput(**super().forward(*inputs, **kwargs), text_power=self.text_power.float())


@dataclass(frozen=True, kw_only=True)
class Tempered(Objective):
    """A loss with a parameter, whose initial value is an option."""

    model_class: ClassVar[type[FlipModel]] = TemperedModel

    first_power: float = 0.5

    def model_config(self, config: FlipConfig) -> FlipConfig:
        config = copy.deepcopy(config)
        config.text_power_init_value = self.first_power
        return config

    def coupled_loss(
        self, images: torch.Tensor, texts: torch.Tensor, logit_scale: torch.Tensor, text_power: torch.Tensor
    ) -> torch.Tensor:
        return contrastive_loss(images, texts * text_power, logit_scale)


@pytest.fixture(autouse=True)
def more_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in {"scaled": Scaled, "tempered": Tempered}.items():
        monkeypatch.setitem(loss_kinds(), name, kind)
    monkeypatch.setattr("flipscale.recipe.loss.PAIR_LOSSES", ("infonce", "sigmoid", "scaled"))


def test_options_are_resolved() -> None:
    recipe = with_options(LossRecipe("scaled", {"factor": 3}))
    assert recipe.options == {"factor": 3.0, "rounds": 1}
    assert build_objective(Recipe(loss=recipe)) == Scaled(factor=3.0, rounds=1)
    assert LossRecipe().options == {}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("scaled", {"margin": 0.1}, "loss.options.margin .*'scaled'; its options are factor, rounds"),
        ("sigmoid", {"margin": 0.1}, "loss.options.margin .*'sigmoid'; it has none"),
        ("scaled", {"positives": "pairs"}, "loss.options.positives"),
        ("scaled", {"factor": "wide"}, "loss.options .*factor"),
        ("scaled", {"rounds": 1.5}, "loss.options .*rounds"),
    ],
)
def test_wrong_options_are_refused(kind: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_options(LossRecipe(kind, options))


def test_positives() -> None:
    recipe = LossRecipe("sigmoid", positives="equal_captions")
    assert build_objective(Recipe(loss=recipe)) == Sigmoid(positives="equal_captions")
    assert recipe.options == {}
    before = yaml.safe_load(to_yaml(parse_recipe(["--loss.kind", "sigmoid"])))
    del before["loss"]["positives"]  # as in the recipe of a run before there was the field
    assert differences(parse_recipe(["--loss.kind", "sigmoid"]), before) == []


def test_options_in_files_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"loss": {"kind": "scaled", "options": {"factor": 1e-3}}}))
    recipe = parse_recipe(["--config", str(file)])
    assert recipe.loss.options == {"factor": 1e-3, "rounds": 1}
    changed = parse_recipe(["--config", str(file), "--loss.options.factor", "4e-6"])
    assert changed.loss.options["factor"] == 4e-6
    file.write_text(to_yaml(changed))
    assert parse_recipe(["--config", str(file)]) == changed
    assert differences(recipe, yaml.safe_load(to_yaml(changed))) == ["loss.options.factor: 4e-06, now 0.001"]


def test_reconstruction_goes_with_losses_of_the_plain_model() -> None:
    objective = build_objective(Recipe(loss=LossRecipe("scaled", reconstruction_weight=0.5)))
    assert objective == WithReconstruction(other=Scaled(), weight=0.5)
    assert objective.columns == ("masked_patches",)
    with pytest.raises(ValueError, match=r"loss.kind is 'tempered' .*reconstruction_weight"):
        check_rules(Recipe(loss=LossRecipe("tempered", reconstruction_weight=0.5)))


def test_losses_of_pairs_are_those_of_the_rules() -> None:
    kinds = {name: kind for name, kind in loss_kinds().items() if name != "tempered"}
    of_pairs = {name for name, kind in kinds.items() if issubclass(kind, PairLoss) and kind.model_class is FlipModel}
    assert of_pairs == {name for name in kinds if LossRecipe(name).compares_pairs}


def test_the_model_decides_which_loss_parameters_decay() -> None:
    config = FlipConfig(vision_config={**TOWER, "image_size": 16, "patch_size": 8}, text_config=TOWER)
    model = TemperedModel(Sigmoid().model_config(Tempered().model_config(config)))
    (adamw,) = build_optimizers(model, OptimRecipe())
    decayed, kept = ({id(parameter) for parameter in group["params"]} for group in adamw.param_groups)
    assert id(model.logit_scale) in decayed
    assert {id(model.logit_bias), id(model.text_power)} <= kept


def train(write_recipe: Callable[..., Path], run_dir: Path, **changes: object) -> list[dict]:
    main(["pretrain", "--config", str(write_recipe(run_dir, **changes))])
    return [record for record in metrics(run_dir) if "loss" in record]


@pytest.mark.long
def test_a_new_kind_learns_the_same_in_micro_batches(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    whole, parts = (
        train(write_recipe, tmp_path / f"of{size}", loss={"kind": "tempered"}, data={"micro_batch_size": size})
        for size in (16, 4)
    )
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in parts] == pytest.approx([r[name] for r in whole], rel=1e-4), name
    assert whole[-1]["loss"] < whole[0]["loss"]
    assert whole[0]["text_power"] == 0.5 != whole[-1]["text_power"]
    assert not hasattr(FlipModel.from_pretrained(tmp_path / "of16/model"), "text_power")
