"""The scripts of slurm/ before a job waits in the queue: what they print, and what they refuse to submit.

`sbatch` is a script that prints the recipes of the job. `tests/slurm` has a real Slurm.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONG = pytest.mark.long  # each check takes seconds for the imports
Submit = Callable[..., subprocess.CompletedProcess]
SBATCH = 'printf \'<%s>\' "$RECIPE" "$RECIPES" "$*"\nexit ${SBATCH_ENDS:-0}'
# What Slurm gives to a job on nodes that differ, and its programs. A step runs once, here.
JOB = {
    **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_NUM_NODES": "3", "SLURM_NODEID": "0"},
    **{"SLURM_JOB_CPUS_PER_NODE": "96,64(x2)", "SLURM_CPUS_ON_NODE": "96", "SLURM_JOB_NAME": "one"},
    **{"SLURM_JOB_PARTITION": "gpu", "SLURM_JOB_QOS": "long", "SLURM_TMPDIR": ".", "PYTHON": "./python"},
}
PROGRAMS = {
    "srun": 'echo "$SRUN_CPUS_PER_TASK cores"; while [ "$1" != bash ]; do shift; done; exec "$@"',
    "scontrol": "echo a; echo b",
    "squeue": "echo RUNNING N/A",
    "sbatch": SBATCH,
}


def write_program(file: Path, text: str) -> None:
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)


def as_job(folder: Path, script: str) -> str:
    """Copy a script as Slurm does for a job."""
    return str(shutil.copy(ROOT / f"slurm/{script}.sh", folder / "slurm_script"))


@pytest.fixture
def submit(tmp_path: Path, write_recipe: Callable[..., Path]) -> Submit:
    """Runs a script in a checkout with `tiny.yaml`; no Python checks its recipes unless one is named."""
    for name in ("slurm", "ds_configs", "flipscale"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_recipe(tmp_path / "tiny")
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        write_program(tmp_path / "bin" / name, text)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess:
        own = {"PATH": path, "PYTHON": "no_python", "RECIPE": "tiny.yaml", "RUN": "runs/tiny", "FROM": "runs/tiny"}
        environment = {**os.environ, **own, **variables}
        return subprocess.run(
            ["bash", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return run


@pytest.mark.parametrize("script", ["pretrain", "tune", "study", "evaluate", "prepare"])
def test_the_help_names_what_a_script_takes(submit: Submit, script: str) -> None:
    done = submit(f"slurm/{script}.sh", "--partition=gpu", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    own = {"study": "RECIPES", "evaluate": "MODEL", "prepare": "SHARDS"}.get(script, "RECIPE")
    assert all(name in done.stdout for name in ("PYTHON", own, f"bash slurm/{script}.sh"))
    assert "#SBATCH" not in done.stdout


@pytest.mark.parametrize(
    ("words", "variables", "named"),
    [
        (("slurm/pretrain.sh",), {"LAUNCH_FILE": "none.yaml"}, "none.yaml"),
        (("slurm/pretrain.sh",), {"REQUEUE": "yes"}, "REQUEUE"),
        (("slurm/pretrain.sh", "--export=A=1"), {}, "--export"),
        (
            ("slurm/pretrain.sh", "-N3", "--gpus-per-node=", "--gres=gpu:h100:2,tmp:9"),
            {"PYTHON": "./echo"},
            "processes 6 ",
        ),
        (("slurm/prepare.sh",), {"WHAT": "shards"}, "shards"),
        (("slurm/prepare.sh",), {"WHAT": "audit", "TO": "audit"}, "SHARDS is empty"),
        (("slurm/prepare.sh",), {"SHARDS": "laion"}, "TO is empty"),
        (("slurm/study.sh",), {"RECIPES": "tiny.yaml bin/tiny.yaml"}, "two recipes are called tiny; rename one"),
        *(
            pytest.param(words, {"PYTHON": sys.executable, **variables}, named, marks=LONG)
            for words, variables, named in (
                (("slurm/pretrain.sh", "--", "--optim.weight_deca", "0.1"), {}, "weight_deca "),
                (("slurm/pretrain.sh",), {}, "256 processes"),  # of the #SBATCH lines
                (("slurm/pretrain.sh", "-N3", "--gpus-per-node", "h100:1"), {}, "3 processes"),
                (("slurm/tune.sh", "--nodes", "2"), {}, "runs/tiny/model"),
                (("slurm/evaluate.sh",), {"MODEL": "org/name", "ZERO_SHOT": "none"}, "none"),
            )
        ),
    ],
)
def test_what_cannot_run_is_not_submitted(
    submit: Submit, tmp_path: Path, words: tuple[str, ...], variables: dict[str, str], named: str
) -> None:
    (tmp_path / "bin/tiny.yaml").touch()
    write_program(tmp_path / "echo", 'echo "$@"; exit 2')
    done = submit(*words, **variables)
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
    ],
)
def test_a_failed_submission_leaves_no_folders(
    submit: Submit, tmp_path: Path, words: tuple[str, ...], variables: dict[str, str]
) -> None:
    """Except those that were there."""
    (tmp_path / "runs").mkdir()
    done = submit(*words, PYTHON=sys.executable, SBATCH_ENDS="1", **variables)
    assert (done.returncode, done.stdout[:1]) == (1, "<"), done.stderr
    assert "without a check" not in done.stderr
    assert not any((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("name", ["a b.yaml", "-d.yaml", "do$HOME'\"q.yaml", "x;y*.yaml"])
def test_a_recipe_may_have_any_name(submit: Submit, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("seed: 3\n")
    done = submit("slurm/pretrain.sh", RECIPE=name, RUN="runs/one")
    assert done.returncode == 0, done.stderr
    assert "without a check" in done.stderr
    copy = done.stdout.split(">")[0].removeprefix("<")
    assert (tmp_path / copy).read_text() == "seed: 3\n"
    assert copy.endswith(f"/{name}")


def test_a_study_of_several_recipes(submit: Submit, tmp_path: Path) -> None:
    (tmp_path / "y.yaml").write_text("seed: 3\n")
    done = submit("slurm/study.sh", RECIPE="", RECIPES="tiny.yaml\ny.yaml\n")
    assert done.returncode == 0, done.stderr
    copies = done.stdout.split("<")[2].rstrip(">").split()
    assert [Path(copy).name for copy in copies] == ["tiny.yaml", "y.yaml"]


def test_a_folder_may_end_with_a_slash(submit: Submit) -> None:
    done = submit("slurm/tune.sh", FROM="runs/tiny/", RUN="")
    assert done.stdout.startswith("<runs/tiny_tuned/slurm/"), done


@pytest.mark.parametrize(
    ("given", "array"), [((), "0-1"), (("--array=0-5%2",), "0-1%2"), (("-a", "%1"), "0-1%1"), (("--array=1",), None)]
)
def test_the_runs_decide_the_array(submit: Submit, given: tuple[str, ...], array: str | None) -> None:
    done = submit("slurm/study.sh", *given, RECIPES="tiny.yaml slurm/../ds_configs/ddp.yaml")
    if array is None:
        assert (done.returncode, done.stdout) == (2, "")
        assert "--array '1'" in done.stderr
    else:
        assert f"--array={array} slurm/study.sh" in done.stdout, done


def test_a_shell_of_another_job_submits(submit: Submit, tmp_path: Path) -> None:
    """As of `salloc`, begun in another folder."""
    write_program(tmp_path / "bin/sbatch", "env | grep ^SLURM_")
    done = submit("slurm/pretrain.sh", SLURM_CONF="a", SLURM_SUBMIT_DIR="/", SLURM_ARRAY_TASK_ID="3", **JOB)
    assert (done.returncode, done.stdout) == (0, "SLURM_CONF=a\n"), done


def test_a_recipe_that_extends_another_needs_no_package_here(submit: Submit, tmp_path: Path) -> None:
    done = submit("slurm/pretrain.sh", RECIPE="h14_laion2b", RUN="runs/one")
    assert (done.returncode, done.stdout.split(">")[0]) == (0, "<h14_laion2b"), done
    assert "h14_laion2b is not copied" in done.stderr
    assert not [*tmp_path.glob("runs/one/slurm/*/*")]


def test_a_job_without_its_recipe_ends_as_a_mistake(submit: Submit, tmp_path: Path) -> None:
    done = submit(as_job(tmp_path, "pretrain"), RECIPE="none", **JOB)
    assert (done.returncode, done.stdout) == (2, "")
    assert "'none'" in done.stderr.splitlines()[-1]


def test_a_step_asks_for_the_cores_of_the_smallest_node(submit: Submit, tmp_path: Path) -> None:
    write_program(tmp_path / "python", "exit 0")
    done = submit(as_job(tmp_path, "evaluate"), **JOB)
    assert (done.returncode, done.stdout) == (0, "64 cores\n"), done


def test_a_new_job_has_the_quality_of_service_of_the_first(submit: Submit, tmp_path: Path) -> None:
    write_program(tmp_path / "python", "exit 1")
    done = submit(as_job(tmp_path, "pretrain"), REQUEUE="sbatch", **JOB)
    assert "submitted again: <" in done.stderr, done
    assert " --qos=long " in done.stderr


def test_weights_are_made_again_if_they_are_gone_or_others_are_asked_for(submit: Submit, tmp_path: Path) -> None:
    write_program(tmp_path / "python", 'echo "$@" >> calls; mkdir -p weights')

    def calls(*flags: str) -> int:
        job = as_job(tmp_path, "prepare")
        done = submit(job, *flags, WHAT="weights", SHARDS="laion", TO="weights/", **JOB)
        assert done.returncode == 0, done
        return len((tmp_path / "calls").read_text().splitlines())

    assert [calls("--power", "1"), calls("--power", "1"), calls("--power", "0")] == [1, 1, 2]
    (tmp_path / "weights").rmdir()
    assert calls("--power", "0") == 3


LAUNCHER = """\
E1203 00:11:25.343000 1500 torch/distributed/elastic/api.py:1002] failed (exitcode: -9) local_rank: 0 (pid: 1561)
Traceback (most recent call last):
  File "launch.py", line 1450, in <module>
    main()
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
flipscale.pretrain FAILED
"""
BROKEN = 'Traceback (most recent call last):\n  File "a.py", line 1\n    1 / 0\nZeroDivisionError: by zero\n'
ERROR = "flipscale: error: no shards at 'a'\n"


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ({"a": LAUNCHER, "b": ERROR + LAUNCHER}, (ERROR.strip(), "b")),
        ({"a": BROKEN.replace("by zero", "of b"), "b": LAUNCHER + BROKEN}, ("ZeroDivisionError: of b", "a")),
        ({"a": "Signal 15\n", "b": BROKEN + LAUNCHER}, ("ZeroDivisionError: by zero", "b")),
        ({"a": "/usr/bin/python: No module named flipscale\n"}, ("/usr/bin/python: No module named flipscale", "a")),
        ({"a": "flipscale: error: SIGTERM: ended\n", "b": LAUNCHER}, (LAUNCHER.splitlines()[0], "b")),
        ({"a": f"{ERROR}--- job 7, start 0 on a\n{LAUNCHER}"}, (LAUNCHER.splitlines()[0], "a")),
        ({"a": "nothing\n"}, ("see the end of runs/tiny/slurm/7-a.log", "a")),
    ],
)
def test_a_failed_job_prints_its_error_and_the_file(
    submit: Submit, tmp_path: Path, logs: dict[str, str], expected: tuple[str, str]
) -> None:
    """Node c failed in an earlier start of the job, in another way."""
    (tmp_path / "runs/tiny/slurm").mkdir(parents=True)
    (tmp_path / "runs/tiny/slurm/7-c.log").write_text(f"--- job 7, start 3 on c\n{ERROR.replace('a', 'c')}")
    write_program(tmp_path / "bin/srun", "for log in [ab].log; do cp $log runs/tiny/slurm/7-$log; done; exit 1")
    for node, text in logs.items():
        (tmp_path / f"{node}.log").write_text(f"--- job 7, start 0 on {node}\n{text}")
    printed = submit(as_job(tmp_path, "pretrain"), **JOB, MAX_CRASHES="0").stderr
    words, node = expected
    assert printed.splitlines()[-1].endswith(f" restarted: {words}") or f" restarted: {words}; all" in printed, printed
    assert printed.endswith(f"runs/tiny/slurm/7-{node}.log\n")
    assert "output: runs/tiny/slurm/7-*.log" in printed
