"""What a launch writes into the run directory."""

import json
from pathlib import Path

from flipscale.model import FlipModel
from flipscale.training.recipe import parse_recipe
from flipscale.training.run_directory import write_run_files


def test_launches_are_remembered_where_steps_were_kept(write_recipe, tmp_path: Path) -> None:
    recipe = parse_recipe(["--config", str(write_recipe(tmp_path / "run"))])
    launches = [(0, 0.0, 8), (0, 0.0, 4), (16, 30.0, 2), (24, 45.0, 2), (16, 30.0, 1)]
    for step, seconds, num_processes in launches:
        write_run_files(recipe, num_processes, {"step": step, "trained_seconds": seconds}, 96)
    recorded = json.loads((tmp_path / "run/environment.json").read_text())
    kept = [(launch["step"], launch["trained_seconds"], launch["num_processes"]) for launch in recorded["launches"]]
    assert kept == [(0, 0.0, 4), (16, 30.0, 1)]
    assert all(launch["device"] for launch in recorded["launches"])
    assert recorded["num_processes"] == 1
    assert recorded["data_samples"] == 96
    assert recorded["num_parameters"] == FlipModel(recipe.model.config()).num_parameters()
