"""The run directory: what is promised to lie in it, and whose it is.

recipe.yaml  environment.json  starts.jsonl  metrics.jsonl  heartbeat.json  tensorboard/  checkpoints/step-*/  model/
DONE, and where there was cause slow_steps.jsonl, stacks/ and Slurm's slurm/
"""

import json
import os
import platform
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

import flipscale
from flipscale.training.checkpoint import latest_checkpoint
from flipscale.training.recipe import Recipe, differences, to_yaml


def open_run_directory(recipe: Recipe) -> Path | None:
    """The checkpoint that the run goes on from, None for a fresh start.

    Every process calls it before any of them writes.

    Raises:
        ValueError: the directory holds a run of another recipe, or one that is not to be resumed.
    """
    run_dir = Path(recipe.output_dir)
    saved = run_dir / "recipe.yaml"
    if recipe.resume_from_checkpoint not in ("auto", "never"):
        raise ValueError(f"resume_from_checkpoint is {recipe.resume_from_checkpoint!r}; use 'auto' or 'never'")
    if not saved.exists():
        return None
    changed = differences(recipe, yaml.safe_load(saved.read_text()))
    if changed:
        raise ValueError(
            f"{run_dir} holds a run of another recipe ({'; '.join(changed)}); use that recipe or another output_dir"
        )
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is not None and recipe.resume_from_checkpoint == "never":
        raise ValueError(
            f"{run_dir} holds {checkpoint.name} and resume_from_checkpoint is 'never'; use another output_dir"
        )
    return checkpoint


def mark_done(run_dir: Path) -> None:
    """Says that the run of `run_dir` has ended."""
    (run_dir / "DONE").touch()


def is_done(recipe: Recipe) -> bool:
    """Whether the recipe's run has ended already.

    Raises:
        ValueError: the directory holds a run of another recipe.
    """
    return open_run_directory(recipe) is not None and (Path(recipe.output_dir) / "DONE").exists()


def write_run_files(recipe: Recipe, num_processes: int, step: int) -> None:
    """Writes `recipe.yaml` and `environment.json`, and adds this start, at `step`, to `starts.jsonl`; main process
    only."""
    run_dir = Path(recipe.output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yaml").write_text(to_yaml(recipe))
    (run_dir / "environment.json").write_text(json.dumps(environment(num_processes), indent=1) + "\n")
    start = {
        "time": time.time(),
        "step": step,
        "num_processes": num_processes,
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    with open(run_dir / "starts.jsonl", "a") as file:
        file.write(json.dumps(start) + "\n")


def environment(num_processes: int) -> dict[str, Any]:
    """Versions, machine and launch of this run."""
    packages = ("torch", "transformers", "accelerate", "numpy", "simplejpeg", "opencv-python-headless")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "flipscale": flipscale.__version__,
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "command": sys.argv,
        "num_processes": num_processes,
        "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }
