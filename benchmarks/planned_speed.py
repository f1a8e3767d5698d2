"""Print the computed speed of FLIP on 256 H100 by model and mask, as the table of docs/speed.md. No GPU is needed.

python benchmarks/planned_speed.py
"""

import argparse
from dataclasses import replace

from flipscale.engines.device import GPUS
from flipscale.engines.launch import Launch
from flipscale.planning.flops import pair_flops
from flipscale.planning.memory import GPUS_OF_A_NODE, USABLE, recipe_memory
from flipscale.planning.time import planned_hardware, step_time
from flipscale.recipe.recipe import parse_fields

_LAUNCH = Launch("fsdp2", 256, "bf16", shard_size=8, reshard_after_forward=False, prefetches=True)
_PAIRS = 12_800_000_000  # 32 epochs of LAION-400M
_COLUMNS = """\
| model | masked | recomputed | Gflop a pair | share of the peak | pairs/s a GPU | images/s a node | workers a node \
| GB/s from storage | hours for 12.8 B pairs |
|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"""


def row(size: str, mask_ratio: float) -> str:
    """Return a model's row: 65,536 pairs of the first stage of `l16_laion400m`, its other settings as they are."""
    recipe = parse_fields(["--config", "l16_laion400m", "--model.size", size])
    stage = replace(recipe.stages[0], mask_ratio=mask_ratio)
    recipe = replace(recipe, stages=[stage])
    recomputes = recipe_memory(recipe, _LAUNCH).total > USABLE * GPUS["H100"].gib * 2**30
    stage = replace(stage, gradient_checkpointing=recomputes)
    recipe = replace(recipe, stages=[stage])
    hardware = planned_hardware(recipe, "H100", 256, "", None, None)
    # The GPUs' own speed; the columns beside it say what feeds them.
    step = step_time(recipe, _LAUNCH, stage, replace(hardware, images_per_worker_s=1e12))
    rate = step.batch / step.seconds
    of_a_node = rate / _LAUNCH.num_processes * GPUS_OF_A_NODE
    cells = (
        f"{size.upper()[0]}/{size[1:]}",
        f"{mask_ratio:.0%}",
        "yes" if recomputes else "no",
        f"{pair_flops(recipe)[stage.name] / 1e9:,.0f}",
        f"{hardware.matmul_share:.0%}",
        f"{rate / _LAUNCH.num_processes:,.0f}",
        f"{of_a_node:,.0f}",
        f"{of_a_node / hardware.decoded(224):,.0f}",
        f"{rate * hardware.pair_kb / 1e6:,.0f}",
        f"{_PAIRS / rate / 3600:.1f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(_COLUMNS)
    for size in ("b16", "l14", "h14"):
        for mask_ratio in (0.0, 0.5, 0.75):
            print(row(size, mask_ratio))
