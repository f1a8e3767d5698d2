"""Jobs of one process in the probes' tests; each writes its results to a file named by world and rank."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from flipscale.engines.build import start_accelerator
from flipscale.engines.watchdog import close_process_group
from flipscale.evaluation.kinds.probe import Rows, fit
from flipscale.evaluation.suite import build_tasks, evaluated
from flipscale.hub.loading import open_embedder


def fits(accelerator: Accelerator, folder: str, *penalties: str) -> dict[str, Any]:
    """Fit the rows r, r + w, ... of `FOLDER/data.npz` at each penalty, starting from the fit before."""
    data = np.load(Path(folder, "data.npz"))
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    rows = Rows(torch.from_numpy(data["features"][mine]), torch.from_numpy(data["labels"][mine]))
    results, start = {}, None
    for l2 in penalties:
        last = fit(rows, 10, float(l2), accelerator.reduce, start=start)
        start = last.classifier
        weights = [start.weight.tolist(), start.bias.tolist()]
        results[l2] = {"objective": last.objective, "converged": last.converged, "weights": weights}
    return results


def probes(accelerator: Accelerator, folder: str, model: str, train: str, test: str) -> dict[str, Any]:
    """Probe a model by both solvers and by few shots; search the penalty on two processes at most."""
    recipe = {"batch_size": 72, "epochs": 3, "warmup_epochs": 1, "base_lr": 1.0, "batch_norm": True}
    listed: list[dict[str, Any]] = [
        {"kind": "probe", "name": "fixed", "l2": 0.1},
        {"kind": "probe", "name": "lars", "solver": "lars", "lars": recipe},
        {"kind": "few_shot", "shots": [1, 3, 1000], "seeds": [0, 5]},
        *[{"kind": "probe", "name": "searched"}] * (accelerator.num_processes <= 2),
    ]
    tasks = build_tasks([{**task, "data": test, "train": train} for task in listed])
    return {
        task.name: [{"metric": r.metric, "value": r.value, "low": r.low, "high": r.high, **r.made_by} for r in results]
        for task, results in evaluated(open_embedder(model, accelerator, 16), tasks)
    }


def main(arguments: list[str]) -> None:
    """Run the job in the first argument; the second is the folder of its results."""
    name, folder, *others = arguments
    accelerator = start_accelerator([], ".")
    results = {"fits": fits, "probes": probes}[name](accelerator, folder, *others)
    Path(folder, f"{accelerator.num_processes}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(results))
    close_process_group()
