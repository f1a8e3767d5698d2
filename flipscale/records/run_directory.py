"""The run directory, and the files that a start writes there.

recipe.yaml  environment.json  starts.jsonl  metrics.jsonl  heartbeat.json  tensorboard/  checkpoints/step-*/  model/
DONE  report.html  run.lock (during a run)

If needed: results.jsonl  schedule.jsonl  energy.jsonl  slow_steps.jsonl  stacks/  profile/  bad_samples.jsonl  push.log
tracker_run_id  slurm/ (by the batch scripts)
"""

import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import flipscale
from flipscale.engines.launch import PRECISION, launched_precision
from flipscale.io import json_lines
from flipscale.io.atomic import write_text
from flipscale.io.paths import check_disk_space
from flipscale.io.surroundings import known, own_commit, versions
from flipscale.io.urls import without_secrets
from flipscale.objectives.build_objective import build_config, build_objective
from flipscale.process.preemption import STOP_FILE
from flipscale.recipe.recipe import Recipe, to_yaml
from flipscale.records.run_summary import RunSummary

_LAUNCHERS = ("torchrun", "accelerate", "torch.distributed.run", "accelerate.commands.launch")


def write_run_files(
    recipe: Recipe,
    engine: str,
    num_processes: int,
    state: Mapping[str, Any],
    data_samples: int,
    **facts: Any,
) -> int:
    """Write `recipe.yaml` and `environment.json`, append this start to `starts.jsonl`, and return the number of the
    model's parameters. The main process calls this. `state` is that of the checkpoint to resume from, empty for a fresh
    start; `facts` are further fields of the record."""
    run_dir = Path(recipe.output_dir)
    with torch.device("meta"):
        kind, config = build_objective(recipe).exported_model(build_config(recipe))
        num_parameters = kind(config).num_parameters()
    # Weights, moments and averages have four bytes a parameter.
    tensors = 1 + (2 if recipe.optim.name == "adamw" else 1) + (recipe.optim.ema_decay is not None)
    check_disk_space(run_dir, 4 * num_parameters * tensors, "train a smaller model")
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in ("report.html", "DONE"):  # of a run with added stages
        (run_dir / name).unlink(missing_ok=True)
    write_text(run_dir / "recipe.yaml", to_yaml(recipe, is_public=True))
    content = {**environment(), "num_parameters": num_parameters, "data_samples": data_samples}
    write_text(run_dir / "environment.json", json.dumps(content, indent=1) + "\n")
    start = {
        "time": time.time(),
        "last_sign_before": RunSummary(run_dir).heartbeat.get("time"),
        "step": state.get("step", 0),
        "trained_seconds": state.get("trained_seconds", 0.0),
        "engine": engine,
        "num_processes": num_processes,
        "device": device_name(),
        "host": platform.node(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        **facts,
    }
    json_lines.append(run_dir / "starts.jsonl", [start])
    return num_parameters


def device_name() -> str:
    """Return the name of a process's GPU, or of the CPU with the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = (known(Path("/proc/cpuinfo").read_bytes) or b"").decode(errors="replace").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {torch.get_num_threads()} thread(s)"


def environment() -> dict[str, Any]:
    """Return the versions of imported packages, the command and the machine, ready for JSON."""
    return {
        "flipscale": flipscale.__version__,
        "commit": own_commit(Path(__file__).resolve().parents[1]),
        "python": platform.python_version(),
        **versions(("torch", "transformers", "accelerate", "numpy", "simplejpeg", "cv2")),
        "command": typed_command(),
        "mixed_precision": launched_precision(os.environ),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }


def typed_command(precision: str | None = None) -> str | None:
    """Return the user's command line, or the launcher's, for this start's precision or another `precision`. None if it
    is unknown, or if a batch script started the run, because nobody types that command again."""
    if STOP_FILE in os.environ:
        return None
    words = without_secrets(sys.orig_argv)
    precision = precision or os.environ.get(PRECISION)
    variable = f"{PRECISION}={precision} " if precision else ""
    if "WORLD_SIZE" in os.environ or PRECISION in os.environ:
        # Unknown if the launcher has ended, or is another user's.
        content = known(Path(f"/proc/{os.getppid()}/cmdline").read_bytes) or b""
        launcher = [word.decode(errors="replace") for word in content.split(b"\0")[:-1]]
        if any(Path(word).name in _LAUNCHERS for word in launcher[:4]):
            words = without_secrets(launcher)
            launches = [word in ("launch", "accelerate.commands.launch") for word in words]
            if True in launches[:4]:  # accelerate sets the variable itself
                place, variable = launches.index(True) + 1, ""
                if precision != os.environ.get(PRECISION):
                    words[place:place] = ["--mixed_precision", str(precision)]
        elif "WORLD_SIZE" in os.environ:  # a single process may have the other variable from its user
            return None
    if len(words) < 2 or words[1] == "-c":
        return None
    if not os.access(words[1], os.X_OK):
        return variable + shlex.join(words)
    # A script: the kernel puts the interpreter before it. Its name is enough if the shell finds it by the name.
    path = shutil.which(Path(words[1]).name)
    is_found = path is not None and os.path.abspath(path) == os.path.abspath(words[1])
    return variable + shlex.join([Path(words[1]).name if is_found else words[1], *words[2:]])
