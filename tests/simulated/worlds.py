"""Steps of a small recipe as single processes of large worlds take them, each simulated once."""

import functools
from pathlib import Path

from simulated.world import StepReport, World, simulate

from flipscale.engines.launch import read_launch_file
from flipscale.training.recipe import parse_recipe
from flipscale.training.schedule import plan_stages

LAUNCH_FILES = Path(__file__).parents[2] / "ds_configs"
BATCH = 4096
_TOWER = "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64"
RECIPE = [
    f"--model.vision_config={_TOWER}, image_size: 32, patch_size: 8}}",
    f"--model.text_config={_TOWER}, vocab_size: 16, max_position_embeddings: 8}}",
    "--data.shards=none",
    f"--data.global_batch_size={BATCH}",
    "--stages=[{name: masked, samples: 40960000, mask_ratio: 0.75, base_lr: 1e-6}, "
    "{name: whole, samples: 4096000, base_lr: 1e-7}]",
]


@functools.cache
def step(engine: str, processes: int, rank: int, *flags: str) -> StepReport:
    """What a step of the small recipe, changed by `flags`, does."""
    recipe = parse_recipe([*RECIPE, *flags])
    launch = read_launch_file(LAUNCH_FILES / f"{engine}.yaml", processes)
    return simulate(World(recipe, launch, plan_stages(recipe.stages, BATCH)[0], rank))
