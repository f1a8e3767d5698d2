"""A release: the wheel, its launch files and Slurm scripts, and the places that state the version."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import yaml
from cli.pages import ROOT
from conftest import COLOURS, SHAPES, draw, launch
from hub.test_export import environment_of
from packaging.requirements import Requirement
from PIL import Image

import flipscale

FILES = sorted(file.relative_to(ROOT) for folder in ("ds_configs", "slurm") for file in (ROOT / folder).iterdir())
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, built from a copy so that the checkout stays as it is."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("flipscale", "ds_configs", "slurm"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    done = launch([*command, str(source), "--wheel-dir", str(built)])
    assert done.returncode == 0, done.stderr
    return next(built.iterdir())


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without a checkout, where the wheel is unpacked in site/ and its launch files are in work/."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    (folder / "work").mkdir()
    done = run_in(folder, sys.executable, "-m", "flipscale.cli", "launch_files", ".")
    assert done.stdout.splitlines() == [str(file) for file in FILES]
    return folder


def run_in(site: Path, *command: str) -> subprocess.CompletedProcess:
    done = launch([*command], site / "work", PYTHONPATH=str(site / "site"))
    assert done.returncode == 0, done.stderr
    return done


def test_the_wheel_holds_all_that_is_not_python(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    others = {file for file in (ROOT / "flipscale").rglob("*") if file.is_file() and not file.suffix.startswith(".py")}
    assert len(others) > 50
    assert {str(file.relative_to(ROOT)) for file in others} <= names
    assert {f"flipscale/engines/launch_files/{file}" for file in FILES} <= names
    lines = {f"Version: {flipscale.__version__}", "License: Apache-2.0", "License-File: LICENSE"}
    assert lines <= set(metadata.splitlines())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"flipscale"}, "tests are not installed"


@pytest.mark.long
def test_launch_files_are_the_checkout_s_and_plan(site: Path) -> None:
    written = {file.relative_to(site / "work") for file in (site / "work").rglob("*") if file.is_file()}
    assert written == set(FILES)
    for file in FILES:
        assert (site / "work" / file).read_bytes() == (ROOT / file).read_bytes()
    files = [str(file) for file in FILES if file.suffix == ".yaml"]
    recipe = "-m flipscale.pretrain --config small_cpu --optim.name adamw --dry_run --launch_file"
    printed = run_in(site, sys.executable, *recipe.split(), *files).stdout
    names = re.search(r"\n\n +(.*)\nprocesses ", printed)
    assert names is not None
    assert names[1].split() == [Path(file).stem for file in files]


def test_slurm_scripts_find_the_package_s_recipes(site: Path) -> None:
    names = "small_cpu b16_laion400m"
    script = f"LAUNCH_FILE=ds_configs/ddp.yaml; source slurm/run.bash; for name in {names}; do freeze runs $name; done"
    done = run_in(site, "bash", "-c", f"PYTHON={sys.executable}; {script}")
    small, extended = (site / "work" / file for file in done.stdout.split())
    assert small.read_text() == (ROOT / "flipscale/recipes/small_cpu.yaml").read_text()
    assert yaml.safe_load(extended.read_text())["data"]["tokenizer"] == "bert"


def requirements() -> list[str]:
    """Return the declared requirements with those of their own extras, such as `fsspec[http]`."""
    names, waiting = [], [("flipscale", "")]
    while waiting:
        package, wanted = waiting.pop()
        for text in distribution(package).requires or ():
            required = Requirement(text)
            if required.marker is None or required.marker.evaluate({"extra": wanted}):
                names.append(required.name)
                waiting += [(required.name, inner) for inner in required.extras]
    return names


@pytest.mark.long
def test_the_wheel_trains_evaluates_and_exports(wheel: Path, tmp_path: Path) -> None:
    """In an environment with its declared requirements only."""
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


def test_the_version_is_one_everywhere() -> None:
    version = flipscale.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    (newest, *_) = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest == version
    assert f"dist/flipscale-{version}-py3-none-any.whl" in (ROOT / "docs/running.md").read_text()
