"""Every recipe of the package parses, plans, and comes back from its own YAML."""

from pathlib import Path

import pytest
import yaml

from flipscale.training.recipe import RECIPES, differences, parse_recipe, to_yaml
from flipscale.training.schedule import plan_stages

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_recipe(name: str, tmp_path: Path) -> None:
    recipe = parse_recipe(["--config", name])
    assert plan_stages(recipe.stages, recipe.data.global_batch_size)[-1].last_step > 0
    assert recipe.model.config().vision_config.num_patches > 0
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert parse_recipe(["--config", str(tmp_path / "again.yaml")]) == recipe
    assert differences(recipe, yaml.safe_load(to_yaml(recipe))) == []


def test_the_paper_s_sizes_and_rates() -> None:
    expected = {"b16_laion400m": 1.024e-3, "h14_laion400m": 1.024e-3, "l16_laion2b": 5.12e-4, "h14_laion2b": 5.12e-4}
    for name, peak in expected.items():
        recipe = parse_recipe(["--config", name])
        stages = plan_stages(recipe.stages, recipe.data.global_batch_size)
        assert stages[0].peak_lr == pytest.approx(peak)
        assert stages[1].peak_lr == pytest.approx(1.024e-5)
        assert [stage.mask_ratio for stage in stages] == [0.5, 0.0]


def test_flags_override_the_file() -> None:
    recipe = parse_recipe(["--config", "b16_cc3m", "--optim.weight_decay", "0.1", "--seed", "4"])
    assert (recipe.optim.weight_decay, recipe.seed) == (0.1, 4)
