"""Compute the hours, energy, money and CO2 of recipes before they are trained."""

import dataclasses
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from flipscale.io.options import Count, NonNegative, Overhead, Positive, ShareAboveZero


@dataclass(frozen=True)
class Plan:
    """Compute the hours, energy, money and CO2 of recipes before they are trained.

    Args:
        recipes: A recipe file, or the name of a recipe of the package.
        gpu: The kind of GPU, such as h100 or rtx_4090.
        num_gpus: Number of GPUs.
        mfu: Measured model FLOPs utilisation of a whole step. Default: 0.4.
        bench: The gpu.json of `flipscale bench gpu` on such GPUs, instead of --mfu. Its step for the model of
            the first recipe is used.
        watts: Power of a GPU during training.
        device_hour_dollars: Price of a GPU per hour. Default: the recipe's `cost` section. The same holds for --pue
            and --kwh_co2_grams.
        pue: Total power of the data centre divided by its machines' power.
        kwh_co2_grams: The grid's CO2 emissions in grams per kWh.
    """

    recipes: list[str]
    _: KW_ONLY
    gpu: str
    num_gpus: Count = 1
    mfu: ShareAboveZero | None = None
    bench: Path | None = None
    watts: Positive | None = None
    device_hour_dollars: NonNegative | None = None
    pue: Overhead | None = None
    kwh_co2_grams: NonNegative | None = None

    def run(self) -> None:
        # Imported here, because torch takes seconds and --help should not wait.
        from flipscale.engines.device import GPUS, gpu_named
        from flipscale.planning.budget import with_time_shares
        from flipscale.planning.cost import Gpus, cost_table
        from flipscale.planning.time import matmul_share, speed_key
        from flipscale.start.complete_recipe import parse_recipe

        name = gpu_named(self.gpu)
        peak = 1e12 * GPUS[name].teraflops
        recipes = {recipe: with_time_shares(parse_recipe(["--config", recipe])) for recipe in self.recipes}
        mfu = matmul_share("--mfu", self.mfu, self.bench, peak, speed_key(recipes[self.recipes[0]]))
        gpus = Gpus(name, self.num_gpus, peak, mfu, self.watts)
        prices = ("device_hour_dollars", "pue", "kwh_co2_grams")
        given = {field: getattr(self, field) for field in prices if getattr(self, field) is not None}
        print(cost_table(recipes, gpus, [dataclasses.replace(recipe.cost, **given) for recipe in recipes.values()]))
