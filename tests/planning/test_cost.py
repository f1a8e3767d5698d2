"""What the planner computes of the paper's runs, by hand from the paper's numbers."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from flipscale.planning.cost import Gpus, cost_table, planned_cost
from flipscale.training.cost import CostRecipe
from flipscale.training.recipe import parse_recipe

H100S = Gpus("H100", 256, peak=989e12, mfu=0.45, watts=700.0)
DEMO = Path(__file__).parents[2] / "examples/demo"
COST = CostRecipe(device_hour_dollars=2.5, kwh_co2_grams=369.0, pue=1.1)


# At 989 Tflop/s x 45 %, 2.5 dollars an hour, 700 W x 1.1 and 369 g a kWh.
@pytest.mark.parametrize(
    ("name", "mask_ratio", "gpu_hours", "dollars", "kwh"),
    [
        ("l16_laion400m_clip", 0.0, 3082, 7705, 2373),
        ("l16_laion400m", 0.5, 1622, 4055, 1249),
        ("l16_laion400m", 0.75, 894, 2234, 688),
        ("h14_laion2b", 0.5, 8937, 22343, 6882),
    ],
)
def test_the_paper_s_runs(name: str, mask_ratio: float, gpu_hours: float, dollars: float, kwh: float) -> None:
    recipe = parse_recipe(["--config", name])
    first, *others = recipe.stages
    recipe = replace(recipe, stages=[replace(first, mask_ratio=mask_ratio), *others])
    found = planned_cost(recipe, H100S, COST)
    *stages, total = found.values()
    assert [*found] == [*(stage.name for stage in recipe.stages), "in all"]
    assert total.gpu_hours == pytest.approx(gpu_hours, rel=0.02)
    assert total.hours == pytest.approx(gpu_hours / 256, rel=0.02)
    assert total.dollars == pytest.approx(dollars, rel=0.02)
    assert total.kwh == pytest.approx(kwh, rel=0.02)
    assert total.co2_kg == pytest.approx(kwh * 0.369, rel=0.02)
    for field in ("pairs", "hours", "gpu_hours", "kwh", "dollars", "co2_kg"):
        assert getattr(total, field) == pytest.approx(sum(getattr(stage, field) for stage in stages)), field


def test_recipes_stand_beside_each_other() -> None:
    demo, clip = (parse_recipe(["--config", f"{DEMO}/{name}.yaml"]) for name in ("demo", "demo_clip"))
    lines = cost_table({"demo_clip": clip, "demo": demo}, replace(H100S, count=1), [COST, CostRecipe()]).splitlines()
    assert lines[:4] == [
        "planned: all but masked and pairs is computed, and nothing is measured",
        "1 x H100, each at an MFU of 45.0% of 989 Tflop/s",
        "demo_clip: 2.5 dollars a GPU's hour, 700 W a GPU, a PUE of 1.1, 369 g of CO2 a kWh",
        "demo: price unknown (--device_hour_dollars), 700 W a GPU, a PUE of 1, grid unknown (--kwh_co2_grams)",
    ]
    rows = [re.split(" {2,}", line) for line in lines[6:]]
    assert [row[0] for row in rows] == ["demo_clip"] * (len(clip.stages) + 1) + ["demo"] * (len(demo.stages) + 1)
    first, second = (row for row in rows if row[1] == "in all")
    assert first[5] == "1.00"
    assert 0.0 < float(second[5]) < 10.0
    assert "-" not in first
    assert second[-2:] == ["-", "-"]


def test_a_stage_is_counted_at_its_own_image_size() -> None:
    recipe = parse_recipe(["--config", "l16_laion400m"])
    masked = replace(recipe, stages=[replace(recipe.stages[0], mask_ratio=0.75)])
    small = replace(recipe, stages=[replace(recipe.stages[0], mask_ratio=0.0, image_size=112)])
    # Both have 49 patches.
    assert planned_cost(small, H100S, COST)["in all"] == planned_cost(masked, H100S, COST)["in all"]
    assert "0% of 112 px" in cost_table({"small": small}, H100S, [COST])


def test_a_run_that_ends_by_its_clock() -> None:
    recipe = parse_recipe(["--config", f"{DEMO}/demo.yaml"])
    masked, whole = (replace(stage, samples=None, warmup_samples=0) for stage in recipe.stages)
    stages = [replace(masked, share=0.75), replace(whole, share=0.25)]
    timed = replace(recipe, stages=stages, budget_minutes=30.0)
    gpus = replace(H100S, count=2)
    first, second, total = planned_cost(timed, gpus, COST).values()
    assert (first.hours, second.hours, total.hours) == pytest.approx((0.375, 0.125, 0.5))
    assert (total.gpu_hours, total.dollars) == pytest.approx((1.0, 2.5))
    assert total.pairs == first.pairs + second.pairs
    by_pairs = [replace(masked, samples=first.pairs), replace(whole, samples=second.pairs)]
    assert planned_cost(replace(recipe, stages=by_pairs), gpus, COST)["in all"].hours == pytest.approx(0.5, rel=1e-3)
    line = "hours of timed are its budget_minutes, and its pairs are computed"
    assert line in cost_table({"timed": timed}, gpus, [COST]).splitlines()


def test_what_cannot_be_run_is_not_planned() -> None:
    recipe = parse_recipe(["--config", f"{DEMO}/demo.yaml"])
    with pytest.raises(ValueError, match=r"^mine: global_batch_size 256 is not divisible by 1000000000 processes"):
        cost_table({"mine": recipe}, replace(H100S, count=1_000_000_000), [COST])
    nothing = replace(recipe, stages=[replace(recipe.stages[0], samples=255)])
    with pytest.raises(ValueError, match=r"^mine: stage '.*': 255 samples are less than one step of 256 pairs"):
        cost_table({"mine": nothing}, H100S, [COST])
