"""How fast a recipe trains on this machine, by training it for a few steps."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from flipscale.evaluation.recipe import EvalRecipe
from flipscale.evaluation.results import read_metrics
from flipscale.files.aside import write_text
from flipscale.training.recipe import LogRecipe, Recipe, to_yaml

# A stage's metrics are written so many times, of which the last counts: the first ones hold its start-up.
_RECORDS = 4


def shortened(recipe: Recipe, num_steps: int, run_dir: Path) -> Recipe:
    """Return the recipe with stages of `num_steps` steps and nothing besides, which trains in `run_dir`."""
    samples = num_steps * recipe.data.global_batch_size
    return dataclasses.replace(
        recipe,
        stages=[dataclasses.replace(stage, samples=samples, warmup_samples=0) for stage in recipe.stages],
        log=LogRecipe(every_samples=samples // _RECORDS, report_to=[]),
        eval=EvalRecipe(),
        output_dir=str(run_dir),
    )


def stage_rates(recipe: Recipe) -> list[float]:
    """Return the pairs a second of each stage of a shortened recipe that has been trained."""
    records = [record for record in read_metrics(Path(recipe.output_dir)) if "images_per_s" in record]
    return [[r["images_per_s"] for r in records if r["stage"] == stage.name][-1] for stage in recipe.stages]


def measured_rates(recipe: Recipe, num_steps: int, folder: Path) -> list[float]:
    """Return the pairs a second of each stage, by training `num_steps` steps of each in `folder`, as a plain
    `flipscale pretrain` would.

    Raises:
        ValueError, OSError: the recipe cannot be trained; its own last line is in the message.
    """
    short = shortened(recipe, num_steps, folder / "run")
    file = folder / "recipe.yaml"
    write_text(file, to_yaml(short))
    command = [sys.executable, "-m", "flipscale.pretrain", "--config", str(file.absolute())]
    environment = {"TOKENIZERS_PARALLELISM": "false", **os.environ}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no output"])[-1].removeprefix("flipscale: error: ")
        kind = ValueError if done.returncode == 2 else OSError
        raise kind(f"a few steps to measure the speed ended with exit code {done.returncode}: {said}")
    return stage_rates(short)
