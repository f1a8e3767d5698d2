"""The command `python -m simulated.world`."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from simulated.world import World, main
from simulated.worlds import LAUNCH_FILES

from flipscale.engines.launch import read_launch_file
from flipscale.training.recipe import parse_recipe
from flipscale.training.schedule import plan_stages


@pytest.fixture
def recipe_file(recipe: dict, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def test_one_line_of_json(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch_file = str(LAUNCH_FILES / "fsdp2.yaml")
    arguments = ["--recipe", str(recipe_file), "--launch_file", launch_file, "--num_processes", "4", "--rank", "3"]
    main([*arguments, "--stage", "unmasked", "--json"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    figures = json.loads(printed)
    assert figures["aten_ops"] > figures["loss_aten_ops"] > 0
    assert figures["collectives"]["reduce_scatter"] == 12
    assert figures["bytes_sent"] == figures["bytes_received"] > 0
    (place,) = figures["host_syncs"]
    assert "engines/device.py" in place
    assert figures["peak_memory_bytes"] > 0
    assert not dist.is_initialized()
    assert not torch.cuda.is_available()


@pytest.mark.parametrize(
    ("engine", "processes", "message"), [("fsdp2", 3, "global_batch_size 16 .* 3"), ("zero1", 4, "engine is zero1")]
)
def test_impossible_world(engine: str, processes: int, message: str, recipe_file: Path) -> None:
    recipe = parse_recipe(["--config", str(recipe_file)])
    launch = read_launch_file(LAUNCH_FILES / f"{engine}.yaml", processes)
    with pytest.raises(ValueError, match=message):
        World(recipe, launch, plan_stages(recipe.stages, 16)[0])
