"""The scripts of slurm/ on a real Slurm of four nodes, through everything that ends a job early."""

import fnmatch
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import metrics
from safetensors.torch import load_file
from slurm.cluster import PROGRAMS, Cluster, wait_until

from flipscale.cli import main
from flipscale.records.run_summary import RunSummary
from flipscale.studies.design import write_plan

ROOT = Path(__file__).parents[2]
MISSING = [program for program in PROGRAMS if shutil.which(program) is None]
pytestmark = [
    pytest.mark.skipif(
        bool(MISSING) or os.getuid() != 0,
        reason=f"needs root and Slurm (slurmctld slurmd slurm-client munge): {MISSING}",
    ),
    # The first test waits for most jobs.
    pytest.mark.timeout(3600),
]

# Resources of a test job, in place of the scripts' 32 nodes.
# The scripts ask for whole nodes; here jobs of one user share them.
SMALL = ["--gpus-per-node=1", "--cpus-per-task=1", "--exclusive=user", "--time=1:00:00"]
# node3 fails, and urgent jobs take node4.
USUAL = "--nodelist=node1"


# Imported first by every Python of a job: a run waits at the step of `Site.hold`.
HOLD = """
import os, sys, time

def is_held(run):
    hold = os.path.join(os.environ["HOLDS"], os.path.basename(run))
    try:
        with open(hold) as hold, open(f"{run}/metrics.jsonl") as lines:
            return len(list(lines)) >= int(hold.read())
    except FileNotFoundError:
        return False

def stand(event, arguments):
    if event == "open" and "a" in str(arguments[1]) and str(arguments[0]).endswith("/metrics.jsonl"):
        while is_held(os.path.dirname(arguments[0])):
            time.sleep(0.05)

sys.addaudithook(stand)
"""


class Site:
    """A checkout on the cluster, a tiny recipe in it, and the jobs."""

    def __init__(self, cluster: Cluster, folder: Path, recipe: dict, shards: Path):
        self.cluster, self.folder, self.shards = cluster, folder, shards
        self.environments: dict[str, dict[str, str]] = {}
        for name in ("slurm", "ds_configs", "flipscale"):
            (folder / name).symlink_to(ROOT / name)
        self.holds = folder / "holds"
        self.holds.mkdir()
        (self.holds / "sitecustomize.py").write_text(HOLD)
        stages = [
            {"name": "masked", "samples": 960, "mask_ratio": 0.75, "base_lr": 0.012, "warmup_samples": 64},
            {"name": "unmasked", "samples": 960, "base_lr": 0.006},
        ]
        tiny = {**recipe, "stages": stages, "save": {"every_samples": 320, "total_limit": 99}}
        (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny))
        self.variables = {
            "PYTHONPATH": f"{self.holds}:{ROOT}",
            "HOLDS": str(self.holds),
            "RECIPE": "tiny.yaml",
            "ACCELERATE_USE_CPU": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHON": sys.executable,
            # Not those of the tests' own process.
            "TRITON_CACHE_DIR": "",
            "TORCHINDUCTOR_CACHE_DIR": "",
        }

    def submit(self, *command: str, **variables: str) -> str:
        """Submit a job by `sbatch` or `bash`, and return its number."""
        numbers = {"bash": [], "sbatch": ["--parsable"]}[command[0]]
        command = (command[0], *numbers, *command[1:])
        return self.cluster.run(*command, cwd=self.folder, **{**self.variables, **variables}).strip().splitlines()[-1]

    def steps(self, run: str) -> int:
        """Return the number of recorded steps of a run, which may be writing the next one."""
        file = self.folder / run / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def wait_for_step(self, run: str, step: int) -> None:
        wait_until(lambda: self.steps(run) >= step, f"{run} to reach step {step}")

    def hold(self, run: str, step: int) -> None:
        """Let a run wait, as in a long step, once it has recorded `step`."""
        aside = self.holds / f"{Path(run).name}.aside"
        aside.write_text(str(step))
        aside.rename(aside.with_suffix(""))

    def stop(self, run: str, number: str, then_hold: int, ask: bool = True) -> None:
        """Tell a waiting job to stop, by Slurm's signal ahead of the time limit; its next start waits at `then_hold`.

        Args:
            ask: whether to send the signal here, or to wait for Slurm's.
        """
        told = "told to stop"
        before = self.output(number).count(told)
        if ask:
            # The signal of --signal=B:USR1@300, because Slurm looks at the time every half minute only.
            self.cluster.run("scancel", "--signal=USR1", "--batch", number)
        wait_until(lambda: self.output(number).count(told) > before, f"job {number} to be {told}")
        self.hold(run, then_hold)

    def newest(self, run: str) -> int:
        """Return the step of a run's newest checkpoint, or 0."""
        return max((int(p.name[5:]) for p in (self.folder / run).glob("checkpoints/step-*")), default=0)

    def rank(self, run: str, rank: int) -> int | None:
        """Return the process of a run's rank, and keep its environment."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes().split(b"\0")
                variables = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            words = {b"flipscale.pretrain", f"--output_dir={run}".encode()}
            if words <= set(command) and b"RANK=%d" % rank in variables:
                self.environments[run] = dict(v.decode().split("=", 1) for v in variables if b"=" in v)
                return int(process.name)
        return None

    def kill_one(self, command: list[str]) -> bool:
        """Kill a process whose command begins with these words, and return whether there was one."""
        for process in psutil.process_iter(["cmdline"]):
            if (process.info["cmdline"] or [])[: len(command)] == command:
                process.kill()
                return True
        return False

    def script(self, number: str) -> psutil.Process:
        """Return the shell of a job's script, a child of the daemon that passes on Slurm's signals."""
        path = f"{self.cluster.folder}/spool/*/job{int(number):05}/slurm_script"
        shells = (p for p in psutil.process_iter(["cmdline"]) if fnmatch.filter(p.info["cmdline"] or [], path))
        return min(shells, key=psutil.Process.create_time)

    def output(self, number: str) -> str:
        """Return the output of a job and its processes."""
        # os.walk passes over a checkpoint's folder that is renamed meanwhile; `**` of glob raises.
        folders = (Path(folder) for folder, *_ in os.walk(self.folder / "runs") if folder.endswith("/slurm"))
        files = [*self.folder.glob(f"*-{number}.out")]
        files += [file for folder in folders for file in folder.glob(f"{number}-*.log")]
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in files)

    def end(self, number: str, state: str) -> None:
        """Wait for a job's end, which must be `state`."""
        self.cluster.wait_for(number, "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
        assert self.cluster.job(number, "JobState") == state, self.output(number)


def chain(site: Site) -> dict[str, str]:
    """Pre-train without a break, tune and evaluate. The recipe's file changes between submission and start, and the
    first is submitted from a shell of another job."""
    (site.folder / "edited.yaml").write_text((site.folder / "tiny.yaml").read_text())
    arguments = ["slurm/pretrain.sh", "--hold", "--nodes=2", "--nodelist=node1,node2", *SMALL]
    shell = {"SLURM_JOB_ID": "999", "SLURM_SUBMIT_DIR": "/", "SLURM_RESTART_COUNT": "5"}
    first = site.submit("bash", *arguments, RECIPE="edited.yaml", RUN="runs/whole", **shell)
    (site.folder / "edited.yaml").write_text("seed: 7\n")
    stages = "[{name: unmasked, samples: 160, base_lr: 0.002}]"
    tune = ["slurm/tune.sh", f"--dependency=afterok:{first}", "--nodes=1", USUAL, *SMALL, "--", "--seed", "1"]
    then = site.submit("bash", *tune, FROM="runs/whole", RUN="runs/tuned", STAGES=stages)
    evaluate = ["slurm/evaluate.sh", f"--dependency=afterok:{then}", USUAL, *SMALL, "--", "--json"]
    last = site.submit("bash", *evaluate, MODEL="runs/tuned/model", ZERO_SHOT=str(site.shards))
    site.cluster.run("scontrol", "release", first)
    for number in (first, then, last):
        site.end(number, "COMPLETED")
    return {"pretrain": first, "tune": then, "evaluate": last}


def interrupted(site: Site) -> str:
    """Stop ahead of the time limit, lose a node, with the script's signal last, and end."""
    site.hold("runs/interrupted", 30)
    number = site.submit(
        "sbatch", *SMALL, "--nodes=2", "--nodelist=node2,node3", "slurm/pretrain.sh", RUN="runs/interrupted"
    )
    site.wait_for_step("runs/interrupted", 30)
    site.stop("runs/interrupted", number, then_hold=70)
    site.cluster.wait_for(number, "PENDING")
    assert 70 > site.newest("runs/interrupted") >= site.steps("runs/interrupted"), "it did not save what it had done"
    site.wait_for_step("runs/interrupted", 70)
    script = site.script(number)
    daemon = script.parent()
    daemon.suspend()
    site.cluster.run("scontrol", "update", "NodeName=node3", "State=DOWN", "Reason=test")
    wait_until(lambda: site.cluster.job(number, "JobState") != "RUNNING", "Slurm to end the job")
    (launcher,) = script.children()
    launcher.terminate()
    wait_until(lambda: script.status() == psutil.STATUS_ZOMBIE, "the script to end")
    daemon.resume()
    site.cluster.wait_for(number, "PENDING")
    site.hold("runs/interrupted", 1000)
    site.end(number, "COMPLETED")
    return number


def killed(site: Site) -> tuple[str, str]:
    """Kill a rank three times without a new checkpoint in between, and once in a job that is submitted after that."""
    site.hold("runs/killed", 7)
    variables = {"RUN": "runs/killed", "MAX_CRASHES": "2", "LAUNCHER": "torchrun"}
    flags = ["--save.every_samples", "0"]
    words = ["sbatch", "--nodes=2", "--nodelist=node1,node2", *SMALL, "slurm/pretrain.sh", *flags]
    number = site.submit(*words, **variables)
    for crash, step in enumerate((5, 6, 7), start=1):
        site.wait_for_step("runs/killed", step)
        os.kill(site.rank("runs/killed", 1), signal.SIGKILL)
        wait_until(lambda: f"crash {crash} since start" in site.output(number), f"crash {crash}")  # noqa: B023
        if crash < 3:
            (site.folder / "runs/killed/metrics.jsonl").unlink()
    site.end(number, "FAILED")
    (site.folder / "runs/killed/metrics.jsonl").unlink()
    again = site.submit(*words, **variables)
    site.wait_for_step("runs/killed", 5)
    os.kill(site.rank("runs/killed", 1), signal.SIGKILL)
    wait_until(lambda: "start again on the same nodes" in site.output(again), "a restart")
    site.cluster.run("scancel", again)
    site.end(again, "CANCELLED")
    return number, again


def cancelled(site: Site) -> tuple[str, str]:
    """Stop and submit a new job, where jobs may not requeue themselves; cancel it."""
    variables = {"RUN": "runs/cancelled", "REQUEUE": "sbatch"}
    site.hold("runs/cancelled", 5)
    first = site.submit("sbatch", "--nodes=1", USUAL, *SMALL, "slurm/pretrain.sh", **variables)
    site.wait_for_step("runs/cancelled", 5)
    site.stop("runs/cancelled", first, then_hold=30)
    site.end(first, "COMPLETED")
    second = (site.folder / f"pretrain-{first}.out").read_text().split("submitted again: ")[1].split()[0]
    site.wait_for_step("runs/cancelled", 30)
    site.cluster.run("scancel", second)
    site.end(second, "CANCELLED")
    return first, second


def unqueued(site: Site) -> str:
    """Be preempted, which Slurm requeues; then stop where a job may submit nothing."""
    nodes = ["--nodes=1", "--nodelist=node4"]
    site.hold("runs/unqueued", 5)
    number = site.submit("sbatch", *SMALL, *nodes, "slurm/pretrain.sh", RUN="runs/unqueued", REQUEUE="no")
    site.wait_for_step("runs/unqueued", 5)
    urgent = ["--partition=urgent", "--nodelist=node4", "--exclusive", "--output=/dev/null", "--wrap=true"]
    taker = site.submit("sbatch", *urgent)
    site.stop("runs/unqueued", number, then_hold=30, ask=False)
    site.cluster.wait_for(taker, "COMPLETED")
    site.wait_for_step("runs/unqueued", 30)
    site.stop("runs/unqueued", number, then_hold=1000)
    site.end(number, "FAILED")
    return number


def mistaken(site: Site) -> str:
    """Submit a recipe with a mistake."""
    arguments = ["slurm/pretrain.sh", "--data.global_batch_size", "many"]
    number = site.submit("sbatch", "--nodes=1", USUAL, *SMALL, *arguments, RUN="runs/mis%staken")
    site.end(number, "FAILED")
    return number


def study(site: Site) -> str:
    """Train three recipes as an array in a container, by a stand-in for apptainer that notes its arguments."""
    apptainer = site.folder / "bin/apptainer"
    apptainer.parent.mkdir()
    apptainer.write_text('#!/bin/bash\necho "$@" >> asked\nshift 7\nexec "$@"\n')
    apptainer.chmod(0o755)
    names = []
    for seed in range(3):
        short = {**yaml.safe_load((site.folder / "tiny.yaml").read_text()), "seed": seed}
        short["stages"] = [{"name": "masked", "samples": 160, "mask_ratio": 0.25 * seed, "base_lr": 0.01}]
        names.append(f"seed{seed}.yaml")
        (site.folder / names[-1]).write_text(yaml.safe_dump(short))
    arguments = ["slurm/study.sh", "--nodes=1", USUAL, *SMALL, "--", "--log.every_samples", "32"]
    variables = {"CONTAINER": "torch.sif", "PATH": f"{apptainer.parent}:{os.environ['PATH']}"}
    number = site.submit("bash", *arguments, RECIPES=" ".join(names), STUDY="runs/study", **variables)
    wait_until(
        lambda: site.cluster.run("squeue", "--noheader", f"--jobs={number}", check=False) == "", "the array to end"
    )
    return number


def planned(site: Site) -> list[str]:
    """Train a planned study with an arm without data and a killed arm; submit it again before and after the end."""
    short = yaml.safe_load((site.folder / "tiny.yaml").read_text())
    stages = [{"name": "masked", "samples": 160, "mask_ratio": 0.75, "base_lr": 0.01}]
    base = {**short, "stages": stages, "save": {"every_samples": 64}}
    (site.folder / "short.yaml").write_text(yaml.safe_dump(base))
    levels = {"gone": {"data.shards": str(site.folder / "gone")}, "long": {"stages.0.samples": 1600}}
    content = {"base": str(site.folder / "short.yaml"), "axes": {"change": levels}}
    (site.folder / "planned.yaml").write_text(yaml.safe_dump(content))
    write_plan(site.folder / "planned.yaml", site.folder / "runs/planned")
    runs = "runs/planned/runs"
    arguments = ["slurm/study.sh", "--nodes=1", "--nodelist=node1", *SMALL, "--array=0-5%2"]
    submit = partial(site.submit, "bash", *arguments, RECIPES="", STUDY="runs/planned")

    site.hold(f"{runs}/long-seed0", 10)
    first = submit()
    site.wait_for_step(f"{runs}/long-seed0", 10)
    wait_until((site.folder / runs / "base-seed0/DONE").exists, "the base to be done")
    site.cluster.wait_for(f"{first}_1", "FAILED")
    (site.folder / "gone").symlink_to(site.shards)
    second = submit()
    os.kill(site.rank(f"{runs}/long-seed0", 0), signal.SIGKILL)
    site.hold(f"{runs}/long-seed0", 1000)
    queue = ("squeue", "--noheader", f"--jobs={first},{second}")
    wait_until(lambda: site.cluster.run(*queue, check=False) == "", "the arrays to end")
    return [first, second, site.cluster.run("bash", *arguments, cwd=site.folder, STUDY="runs/planned", RECIPES="")]


# Flags of `flipscale prepare`, by verb.
PREPARED = {"resize": ["--short_side", "24"], "weights": ["--caption_counts", "--power", "0.5"]}


def prepared(site: Site) -> dict[str, str]:
    """Prepare data by arrays of two tasks, of which one process is killed."""
    numbers = {}
    for what, flags in PREPARED.items():
        variables = {"WHAT": what, "SHARDS": str(site.shards), "TO": f"runs/{what}"}
        arguments = ["slurm/prepare.sh", "--array=0-1", USUAL, *SMALL, "--", *flags, "--num_workers", "1"]
        numbers[what] = site.submit("bash", *arguments, **variables)
        own = [site.variables["PYTHON"], "-m", "flipscale.cli", "prepare", what]
        wait_until(lambda: site.kill_one(own), f"a process of {what}")  # noqa: B023
    queue = ("squeue", "--noheader", f"--jobs={','.join(numbers.values())}")
    wait_until(lambda: site.cluster.run(*queue, check=False) == "", "the arrays to end")
    return numbers


# What `flipscale bench gpu` does first on each node.
MEET = """
import os
from flipscale.checks.nodes import meet
nodes = meet(os.environ)
print(nodes.index, nodes.hosts, nodes.gather(nodes.index), flush=True)
# The first node keeps the store.
nodes.store.set("left", "") if nodes.index else nodes.store.wait(["left"])
"""


def met(site: Site) -> str:
    """Let the commands of two nodes meet under srun, in a job of which a step has both."""
    (site.folder / "meet.py").write_text(MEET)
    wrapped = f"--wrap=srun {sys.executable} meet.py"
    number = site.submit("sbatch", *SMALL, "--nodes=2", "--nodelist=node1,node2", "--output=meet.out", wrapped)
    site.end(number, "COMPLETED")
    return number


SCENARIOS = (interrupted, killed, chain, cancelled, unqueued, mistaken, study, planned, prepared, met)
LONG = pytest.mark.long


@pytest.fixture(scope="module")
def site(recipe: dict, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    cluster = Cluster(4)
    try:
        cluster.start()
        yield Site(cluster, tmp_path_factory.mktemp("site"), recipe, shards)
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def outcome(site: Site, request: pytest.FixtureRequest) -> Iterator[Callable]:
    """Returns the result of a scenario. The scenarios of all chosen tests run at once, because most of them wait."""
    named = {name for item in request.session.items if item.path == request.path for name in item.obj.__code__.co_names}
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        running: dict[Callable, Future] = {
            scenario: pool.submit(scenario, site) for scenario in SCENARIOS if scenario.__name__ in named
        }
        yield lambda scenario: running[scenario].result()


@LONG
def test_each_node_compiles_into_a_folder_of_its_own_disk(site: Site, outcome: Callable) -> None:
    outcome(killed)
    environment = site.environments["runs/killed"]
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        folder = Path(environment[name]).parent
        assert folder == Path(f"/tmp/flipscale-{os.getuid()}")
        assert folder.stat().st_mode & 0o777 == 0o700
    assert environment["ACCELERATE_CPU_AFFINITY"] == "1"


def test_both_ranks_join_and_the_recipe_is_the_submitted_one(site: Site, outcome: Callable) -> None:
    number = outcome(chain)["pretrain"]
    assert [start["num_processes"] for start in RunSummary(site.folder / "runs/whole").kept_starts] == [2]
    assert yaml.safe_load((site.folder / "runs/whole/recipe.yaml").read_text())["seed"] == 0
    assert sorted(p.name for p in (site.folder / "runs/whole/slurm").glob("*.log")) == [
        f"{number}-node1.log",
        f"{number}-node2.log",
    ]


def test_tuning_and_evaluation_follow_by_dependency(site: Site, outcome: Callable) -> None:
    numbers = outcome(chain)
    assert len(metrics(site.folder / "runs/tuned")) == 10
    tuned = yaml.safe_load((site.folder / "runs/tuned/recipe.yaml").read_text())
    assert (tuned["seed"], tuned["model"]["init_from"]) == (1, "runs/whole/model")
    lines = (site.folder / f"evaluate-{numbers['evaluate']}.out").read_text().splitlines()
    # Slurm merges two streams, in an order of its own.
    (printed,) = (json.loads(line) for line in lines if line.startswith("{"))
    assert printed["zero_shot/top1"] > 0


@LONG
def test_a_stop_and_a_dead_node_leave_the_numbers_as_they_are(site: Site, outcome: Callable) -> None:
    number = outcome(interrupted)
    outcome(chain)
    assert site.cluster.job(number, "Restarts") == "2"
    assert not (site.folder / "runs/interrupted/slurm/crashes").exists()
    assert f"left to Slurm: job {number} is " in site.output(number)
    runs = [site.folder / "runs" / name for name in ("interrupted", "whole")]
    losses, expected = ([record["loss"] for record in metrics(run)] for run in runs)
    assert len(losses) == 120
    assert losses == expected
    weights, expected_weights = (load_file(run / "model/model.safetensors") for run in runs)
    assert all(torch.equal(value, weights[name]) for name, value in expected_weights.items())


@LONG  # eight starts of the trainer
def test_crashes_are_restarted_up_to_a_cap(site: Site, outcome: Callable) -> None:
    number, again = outcome(killed)
    assert site.cluster.job(number, "Restarts") == "1"
    crashes = (site.folder / "runs/killed/slurm/crashes").read_text().splitlines()
    kept = [line.split(" exit ")[0] for line in crashes]
    starts = [(number, 0), (number, 0), (number, 1), (again, 0)]
    assert kept == [f"start of {job} job {job} start {start}" for job, start in starts]
    assert site.output(number).count("start again on the same nodes") == 1


@LONG
def test_a_cancelled_job_stays_cancelled(site: Site, outcome: Callable) -> None:
    first, second = outcome(cancelled)
    assert first != second
    assert site.cluster.job(second, "Restarts") == "0"
    assert not (site.folder / "runs/cancelled/DONE").exists()
    assert "told to end" in site.output(second)


@LONG
def test_preemption_then_a_stop_where_a_job_may_not_requeue(site: Site, outcome: Callable) -> None:
    number = outcome(unqueued)
    assert site.cluster.job(number, "Restarts") == "1"
    assert "preempted: Slurm requeues" in site.output(number)
    assert site.cluster.job(number, "ExitCode") == "75:0"
    assert "not done" in site.output(number)
    assert site.newest("runs/unqueued") > 0


def test_a_mistake_is_not_restarted(site: Site, outcome: Callable) -> None:
    number = outcome(mistaken)
    assert (site.cluster.job(number, "ExitCode"), site.cluster.job(number, "Restarts")) == ("2:0", "0")
    log = f"runs/mis%staken/slurm/{number}-node1.log"
    assert (site.folder / log).is_file(), "Slurm has patterns with %"
    last = (site.folder / f"pretrain-{number}.out").read_text().splitlines()[-1]
    assert all(words in last for words in ("not restarted: flipscale: error: ", "global_batch_size", log))


def test_a_recipe_that_is_not_there_is_never_submitted(site: Site) -> None:
    with pytest.raises(OSError, match=r"'none'.*flipscale/recipes"):
        site.submit("bash", "slurm/pretrain.sh", RECIPE="none", RUN="runs/none")


@LONG
def test_an_array_runs_a_recipe_a_task(site: Site, outcome: Callable) -> None:
    outcome(study)
    for seed in range(3):
        run = site.folder / f"runs/study/seed{seed}"
        assert (run / "DONE").exists()
        assert yaml.safe_load((run / "recipe.yaml").read_text())["seed"] == seed
        assert len(metrics(run)) == 5
    asked = (site.folder / "asked").read_text().splitlines()
    expected = f"exec --nv --bind {site.folder} --pwd {site.folder} torch.sif {sys.executable} -m accelerate"
    assert [line[: len(expected)] for line in asked] == [expected] * 3


@LONG
def test_a_planned_study_is_an_array_of_what_is_missing(site: Site, outcome: Callable) -> None:
    first, second, nothing = outcome(planned)
    runs = site.folder / "runs/planned/runs"
    assert all((runs / f"{name}-seed0" / "DONE").exists() for name in ("base", "long", "gone")), site.output(
        f"{first}_*"
    )
    # The arm without data stopped no other, the killed one went on, and the second array trained nothing twice.
    assert len(RunSummary(runs / "base-seed0").kept_starts) == 1
    assert len((runs / "long-seed0/starts.jsonl").read_text().splitlines()) == 2
    assert [record["step"] for record in metrics(runs / "long-seed0")] == list(range(1, 101))
    outputs = {number: len([*site.folder.glob(f"study-runs-planned-{number}_*.out")]) for number in (first, second)}
    assert outputs == {first: 3, second: 2}
    assert len(RunSummary(runs / "gone-seed0").kept_starts) == 1
    assert "all runs of runs/planned are done" in nothing


@LONG
def test_killed_tasks_of_an_array_prepare_the_same_bytes(site: Site, outcome: Callable) -> None:
    numbers = outcome(prepared)
    for what, flags in PREPARED.items():
        alone = site.folder / f"{what}_alone"
        main(["prepare", what, str(site.shards), str(alone), *flags, "--num_workers", "1"])
        contents = [
            {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".npy" or what == "weights"}
            for folder in (alone, site.folder / "runs" / what)
        ]
        assert contents[0] == contents[1], what
        outputs = [file.read_text() for file in site.folder.glob(f"prepare-{numbers[what]}_*.out")]
        assert len(outputs) == 2
        assert sum(output.count("crash 1 since start (exit code 137)") for output in outputs) == 1, outputs


@LONG
def test_nodes_of_a_bench_meet_under_srun(site: Site, outcome: Callable) -> None:
    outcome(met)
    lines = sorted((site.folder / "meet.out").read_text().splitlines())
    assert lines == [f"{index} ['node1', 'node2'] [0, 1]" for index in (0, 1)]
