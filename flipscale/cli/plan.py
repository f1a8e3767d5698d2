"""Compute the hours, energy, money and CO2 of recipes before they are trained."""

import dataclasses
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from flipscale.io.errors import UserError
from flipscale.io.options import Count, NonNegative, Overhead, Positive, ShareAboveZero


@dataclass(frozen=True)
class Plan:
    """Compute the hours, energy, money and CO2 of recipes before they are trained.

    Args:
        recipes: A recipe file, or the name of a recipe of the package.
        gpu: The kind of GPU, such as h100 or rtx_4090.
        num_gpus: Number of GPUs.
        launch_file: accelerate's launch file, such as ds_configs/hsdp.yaml. Default: data parallel in bf16.
        mfu: Measured model FLOPs utilisation of a whole step. Default: the steps are computed, as by `flipscale
            pretrain --dry_run`.
        bench: The gpu.json of `flipscale bench gpu` on such GPUs, with the speed, links, host and loaders.
        node_gb_s: GB/s per GPU within a node. Default: by the kind of GPU.
        network_gb_s: GB/s per GPU between nodes. Default: by the kind of GPU.
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
    launch_file: Path | None = None
    mfu: ShareAboveZero | None = None
    bench: Path | None = None
    node_gb_s: Positive | None = None
    network_gb_s: Positive | None = None
    watts: Positive | None = None
    device_hour_dollars: NonNegative | None = None
    pue: Overhead | None = None
    kwh_co2_grams: NonNegative | None = None

    def run(self) -> None:
        # Imported here, because torch takes seconds and --help should not wait.
        from flipscale.engines.device import gpu_named
        from flipscale.planning.budget import with_time_shares
        from flipscale.planning.cost import Gpus, cost_table
        from flipscale.planning.dry_run import planned_launch
        from flipscale.planning.time import planned_hardware
        from flipscale.start.complete_recipe import parse_recipe

        gpu, links = gpu_named(self.gpu), {"node_gb_s": self.node_gb_s, "network_gb_s": self.network_gb_s}
        if self.mfu is not None and self.bench is not None:
            raise UserError("--mfu and --bench both give the speed of a GPU; leave one of them out")
        recipes = {recipe: with_time_shares(parse_recipe(["--config", recipe])) for recipe in self.recipes}
        hardware = {
            name: planned_hardware(recipe, gpu, self.num_gpus, "--mfu", None, self.bench, **links)
            for name, recipe in recipes.items()
            if self.mfu is None
        }
        gpus = Gpus(gpu, planned_launch(self.launch_file, self.num_gpus), self.mfu, self.watts, hardware)
        prices = ("device_hour_dollars", "pue", "kwh_co2_grams")
        given = {field: getattr(self, field) for field in prices if getattr(self, field) is not None}
        print(cost_table(recipes, gpus, [dataclasses.replace(recipe.cost, **given) for recipe in recipes.values()]))
