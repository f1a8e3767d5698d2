"""How fast a recipe trains on this machine, by training it for a few steps."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

from flipscale.evaluation.recipe import EvalRecipe
from flipscale.evaluation.results import read_metrics
from flipscale.files.aside import write_text
from flipscale.training.recipe import LogRecipe, Recipe, to_yaml

# A stage's metrics are written so many times, of which the last counts: the first ones hold its start-up.
_RECORDS = 4
_ENDLESS = 1000
_LOOK_SECONDS = 0.1


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
    return [_records(recipe, stage.name)[-1] for stage in recipe.stages]


def _records(recipe: Recipe, stage: str) -> list[float]:
    """Return the pairs a second that have been recorded of a stage so far."""
    records = read_metrics(Path(recipe.output_dir))
    return [record["images_per_s"] for record in records if record.get("stage") == stage and "images_per_s" in record]


def measured_rates(recipe: Recipe, num_steps: int, folder: Path) -> list[float]:
    """Return the pairs a second of each stage, by training `num_steps` steps of each in `folder`, as a plain
    `flipscale pretrain` would.

    Raises:
        ValueError, OSError: the recipe cannot be trained; its own last line is in the message.
    """
    short = shortened(recipe, num_steps, folder / "run")
    *earlier, last = short.stages
    # It is told to stop there: a run that comes to its end exports its model and draws figures, which take longer.
    endless = dataclasses.replace(last, samples=_ENDLESS * last.samples)
    file, log = folder / "recipe.yaml", folder / "log"
    write_text(file, to_yaml(dataclasses.replace(short, stages=[*earlier, endless])))
    command = [sys.executable, "-m", "flipscale.pretrain", "--config", str(file.absolute())]
    environment = {"TOKENIZERS_PARALLELISM": "false", **os.environ}
    with open(log, "wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            while process.poll() is None and len(_records(short, last.name)) < _RECORDS:
                time.sleep(_LOOK_SECONDS)
        finally:
            process.terminate()
            process.wait()
    if process.returncode:
        said = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]
        kind = ValueError if process.returncode == 2 else OSError
        words = said.removeprefix("flipscale: error: ")
        raise kind(f"a few steps to measure the speed ended with exit code {process.returncode}: {words}")
    return stage_rates(short)
