"""What a recipe takes on GPUs that are not there: hours, energy, money and CO2, by the operations of its products.

A stage's GPU-hours are its pairs times the operations of a pair, over what a GPU does at the MFU stated: useful
operations of a whole step as a share of the peak, which is what a run's `metrics.jsonl` calls mfu.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flipscale.data.loader import pairs_of_a_process
from flipscale.io.errors import UserError
from flipscale.io.text_table import plain_table, rounded
from flipscale.planning.flops import pair_flops
from flipscale.training.cost import CostRecipe
from flipscale.training.recipe import Recipe
from flipscale.training.schedule import StageRecipe, plan_stages

_TOTAL = "in all"


@dataclass(frozen=True)
class Gpus:
    """What trains.

    Args:
        name: as its maker writes it.
        count: how many.
        peak: bf16 operations a second of one of them.
        mfu: useful operations of whole steps as a share of that.
        watts: that one of them takes while it trains, None where that is unknown.
    """

    name: str
    count: int
    peak: float
    mfu: float
    watts: float | None = None


@dataclass(frozen=True)
class Planned:
    """What a stage or a whole run takes, by computation.

    Args:
        kwh: of the GPUs and what the computing centre adds; like the two below, None where nobody said what it takes.
    """

    pairs: int
    hours: float
    gpu_hours: float
    kwh: float | None
    dollars: float | None
    co2_kg: float | None


def planned_cost(recipe: Recipe, gpus: Gpus, cost: CostRecipe) -> dict[str, Planned]:
    """Return what each stage takes, by its name, and the whole run as `in all`. Of a run that ends by its clock the
    hours are known, and the pairs that it sees are computed.

    Raises:
        ValueError: the GPUs do not divide the batch, or stages that cannot be trained.
    """
    batch, minutes = recipe.data.global_batch_size, recipe.budget_minutes
    pairs_of_a_process(batch, gpus.count)
    stages, flops = plan_stages(recipe.stages, batch, minutes), pair_flops(recipe)
    rate = gpus.peak * gpus.mfu * 3600
    pairs, gpu_hours = {}, {}
    for stage in stages:
        length, name = stage.last - stage.first, stage.name
        if minutes is None:
            pairs[name] = int(length) * batch
            gpu_hours[name] = pairs[name] * flops[name] / rate
        else:
            gpu_hours[name] = length * minutes / 60 * gpus.count
            pairs[name] = int(gpu_hours[name] * rate / flops[name] / batch) * batch
    pairs[_TOTAL], gpu_hours[_TOTAL] = sum(pairs.values()), sum(gpu_hours.values())
    found = {}
    for name, hours in gpu_hours.items():
        drawn = None if gpus.watts is None else hours * gpus.watts / 1000
        kwh = None if drawn is None else drawn * cost.pue
        found[name] = Planned(pairs[name], hours / gpus.count, hours, kwh, cost.dollars(hours), cost.co2_kg(drawn))
    return found


def cost_table(recipes: dict[str, Recipe], gpus: Gpus, costs: Sequence[CostRecipe]) -> str:
    """Return what is assumed, and a table with a row for each stage of each recipe and for each recipe.

    Args:
        recipes: by what they are called.
        costs: of each of them.

    Raises:
        ValueError: as `planned_cost`, with the name of the recipe.
    """
    head = ["recipe", "stage", "masked", "pairs", "hours", "GPU-hours", "of the first", "kWh", "dollars", "kg CO2"]
    rows, first = [head], None
    for (name, recipe), cost in zip(recipes.items(), costs, strict=True):
        try:
            found = planned_cost(recipe, gpus, cost)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
        first = first or found[_TOTAL].gpu_hours
        masked = {stage.name: _seen(stage) for stage in recipe.stages}
        for stage, one in found.items():
            share = f"{one.gpu_hours / first:.2f}" if stage == _TOTAL else ""
            numbers = [_said(one.kwh), _said(one.dollars), _said(one.co2_kg)]
            hours = [_said(one.hours), _said(one.gpu_hours), share]
            rows.append([name, stage, masked.get(stage, ""), f"{one.pairs:,}", *hours, *numbers])
    assumed = _assumed(gpus, dict(zip(recipes, costs, strict=True)))
    timed = [name for name, recipe in recipes.items() if recipe.budget_minutes is not None]
    assumed += [f"hours of {name} are its budget_minutes, and its pairs are computed" for name in timed]
    return "\n".join([*assumed, "", plain_table(rows, range(2, len(head)))])


def _assumed(gpus: Gpus, costs: dict[str, CostRecipe]) -> list[str]:
    """Return the sentences above the table."""
    lines = [
        "planned: all but masked and pairs is computed, and nothing is measured",
        f"{gpus.count} x {gpus.name}, each at an MFU of {gpus.mfu:.1%} of {gpus.peak / 1e12:,.0f} Tflop/s",
    ]
    same = len(set(costs.values())) == 1
    for name, cost in costs.items():
        of = "" if same else f"{name}: "
        watts = f"{gpus.watts:g} W a GPU" if gpus.watts is not None else "power unknown (--watts)"
        price, grid = cost.device_hour_dollars, cost.kwh_co2_grams
        dollars = f"{price:g} dollars a GPU's hour" if price is not None else "price unknown (--device_hour_dollars)"
        co2 = f"{grid:g} g of CO2 a kWh" if grid is not None else "grid unknown (--kwh_co2_grams)"
        lines.append(f"{of}{dollars}, {watts}, a PUE of {cost.pue:g}, {co2}")
    return lines[:3] if same else lines


def _seen(stage: StageRecipe) -> str:
    """Return the share of the patches that a stage leaves out, and the size of its images if that is its own."""
    return f"{stage.mask_ratio:.0%}" + (f" of {stage.image_size} px" if stage.image_size is not None else "")


def _said(value: float | None) -> str:
    return "-" if value is None else rounded(value)
