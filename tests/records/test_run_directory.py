"""What a start writes into the run directory."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from flipscale.model import FlipModel
from flipscale.planning.flops import pair_flops
from flipscale.pretrain import count_flops
from flipscale.records.run_directory import write_run_files
from flipscale.records.run_summary import RunSummary
from flipscale.start.complete_recipe import parse_recipe
from flipscale.start.run_files import open_run_directory


def test_starts_are_remembered_where_steps_were_kept(write_recipe, tmp_path: Path) -> None:
    recipe = parse_recipe(["--config", str(write_recipe(tmp_path / "run"))])
    starts = [(0, 0.0, 8), (0, 0.0, 4), (16, 30.0, 2), (24, 45.0, 2), (16, 30.0, 1)]
    for step, seconds, num_processes in starts:
        write_run_files(recipe, "fsdp2", num_processes, {"step": step, "trained_seconds": seconds}, 96)
    assert len((tmp_path / "run/starts.jsonl").read_text().splitlines()) == 5
    kept = RunSummary(tmp_path / "run").kept_starts
    assert [(s["step"], s["trained_seconds"], s["num_processes"]) for s in kept] == [(0, 0.0, 4), (16, 30.0, 1)]
    assert all(start["device"] and start["engine"] == "fsdp2" for start in kept)
    recorded = json.loads((tmp_path / "run/environment.json").read_text())
    assert recorded["data_samples"] == 96
    assert recorded["num_parameters"] == FlipModel(recipe.model.config()).num_parameters()


def test_a_restart_counts_no_operations_again(write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    recipe = parse_recipe(["--config", str(write_recipe(run_dir))])
    counted = count_flops(recipe)
    assert counted == {"pair": pair_flops(recipe)}
    monkeypatch.setattr("flipscale.planning.flops.pair_flops", lambda recipe: {"counted": "again"})
    again = {"pair": {"counted": "again"}}
    assert count_flops(recipe) == again
    write_run_files(recipe, "ddp", 1, {}, 96, flops=counted)
    assert count_flops(recipe) == counted
    assert count_flops(replace(recipe, stages=[*recipe.stages, replace(recipe.stages[0], name="more")])) == again
    write_run_files(recipe, "ddp", 1, {}, 96, flops={"pair": 5})  # a damaged record
    assert count_flops(recipe) == again


def test_a_run_of_version_0_1_goes_on_in_the_order_of_one_lane(write_recipe, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    file = str(write_recipe(run_dir))
    recipe = parse_recipe(["--config", file])
    write_run_files(recipe, "ddp", 1, {}, 96)
    saved = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    assert saved["data"].pop("lanes") == 16
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ValueError, match=r"another recipe \(data.lanes: 1, now 16\)"):
        open_run_directory(recipe)
    assert open_run_directory(parse_recipe(["--config", file, "--data.lanes", "1"])) is None
