"""The cost of recipes, computed without GPUs: hours, energy, money and CO2.

A stage's GPU-hours are its pairs times the operations of a pair, divided by a GPU's speed at the stated MFU. The MFU is
the share of useful operations of a whole step in the peak, as in a run's `metrics.jsonl`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flipscale.data.loader import pairs_of_a_process
from flipscale.io.errors import UserError
from flipscale.io.text_table import hours_text, plain_table, rounded
from flipscale.planning.flops import pair_flops
from flipscale.recipe.outputs import CostRecipe
from flipscale.recipe.recipe import Recipe
from flipscale.recipe.schedule import schedule_stages

_TOTAL = "in all"


@dataclass(frozen=True)
class Gpus:
    """The GPUs of a run.

    Args:
        peak: bf16 operations per second of a GPU.
        mfu: useful operations of whole steps as a share of the peak.
        watts: power of a GPU during training; None if unknown.
    """

    name: str
    count: int
    peak: float
    mfu: float
    watts: float | None = None


@dataclass(frozen=True)
class PlannedCost:
    """The computed cost of a stage or of a whole run, with the computing centre's overhead. What follows from unknown
    power, prices or grids is None."""

    pairs: int
    hours: float
    gpu_hours: float
    kwh: float | None
    dollars: float | None
    co2_kg: float | None


def planned_cost(recipe: Recipe, gpus: Gpus, cost: CostRecipe) -> dict[str, PlannedCost]:
    """Return the cost of each stage by name, and of the whole run as `in all`. If a run ends by its clock, its hours
    are known and its pairs are computed."""
    batch, minutes = recipe.data.global_batch_size, recipe.budget_minutes
    pairs_of_a_process(batch, gpus.count)
    stages, flops = schedule_stages(recipe.stages, batch, minutes), pair_flops(recipe)
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
    costs = {}
    for name, hours in gpu_hours.items():
        drawn = None if gpus.watts is None else hours * gpus.watts / 1000
        kwh = None if drawn is None else drawn * cost.pue
        costs[name] = PlannedCost(pairs[name], hours / gpus.count, hours, kwh, cost.dollars(hours), cost.co2_kg(drawn))
    return costs


def cost_table(recipes: dict[str, Recipe], gpus: Gpus, costs: Sequence[CostRecipe]) -> str:
    """Return the assumptions, and a table with a row for each recipe and one for each stage of several."""
    head = ["recipe, stage", "masked", "pairs", "time", "GPU-hours", "of first", "kWh", "dollars", "kg CO2"]
    rows, first = [head], None
    for (name, recipe), cost in zip(recipes.items(), costs, strict=True):
        try:
            by_stage = planned_cost(recipe, gpus, cost)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
        total = by_stage.pop(_TOTAL)
        first = first or total.gpu_hours
        masked = [
            f"{stage.mask_ratio:.0%}" + ("" if stage.image_size is None else f" of {stage.image_size} px")
            for stage in recipe.stages
        ]
        rows.append(_row(name, masked[0] if len(masked) == 1 else "", total, f"{total.gpu_hours / first:.0%}"))
        if len(masked) > 1:
            rows += [_row(f"  {stage}", share, by_stage[stage]) for stage, share in zip(by_stage, masked, strict=True)]
    assumed = _assumed(gpus, dict(zip(recipes, costs, strict=True)))
    timed = [name for name, recipe in recipes.items() if recipe.budget_minutes is not None]
    assumed += [f"hours of {name} are its budget_minutes, and its pairs are computed" for name in timed]
    return "\n".join([*assumed, "", plain_table(rows, range(1, len(head)))])


def _row(name: str, masked: str, planned: PlannedCost, share: str = "") -> list[str]:
    hours = [hours_text(planned.hours), hours_text(planned.gpu_hours)]
    others = ["-" if value is None else rounded(value) for value in (planned.kwh, planned.dollars, planned.co2_kg)]
    return [name, masked, f"{planned.pairs:,}", *hours, share, *others]


def _assumed(gpus: Gpus, costs: dict[str, CostRecipe]) -> list[str]:
    """Return the lines above the table."""
    watts = "power unknown (--watts)" if gpus.watts is None else f"{gpus.watts:g} W a GPU"
    lines = [f"computed, for {gpus.count} x {gpus.name} at {gpus.mfu:.1%} of {gpus.peak / 1e12:,.0f} Tflop/s (MFU)"]
    for name, cost in costs.items():
        price, grid = cost.device_hour_dollars, cost.kwh_co2_grams
        dollars = "price unknown (--device_hour_dollars)" if price is None else f"{price:g} dollars a GPU's hour"
        co2 = "grid unknown (--kwh_co2_grams)" if grid is None else f"{grid:g} g of CO2 a kWh"
        line = f"{dollars}, {watts}, a PUE of {cost.pue:g}, {co2}"
        if len(set(costs.values())) == 1:
            return [*lines, line]
        lines.append(f"{name}: {line}")
    return lines
