"""The cost of recipes, computed without GPUs: hours, energy, money and CO2.

A stage's hours are its steps times the seconds of a step, as in the dry run. With a stated MFU, they are its operations
divided by the speed of the GPUs. The MFU is the share of useful operations of a whole step in the peak, as in a run's
`metrics.jsonl`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flipscale.data.loader import pairs_of_a_process
from flipscale.engines.device import GPUS
from flipscale.engines.launch import Launch
from flipscale.io.errors import UserError
from flipscale.io.text_table import hours_text, plain_table, rounded
from flipscale.planning.flops import pair_flops
from flipscale.planning.memory import recipe_memory
from flipscale.planning.time import Hardware, step_time
from flipscale.recipe.outputs import CostRecipe
from flipscale.recipe.recipe import Recipe
from flipscale.recipe.schedule import schedule_stages

_TOTAL = "in all"


@dataclass(frozen=True)
class Gpus:
    """The GPUs of a run.

    Args:
        name: name in `flipscale.engines.device.GPUS`.
        launch: the launch of all GPUs.
        mfu: useful operations of whole steps as a share of the peak; None to compute the steps.
        watts: power of a GPU during training; None if unknown.
        hardware: hardware of each recipe by name, to compute its steps.
    """

    name: str
    launch: Launch
    mfu: float | None = None
    watts: float | None = None
    hardware: Mapping[str, Hardware] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.launch.num_processes

    def pairs_per_second(self, name: str, recipe: Recipe) -> dict[str, float]:
        """Return the pairs per second of all GPUs, by stage name of the recipe called `name`."""
        if self.mfu is not None:
            speed = self.count * 1e12 * GPUS[self.name].teraflops * self.mfu
            return {stage: speed / flops for stage, flops in pair_flops(recipe).items()}
        steps = {stage.name: step_time(recipe, self.launch, stage, self.hardware[name]) for stage in recipe.stages}
        return {stage: step.batch / step.seconds for stage, step in steps.items()}


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


def planned_cost(name: str, recipe: Recipe, gpus: Gpus, cost: CostRecipe) -> dict[str, PlannedCost]:
    """Return the cost of each stage by name, and of the whole run as `in all`. If a run ends by its clock, its hours
    are known and its pairs are computed."""
    batch, minutes = recipe.data.global_batch_size, recipe.budget_minutes
    pairs_of_a_process(batch, gpus.count)
    stages, rates = schedule_stages(recipe.stages, batch, minutes), gpus.pairs_per_second(name, recipe)
    pairs, gpu_hours = {}, {}
    for stage in stages:
        length, name = stage.last - stage.first, stage.name
        if minutes is None:
            pairs[name] = int(length) * batch
            gpu_hours[name] = pairs[name] / rates[name] * gpus.count / 3600
        else:
            gpu_hours[name] = length * minutes / 60 * gpus.count
            pairs[name] = int(length * minutes * 60 * rates[name] / batch) * batch
    pairs[_TOTAL], gpu_hours[_TOTAL] = sum(pairs.values()), sum(gpu_hours.values())
    costs = {}
    for name, hours in gpu_hours.items():
        drawn = None if gpus.watts is None else hours * gpus.watts / 1000
        kwh = None if drawn is None else drawn * cost.pue
        costs[name] = PlannedCost(pairs[name], hours / gpus.count, hours, kwh, cost.dollars(hours), cost.co2_kg(drawn))
    return costs


def cost_table(recipes: dict[str, Recipe], gpus: Gpus, costs: Sequence[CostRecipe]) -> str:
    """Return the assumptions, and a table with a row for each recipe and one for each stage of several."""
    gib = GPUS[gpus.name].gib
    head = [
        "recipe, stage",
        "masked",
        "pairs",
        "time",
        "GPU-hours",
        "of first",
        "kWh",
        "dollars",
        "kg CO2",
        f"in {gib} GiB",
    ]
    rows, first = [head], None
    for (name, recipe), cost in zip(recipes.items(), costs, strict=True):
        try:
            by_stage = planned_cost(name, recipe, gpus, cost)
            fits = "yes" if recipe_memory(recipe, gpus.launch).fits(gib) else "no"
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
        total = by_stage.pop(_TOTAL)
        first = first or total.gpu_hours
        masked = [
            f"{stage.mask_ratio:.0%}" + ("" if stage.image_size is None else f" of {stage.image_size} px")
            for stage in recipe.stages
        ]
        share = f"{total.gpu_hours / first:.0%}"
        rows.append([*_row(name, masked[0] if len(masked) == 1 else "", total, share), fits])
        if len(masked) > 1:
            stages = zip(by_stage, masked, strict=True)
            rows += [[*_row(f"  {stage}", mask, by_stage[stage]), ""] for stage, mask in stages]
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
    peak = GPUS[gpus.name].teraflops
    speed = f"of {peak:,.0f} Tflop/s" if gpus.mfu is None else f"at {gpus.mfu:.1%} of {peak:,.0f} Tflop/s (MFU)"
    lines = [f"computed, for {gpus.count} x {gpus.name} {speed}, {gpus.launch.engine}"]
    for name, cost in costs.items():
        price, grid = cost.device_hour_dollars, cost.kwh_co2_grams
        dollars = "price unknown (--device_hour_dollars)" if price is None else f"{price:g} dollars a GPU's hour"
        co2 = "grid unknown (--kwh_co2_grams)" if grid is None else f"{grid:g} g of CO2 a kWh"
        line = f"{dollars}, {watts}, a PUE of {cost.pue:g}, {co2}"
        if len(set(costs.values())) == 1:
            return [*lines, line]
        lines.append(f"{name}: {line}")
    return lines
