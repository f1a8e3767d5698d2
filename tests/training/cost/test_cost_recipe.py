"""The section `cost`: what it computes, and recipes from before it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from flipscale.training.cost.recipe import CostRecipe, cost_of_saved
from flipscale.training.recipe import parse_recipe, to_yaml


def test_what_is_unknown_is_not_computed() -> None:
    cost = CostRecipe(device_hour_dollars=2.5, kwh_co2_grams=400.0, pue=1.2)
    assert (cost.dollars(4.0), cost.co2_kg(10.0)) == (10.0, pytest.approx(4.8))
    assert (cost.dollars(None), cost.co2_kg(None)) == (None, None)
    assert (CostRecipe().dollars(4.0), CostRecipe().co2_kg(10.0)) == (None, None)


def test_a_recipe_saved_before_the_section(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = parse_recipe(["--config", str(write_recipe(tmp_path / "run", hub={"license": "mit"}))])
    saved = yaml.safe_load(to_yaml(recipe))
    del saved["cost"]
    file = tmp_path / "recipe.yaml"
    for price in (None, 2.5):
        saved["hub"] |= {"device_hour_dollars": price, "kwh_co2_grams": None}
        file.write_text(yaml.safe_dump(saved))
        # A checkpoint's own copy, whose model is exported.
        assert parse_recipe(["--config", str(file)], is_saved=True) == recipe
        assert cost_of_saved(saved) == CostRecipe()
        if price is None:
            assert parse_recipe(["--config", str(file)]) == recipe
    message = "hub.device_hour_dollars is called cost.device_hour_dollars now; set that"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_recipe(["--config", str(file)])
    for flags in (["--hub.kwh_co2_grams", "3"], ["--hub.kwh_co2_grams=3"]):
        with pytest.raises(ValueError, match=r"^hub\.kwh_co2_grams is called cost\.kwh_co2_grams now; set that$"):
            parse_recipe(flags)
    with pytest.raises(ValueError, match=r"cost\.pue is 0\.9; it must be at least 1"):
        parse_recipe(["--cost.pue", "0.9"])
