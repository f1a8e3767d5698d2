"""Measure the speed of a recipe on this machine, by short runs of its stages."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from flipscale.engines.launch import faster_precision
from flipscale.io.atomic import write_text
from flipscale.io.cores import end_with_parent
from flipscale.io.errors import UserError
from flipscale.io.json_lines import read_metrics
from flipscale.io.paths import last_line
from flipscale.io.progress import Progress
from flipscale.recipe.outputs import EvalRecipe
from flipscale.recipe.recipe import Recipe, to_yaml

# Records of a stage's metrics while its speed is measured. The last one counts, because the first include start-up.
_RECORDS = 4


def measured_rates(recipe: Recipe, num_steps: int, folder: Path) -> list[float]:
    """Return the pairs per second of each stage, by `num_steps` steps of `flipscale pretrain` in `folder`. If it
    fails, raise UserError or OSError with its last line."""
    samples = num_steps * recipe.data.global_batch_size
    lengths: dict[str, Any] = {"samples": samples, "warmup_samples": 0, "share": None, "warmup_share": 0.0}
    stages = [replace(stage, **lengths) for stage in recipe.stages]
    # The trainer is stopped in an endless stage, because a finished run also exports its model and draws figures.
    stages[-1] = replace(stages[-1], samples=1000 * samples)
    short = replace(
        recipe,
        stages=stages,
        budget_minutes=None,
        log=replace(recipe.log, every_samples=samples // _RECORDS, report_to=[]),
        eval=EvalRecipe(),
        output_dir=str(folder / "run"),
    )
    file, log = folder / "recipe.yaml", folder / "log"
    write_text(file, to_yaml(short))
    command = [sys.executable, "-m", "flipscale.pretrain", "--config", str(file.absolute())]
    environment = {"TOKENIZERS_PARALLELISM": "false", **faster_precision(os.environ), **os.environ}
    rates: dict[str, list[float]] = {stage.name: [] for stage in stages}
    with open(log, "wb") as output, Progress(len(stages) * num_steps, "measuring", "steps", leave=False) as bar:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, preexec_fn=end_with_parent)
        try:
            while process.poll() is None and len(rates[stages[-1].name]) < _RECORDS:
                time.sleep(0.1)
                records = [one for one in read_metrics(folder / "run") if "images_per_s" in one]
                rates = {name: [one["images_per_s"] for one in records if one.get("stage") == name] for name in rates}
                bar.update(num_steps * sum(min(len(own), _RECORDS) for own in rates.values()) // _RECORDS - bar.n)
        finally:
            process.terminate()
            process.wait()
    if process.returncode:
        words = f"measuring the speed ended with exit code {process.returncode}: {last_line(log)}"
        raise (UserError if process.returncode == 2 else OSError)(words)
    return [own[-1] for own in rates.values()]
