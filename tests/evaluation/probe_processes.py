"""What a process of the probes' tests does; each writes what it found to a file of its rank."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from flipscale.engines.failures import close_process_group
from flipscale.engines.start import start_accelerator
from flipscale.evaluation.probe.logistic import fit
from flipscale.evaluation.probe.rows import Rows, total_of
from flipscale.evaluation.results import Result
from flipscale.evaluation.suite import build_tasks, evaluated
from flipscale.hub.loading import open_embedder


def fits(accelerator: Accelerator, folder: str, *penalties: str) -> dict[str, Any]:
    """Fits the rows r, r + w, ... of `FOLDER/data.npz` at each penalty, from the one before."""
    data = np.load(Path(folder, "data.npz"))
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    rows = Rows(torch.from_numpy(data["features"][mine]), torch.from_numpy(data["labels"][mine]))
    assert len(rows) <= len(data["labels"]) // accelerator.num_processes + 1
    found, start = {}, None
    for l2 in penalties:
        last = fit(rows, 10, float(l2), total_of(accelerator), start=start)
        start = last.classifier
        weights = [last.classifier.weight.tolist(), last.classifier.bias.tolist()]
        found[l2] = {"objective": last.objective, "converged": last.converged, "weights": weights}
    return found


def probes(accelerator: Accelerator, folder: str, model: str, train: str, test: str) -> dict[str, Any]:
    """Probes a model by both solvers, and a few shots; the search over the penalty on two processes at most."""
    recipe = {"batch_size": 72, "epochs": 3, "warmup_epochs": 1, "base_lr": 1.0, "batch_norm": True}
    listed: list[dict[str, Any]] = [
        {"kind": "probe", "name": "fixed", "l2": 0.1},
        {"kind": "probe", "name": "lars", "solver": "lars", "lars": recipe},
        {"kind": "few_shot", "shots": [1, 3, 1000], "seeds": [0, 5]},
        *[{"kind": "probe", "name": "searched"}] * (accelerator.num_processes <= 2),
    ]
    tasks = build_tasks([{**task, "data": test, "train": train} for task in listed])
    embedder = open_embedder(model, accelerator, 16)
    return {task.name: [_written(result) for result in results] for task, results in evaluated(embedder, tasks)}


def _written(result: Result) -> dict[str, Any]:
    return {"metric": result.metric, "value": result.value, "low": result.low, "high": result.high, **result.made_by}


JOBS: dict[str, Callable[..., dict[str, Any]]] = {"fits": fits, "probes": probes}


def main(arguments: list[str]) -> None:
    """Does the job that the first argument names; the second is the folder that it writes to."""
    name, folder, *others = arguments
    accelerator = start_accelerator([], ".")
    found = JOBS[name](accelerator, folder, *others)
    Path(folder, f"{accelerator.num_processes}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))
    close_process_group()
