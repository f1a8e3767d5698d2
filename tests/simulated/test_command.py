"""`flipscale bench world`, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from simulated.worlds import LAUNCH_FILES

from flipscale.cli import main


def world(*arguments: object) -> None:
    main(["bench", "world", *map(str, arguments)])


@pytest.fixture
def recipe_file(recipe: dict, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**recipe, "model": {**recipe["model"], "compile": True}}))
    return file


def test_one_line_of_json(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--recipe", recipe_file, "--launch_file", LAUNCH_FILES / "fsdp2.yaml", "--num_processes", 4]
    world(*arguments, "--rank", 3, "--json")
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    found = json.loads(printed)
    assert found["aten_ops"] > found["loss_aten_ops"] > 0
    assert found["collectives"]["reduce_scatter"] == 12
    assert found["bytes_sent"] == found["bytes_received"] > 0
    assert len(found["host_syncs"]) == 1
    kinds = {"weights", "gradients", "moments", "activations", "loss", "batch", "buffers", "total"}
    assert set(found["peak_memory_bytes"]) == kinds
    # A tower's blocks are one graph.
    assert found["graphs"] == 2
    # All is as before.
    assert not dist.is_initialized()
    assert not torch.cuda.is_available()

    world(*arguments, "--stage", "unmasked")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("aten_ops ")
    assert any(line.startswith("host_syncs 1. ") and "engines/device.py" in line for line in lines)


@pytest.mark.parametrize(
    ("engine", "flags", "message"),
    [
        ("fsdp2", ["--num_processes", 3], "global_batch_size 16 is not divisible by 3 processes"),
        ("fsdp2", ["--num_processes", 1], "num_processes is 1; a world to simulate has 2 or more"),
        ("ddp", ["--num_processes", 4, "--rank", 4], "rank is 4; it must be from 0 to 3, for 4 processes"),
        ("ddp", ["--num_processes", 4, "--stage", "x"], "stage is 'x'; the recipe's are 'masked', 'unmasked'"),
        ("hsdp", ["--num_processes", 12], "the launch file's parallelism_config_dp_replicate_size 1 times"),
        ("zero1", ["--num_processes", 4], "the launch file's engine is zero1; DeepSpeed reads numbers back"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(
    engine: str, flags: list, message: str, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        world("--recipe", recipe_file, "--launch_file", LAUNCH_FILES / f"{engine}.yaml", *flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"flipscale: error: {message}")


def test_an_unknown_recipe_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        world("--recipe", "h15", "--launch_file", LAUNCH_FILES / "ddp.yaml")
    assert capsys.readouterr().err.startswith("flipscale: error: recipe 'h15' is neither a file nor one of")
