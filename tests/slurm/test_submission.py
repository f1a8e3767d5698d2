"""The scripts of slurm/ before a job waits in the queue: what they print, and what they refuse to submit.

No Slurm is here: a submission that passes the checks fails at sbatch.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONG = pytest.mark.long  # each check takes seconds for the imports
Submit = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def submit(tmp_path: Path, write_recipe: Callable[..., Path]) -> Submit:
    """Runs a script, without sbatch, in a checkout with `tiny.yaml`."""
    for name in ("slurm", "ds_configs", "flipscale"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_recipe(tmp_path / "tiny").rename(tmp_path / "tiny.yaml")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in (
        "bash",
        "sed",
        "date",
        "basename",
        "dirname",
        "sort",
        "uniq",
        "head",
        "tail",
        "mkdir",
        "mv",
        "cp",
        "rm",
    ):
        (programs / name).symlink_to(f"/usr/bin/{name}")
    (programs / "rmdir").symlink_to("/usr/bin/rmdir")

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess:
        own = {"PATH": str(programs), "PYTHON": sys.executable, "RECIPE": "tiny.yaml", "RUN": "runs/tiny"}
        environment = {**os.environ, **own, **variables}
        return subprocess.run(
            ["bash", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return run


@pytest.mark.parametrize("script", ["pretrain", "tune", "study", "evaluate", "prepare"])
def test_the_help_names_what_a_script_takes(submit: Submit, script: str) -> None:
    done = submit(f"slurm/{script}.sh", "--partition=gpu", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    text = (ROOT / f"slurm/{script}.sh").read_text()
    own = {"study": "RECIPES", "evaluate": "MODEL", "prepare": "SHARDS"}.get(script, "RECIPE")
    for name in ("TO" if script == "prepare" else "LAUNCH_FILE", "PYTHON", own):
        assert name in done.stdout
    assert f"bash slurm/{script}.sh" in text
    assert f"bash slurm/{script}.sh" in done.stdout
    assert "#SBATCH" not in done.stdout


@pytest.mark.parametrize(
    ("words", "variables", "named"),
    [
        (("slurm/pretrain.sh",), {"LAUNCH_FILE": "none.yaml"}, "none.yaml"),
        (("slurm/pretrain.sh",), {"REQUEUE": "yes"}, "REQUEUE"),
        (("slurm/prepare.sh",), {"WHAT": "shards"}, "shards"),
        (("slurm/prepare.sh",), {"WHAT": "audit", "TO": "audit"}, "SHARDS is empty"),
        (("slurm/prepare.sh",), {"SHARDS": "laion"}, "TO is empty"),
        (("slurm/pretrain.sh", "--", "--optim.weight_deca", "0.1"), {}, "--optim.weight_deca "),
        pytest.param(("slurm/pretrain.sh",), {}, "256 processes", marks=LONG),  # of the #SBATCH lines
        pytest.param(("slurm/pretrain.sh", "-N3", "--gpus-per-node", "h100:1"), {}, "3 processes", marks=LONG),
        pytest.param(("slurm/tune.sh", "--nodes", "2"), {}, "runs/tiny/model", marks=LONG),
        pytest.param(
            ("slurm/evaluate.sh",), {"MODEL": "runs/none/model", "ZERO_SHOT": "SHARDS"}, "runs/none/model", marks=LONG
        ),
        pytest.param(("slurm/evaluate.sh",), {"MODEL": "pixels", "ZERO_SHOT": "none"}, "none", marks=LONG),
    ],
)
def test_what_cannot_run_is_not_submitted(
    submit: Submit, tmp_path: Path, shards: Path, words: tuple[str, ...], variables: dict[str, str], named: str
) -> None:
    variables = {name: value.replace("SHARDS", str(shards)) for name, value in variables.items()}
    done = submit(*words, **{"FROM": "runs/tiny", **variables})
    assert (done.returncode, done.stdout) == (2, "")
    assert named in done.stderr
    assert not (tmp_path / "runs").exists()


@LONG
@pytest.mark.parametrize(
    ("words", "variables"),
    [
        (("slurm/pretrain.sh", "--nodes=2", "--gpus-per-node=4", "--", "--optim.weight_decay", "0.1"), {}),
        (("slurm/pretrain.sh", "--nodes=1-3"), {}),  # Slurm chooses
        (("slurm/tune.sh", "-N2", "--dependency=afterok:7"), {"FROM": "runs/none"}),
        (("slurm/pretrain.sh",), {"PYTHON": "/nowhere/python"}),  # it is in the container
    ],
)
def test_what_can_run_goes_to_sbatch(
    submit: Submit, tmp_path: Path, shards: Path, words: tuple[str, ...], variables: dict[str, str]
) -> None:
    """A failed submission leaves no folders, but those that were there."""
    (tmp_path / "runs").mkdir()
    done = submit(*words, **{name: value.replace("SHARDS", str(shards)) for name, value in variables.items()})
    assert (done.returncode, done.stdout) == (127, "")
    assert "sbatch" in done.stderr
    assert ("without a check" in done.stderr) == ("PYTHON" in variables)
    assert not any((tmp_path / "runs").iterdir())
