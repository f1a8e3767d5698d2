"""A release: the wheel in an environment with its declared requirements only, and the places that state the version."""

import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import yaml
from cli.pages import ROOT
from cli.test_launch_files import wheel  # noqa: F401 (a fixture)
from conftest import COLOURS, SHAPES, draw
from hub.test_export import environment_of
from packaging.requirements import Requirement
from PIL import Image

import flipscale

# A run of twelve steps, by the recipe of the package with narrower towers.
TRAINING = """--config small_cpu --model.vision_config.hidden_size 32 --model.vision_config.intermediate_size 64
--model.vision_config.num_hidden_layers 2 --model.vision_config.image_size 32 --data.global_batch_size 32
--data.num_workers 0 --stages.masked.samples 320 --stages.masked.warmup_samples 32
--stages.unmasked.samples 64 --eval.num_workers 0 --output_dir runs/mine"""
LOAD = """
import sys, flipscale
from flipscale.model import FlipModel, FlipProcessor
assert flipscale.__file__.startswith(sys.prefix), flipscale.__file__
model = FlipModel.from_pretrained("exported")
ids = FlipProcessor.from_pretrained("exported")(text=["a red disc"], return_tensors="pt")
print(model.get_text_features(ids["input_ids"]).pooler_output.isfinite().all().item())
"""


def requirements(extra: str = "") -> list[str]:
    """Return the declared requirements with those of their own extras, such as `fsspec[http]`."""
    names = []
    waiting = [("flipscale", extra)]
    while waiting:
        package, wanted = waiting.pop()
        for text in distribution(package).requires or ():
            required = Requirement(text)
            if required.marker is None or required.marker.evaluate({"extra": wanted}):
                names.append(required.name)
                waiting += [(required.name, inner) for inner in required.extras]
    return names


@pytest.mark.long
def test_the_wheel_trains_evaluates_and_exports(wheel: Path, tmp_path: Path) -> None:  # noqa: F811
    python = environment_of(tmp_path / "venv", *requirements())
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    work, rng = tmp_path / "work", np.random.default_rng(0)
    (work / "album").mkdir(parents=True)
    for number in range(80):
        colour, shape = list(COLOURS)[number % 4], SHAPES[number // 4 % 4]
        Image.fromarray(draw(colour, shape, rng)).save(work / f"album/{number}.jpg")
        (work / f"album/{number}.txt").write_text(f"a {colour} {shape}")
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

    def run(*words: str | Path) -> str:
        done = subprocess.run(words, cwd=work, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    program = python.parent / "flipscale"
    run(program, "prepare", "shards", "album", "data/mine", "--split", "0.2", "--num_workers", "1")
    run(program, "prepare", "tokenizer", "data/mine/train", "data/mine/tokenizer", "--vocab_size", "40")
    run(program, "pretrain", *TRAINING.split())
    results = run(program, "evaluate", "runs/mine", "--retrieval", "data/mine", "--num_workers", "0")
    assert "text to image R@1" in results
    run(program, "export", "runs/mine", "--out", "exported")
    assert run(python, "-I", "-c", LOAD) == "True\n"
    assert "flickr30k_200" in run(program, "prepare", "tasks", "--list")
    assert "h14_laion2b" in run(program, "recipes")
    run(program, "launch_files", ".")


def test_the_version_is_one_everywhere() -> None:
    version = flipscale.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    (newest, *_) = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest == version
    assert f"dist/flipscale-{version}-py3-none-any.whl" in (ROOT / "docs/running.md").read_text()
