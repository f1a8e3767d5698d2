"""How fast a recipe trains on this machine, by training it for a few steps."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

from flipscale.evaluation.recipe import EvalRecipe
from flipscale.evaluation.results import read_metrics
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.training.recipe import LogRecipe, Recipe, to_yaml

# A stage's metrics are written so many times, of which the last counts: the first ones hold its start-up.
_RECORDS = 4
_ENDLESS = 1000
_LOOK_SECONDS = 0.1


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
    samples = num_steps * recipe.data.global_batch_size
    *earlier, last = [dataclasses.replace(stage, samples=samples, warmup_samples=0) for stage in recipe.stages]
    # It is told to stop there: a run that comes to its end exports its model and draws figures, which take longer.
    endless = dataclasses.replace(last, samples=_ENDLESS * samples)
    short = dataclasses.replace(
        recipe,
        stages=[*earlier, endless],
        log=LogRecipe(every_samples=samples // _RECORDS, report_to=[]),
        eval=EvalRecipe(),
        output_dir=str(folder / "run"),
    )
    file, log = folder / "recipe.yaml", folder / "log"
    write_text(file, to_yaml(short))
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
        kind = UserError if process.returncode == 2 else OSError
        words = said.removeprefix("flipscale: error: ")
        raise kind(f"a few steps to measure the speed ended with exit code {process.returncode}: {words}")
    return [_records(short, stage.name)[-1] for stage in short.stages]
