"""The launch files and Slurm scripts of an installed package, from a wheel that is built here."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import launch

import flipscale
from flipscale.launch_files import FOLDERS

ROOT = Path(flipscale.__file__).parents[1]
FILES = sorted(file.relative_to(ROOT) for folder in FOLDERS for file in (ROOT / folder).iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, built from a copy so that the checkout stays as it is."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("flipscale", *FOLDERS):
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
    done = launch([sys.executable, "-m", "flipscale.cli", "launch_files", "."], folder / "work", **path_of(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(file) for file in FILES]
    return folder


def path_of(site: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(site / "site")}


def test_the_wheel_holds_all_that_is_not_python(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    others = {file for file in (ROOT / "flipscale").rglob("*") if file.is_file() and not file.suffix.startswith(".py")}
    assert len(others) > 50
    assert {*(str(file.relative_to(ROOT)) for file in others), *(f"flipscale/{file}" for file in FILES)} <= names
    assert f"\nVersion: {flipscale.__version__}\n" in metadata
    assert {"License: Apache-2.0", "License-File: LICENSE"} <= set(metadata.splitlines())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"flipscale"}, "tests are not installed"


def test_files_are_the_checkout_s(site: Path) -> None:
    written = {file.relative_to(site / "work") for file in (site / "work").rglob("*") if file.is_file()}
    assert written == set(FILES)
    for file in FILES:
        assert (site / "work" / file).read_bytes() == (ROOT / file).read_bytes()


def test_every_launch_file_can_be_planned_with(site: Path) -> None:
    files = [str(file) for file in FILES if file.suffix == ".yaml"]
    recipe = "-m flipscale.pretrain --config small_cpu --optim.name adamw --dry_run"
    command = [sys.executable, *recipe.split()]
    done = launch([*command, "--launch_file", *files], site / "work", **path_of(site))
    assert done.returncode == 0, done.stderr
    names = re.search(r"\n\n +(.*)\nprocesses ", done.stdout)
    assert names is not None
    assert names[1].split() == [Path(file).stem for file in files]


def test_slurm_scripts_find_the_package_s_recipes(site: Path) -> None:
    names = "small_cpu b16_laion400m"
    script = f"LAUNCH_FILE=ds_configs/ddp.yaml; source slurm/run.bash; for name in {names}; do freeze runs $name; done"
    done = launch(["bash", "-c", f"PYTHON={sys.executable}; {script}"], site / "work", **path_of(site))
    assert done.returncode == 0, done.stderr
    small, extended = (site / "work" / file for file in done.stdout.split())
    assert small.read_text() == (ROOT / "flipscale/recipes/small_cpu.yaml").read_text()
    assert yaml.safe_load(extended.read_text())["data"]["tokenizer"] == "bert"


SBATCH = """#!/bin/bash
printf '<%s>' "$RECIPE" "$RECIPES"
"""


def submit(folder: Path, script: str, **environment: str) -> subprocess.CompletedProcess:
    """Submit a script where `sbatch` prints the recipes that the job would get, and no Python checks them."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin/sbatch").write_text(SBATCH)
    (folder / "bin/sbatch").chmod(0o755)
    for name in ("slurm", "ds_configs"):
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    recipes = {"RECIPE": "", "RECIPES": ""}
    return launch(["bash", f"slurm/{script}.sh"], folder, PATH=path, PYTHON="no_python", **{**recipes, **environment})


@pytest.mark.parametrize("name", ["a b.yaml", "-d.yaml", "do$HOME'\"q.yaml", "x;y*.yaml"])
def test_a_recipe_may_have_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("seed: 3\n")
    done = submit(tmp_path, "pretrain", RECIPE=name, RUN="runs/one")
    assert done.returncode == 0, done.stderr
    copy = done.stdout.split(">")[0].removeprefix("<")
    assert (tmp_path / copy).read_text() == "seed: 3\n"
    assert copy.endswith(f"/{name}")


def test_a_study_of_several_recipes(tmp_path: Path) -> None:
    for name in ("a/x.yaml", "b/x.yaml", "x.yaml", "y.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("seed: 3\n")
    done = submit(tmp_path, "study", RECIPES="x.yaml\ny.yaml\n")
    assert done.returncode == 0, done.stderr
    assert [Path(copy).name for copy in done.stdout.split("<")[2].rstrip(">").split()] == ["x.yaml", "y.yaml"]
    done = submit(tmp_path, "study", RECIPES="a/x.yaml b/x.yaml")
    assert done.returncode == 2
    assert "two recipes are called x; rename one of them" in done.stderr
