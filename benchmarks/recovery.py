"""Measure the seconds from a fault to the first new step of a run, and what they are spent on.

    python benchmarks/recovery.py --config runs/demo/recipe.yaml --faults killed hang disk --repeat 3
    python benchmarks/recovery.py --config tiny.yaml --faults slurm_killed node preemption --repeat 3
    python benchmarks/recovery.py --config tiny.yaml --faults killed --checkouts BEFORE AFTER

Two processes train on CPUs. The first three faults run under torchrun, which is started again as soon as it ends. The
others submit slurm/pretrain.sh to a Slurm of two nodes; `node` needs its administrator. `disk` mounts a small file
system, as root. `open_clip` kills a process of open_clip's trainer, with `--resume latest`, on the same shards.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

STEPS_BEFORE, STEPS_A_SAVE, HANG_SECONDS = 30, 20, 20.0
# A model of two small towers, and epochs of fifty steps of 16 pairs.
OPEN_CLIP_MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
EPOCH_SAMPLES = 800
OPEN_CLIP_MAIN = """
import sys, open_clip, torch

class OnCpus(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, module, device_ids=None, **options):
        super().__init__(module, **options)

torch.nn.parallel.DistributedDataParallel = OnCpus  # open_clip names a device, which torch refuses for CPUs
open_clip.add_model_config({folder!r})
from open_clip_train.main import main
main([*sys.argv[1:], "--logs", {logs!r}])  # torchrun takes --logs for its own
"""
Seconds = dict[str, float]


class Run:
    """A run that a fault ends and something starts again.

    Args:
        folder: run directory.
        checkout: folder of the package to run.
    """

    def __init__(self, folder: Path, checkout: Path, config: Path):
        self.folder, self.checkout = folder, checkout
        recipe = yaml.safe_load(config.read_text(encoding="utf-8"))
        self.batch = recipe["data"]["global_batch_size"]
        changes = {"log.every_samples": self.batch, "log.hang_seconds": HANG_SECONDS}
        changes |= {"save.every_samples": STEPS_A_SAVE * self.batch, "stages.0.samples": 10**6 * self.batch}
        changes["data.num_workers"] = 1
        self.arguments = ["--config", str(config), f"--output_dir={folder}"]
        self.arguments += [word for name, value in changes.items() for word in (f"--{name}", str(value))]
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(checkout),
            "ACCELERATE_USE_CPU": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.launcher: subprocess.Popen[bytes] | None = None
        self.launches = 0

    def launch(self) -> None:
        """Start torchrun with two processes."""
        self.launches += 1
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
        with open(self.folder.with_suffix(f".{self.launches}.log"), "wb") as log:
            command += ["-m", "flipscale.pretrain", *self.arguments]
            self.launcher = subprocess.Popen(
                command, env=self.environment, cwd=self.folder.parent, stdout=log, stderr=log
            )

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the processes of the run by rank."""
        found = {}
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "flipscale.pretrain" in words and f"--output_dir={self.folder}" in words:
                try:
                    found.setdefault(int(process.environ()["RANK"]), process)
                except (psutil.Error, KeyError):
                    continue
        return found

    def records(self, name: str) -> list[dict[str, Any]]:
        """Return the records of a file of the run."""
        try:
            lines = (self.folder / name).read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines]
        except (OSError, ValueError):  # it is being written
            return []

    def steps(self) -> int:
        """Return the newest step of the run's records."""
        return max((record["step"] for record in self.records("metrics.jsonl")), default=0)


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def recover(run: Run, fault: Callable[[dict[int, psutil.Process]], object], again: Callable[[], None]) -> Seconds:
    """Return the seconds of each part of a recovery, their sum `all`, and a new process's seconds on its `cpu`.

    `redone` is the number of steps since the checkpoint.

    Args:
        fault: function that makes the fault for the processes by rank.
        again: function that is called whenever no process of the run is left, to start it again if nothing else does.
    """
    old = run.ranks()
    starts, reached = len(run.records("starts.jsonl")), run.steps()
    began = time.time()
    fault(old)
    wait_for(lambda: not any(map(is_alive, old.values())))
    ended = time.time()
    again()
    wait_for(lambda: len(run.records("starts.jsonl")) > starts)
    start, new = run.records("starts.jsonl")[-1], run.ranks()
    first = min(process.create_time() for process in new.values())
    wait_for(lambda: any(beat["time"] > start["time"] for beat in run.records("heartbeat.json")))
    batch = run.records("heartbeat.json")[-1]["time"]
    metrics = run.folder / "metrics.jsonl"
    wait_for(lambda: metrics.stat().st_mtime > batch and run.steps() > start["step"])
    step = time.time()
    cpu = max(sum(process.cpu_times()[:2]) for process in new.values())
    parts = {"ending": ended - began, "waiting": first - ended, **(start.get("seconds") or {})}
    parts["other"] = start["time"] - began - sum(parts.values())
    parts |= {"batch": batch - start["time"], "step": step - batch}
    return {**parts, "all": step - began, "cpu": cpu, "redone": reached - start["step"]}


def killed_open_clip(folder: Path, shards: str) -> Seconds:
    """Kill a process of open_clip's trainer, start it again with `--resume latest`, and count to its first step."""
    (folder / "models").mkdir(parents=True)
    (folder / "models/tiny.json").write_text(json.dumps(OPEN_CLIP_MODEL), encoding="utf-8")
    (folder / "main.py").write_text(
        OPEN_CLIP_MAIN.format(folder=str(folder / "models"), logs=str(folder)), encoding="utf-8"
    )
    flags = {
        "train-data": shards, "dataset-type": "webdataset", "train-num-samples": EPOCH_SAMPLES, "batch-size": 8,
        "workers": 1, "epochs": 1000, "model": "tiny", "device": "cpu", "dist-backend": "gloo", "precision": "fp32",
        "name": "run", "resume": "latest", "log-every-n-steps": 1, "warmup": 10,
    }  # fmt: skip
    words = ["--dataset-resampled", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    log = folder / "run/out.log"

    def steps() -> list[str]:
        return [line for line in log.read_text("utf-8").splitlines() if "Train Epoch" in line] if log.exists() else []

    def launch() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
        with open(folder / "output", "ab") as output:
            command += [str(folder / "main.py"), *words]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, env=environment, stdout=output, stderr=output)

    launcher = launch()
    wait_for(lambda: len(steps()) >= 1.5 * EPOCH_SAMPLES / 16)
    ranks = {int(process.environ()["RANK"]): process for process in psutil.Process(launcher.pid).children()}
    began, num_steps = time.time(), len(steps())
    ranks[1].kill()
    launcher.wait()
    ended = time.time()
    launcher = launch()
    wait_for(lambda: len(steps()) > num_steps)
    seconds = time.time() - began
    for process in [*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)]:
        process.kill()
    launcher.wait()
    return {"ending": ended - began, "all": seconds, "redone": num_steps % (EPOCH_SAMPLES // 16)}


def under_torchrun(run: Run, name: str) -> Seconds:
    """Measure a fault of a run under torchrun."""
    mount = run.folder if name == "disk" else None
    if mount:
        mount.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(mount)], check=True)
    try:
        run.launch()
        wait_for(lambda: run.steps() >= STEPS_BEFORE)

        def fault(ranks: dict[int, psutil.Process]) -> None:
            if mount:
                with open(mount / "filler", "wb") as file:
                    file.write(b"0" * (shutil.disk_usage(mount).free - 4096))
            elif name == "hang":  # the loader waits for a file system that does not answer
                for worker in ranks[1].children():
                    worker.suspend()
            else:
                ranks[1].kill()

        def again() -> None:
            assert run.launcher
            run.launcher.wait()
            if mount:
                (mount / "filler").unlink()
            run.launch()

        return recover(run, fault, again)
    finally:
        end(run)
        if mount:
            subprocess.run(["umount", str(mount)], check=True)


def under_slurm(run: Run, name: str) -> Seconds:
    """Measure a fault of a job of slurm/pretrain.sh on two nodes, with a process on each."""
    options = [
        "--parsable",
        "--nodes=2",
        "--gpus-per-node=1",
        "--cpus-per-task=2",
        "--time=1:00:00",
        f"--output={run.folder}.out",
    ]
    recipe, *flags = run.arguments[1:2] + run.arguments[3:]
    workers = flags.index("--data.num_workers")
    del flags[workers : workers + 2]  # the script chooses them
    variables = {"RECIPE": recipe, "RUN": str(run.folder), "PYTHON": sys.executable}
    variables |= {"PYTHONPATH": str(run.checkout), "HOME": os.environ.get("HOME", "/")}
    script = run.checkout / "slurm/pretrain.sh"
    job = _output(["sbatch", *options, str(script), *flags], cwd=run.checkout, **{**run.environment, **variables})
    try:
        wait_for(lambda: run.steps() >= STEPS_BEFORE)

        def fault(ranks: dict[int, psutil.Process]) -> None:
            if name == "slurm_killed":
                ranks[1].kill()
            elif name == "node":
                node = _output(["squeue", "--noheader", f"--jobs={job}", "--format=%N"])
                last = _output(["scontrol", "show", "hostnames", node]).split()[-1]
                _output(["scontrol", "update", f"NodeName={last}", "State=DOWN", "Reason=recovery"])
            else:
                taker = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
                _output(["sbatch", *taker], cwd=run.checkout)

        return recover(run, fault, lambda: None)
    finally:
        subprocess.run(["scancel", "--full", job], check=False)
        wait_for(lambda: not run.ranks())


def end(run: Run) -> None:
    """End the processes of a run and its launcher."""
    for process in [psutil.Process(run.launcher.pid)] if run.launcher and run.launcher.poll() is None else []:
        for one in [*process.children(recursive=True), process]:
            one.kill()
    if run.launcher:
        run.launcher.wait()
    wait_for(lambda: not run.ranks())


def _output(command: list[str], cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.strip()


def free_port() -> int:
    """Return a TCP port without a listener."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(happened: Callable[[], object], seconds: float = 900.0) -> None:
    """Wait until `happened()` is true.

    Raises:
        TimeoutError: it has not happened after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError("the run has not come so far; see its logs")
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    faults = ("killed", "hang", "disk", "slurm_killed", "node", "preemption", "open_clip")
    parser.add_argument("--config", type=Path, required=True, help="recipe of a small model, with local data")
    parser.add_argument("--faults", nargs="+", choices=faults, default=["killed"])
    parser.add_argument("--repeat", type=int, default=3, help="number of measurements of each fault, in turn")
    parser.add_argument("--checkouts", nargs="+", type=Path, default=[Path.cwd()], help="packages to compare")
    parser.add_argument("--work", type=Path, default=Path("runs/recovery"), help="folder for the runs")
    arguments = parser.parse_args()
    found: dict[tuple[str, str], list[Seconds]] = {}
    for number in range(arguments.repeat):
        for name in arguments.faults:
            for checkout in arguments.checkouts if name != "open_clip" else [Path("open_clip")]:
                folder = arguments.work.resolve() / f"{name}-{checkout.name}-{number}"
                shutil.rmtree(folder, ignore_errors=True)
                if name == "open_clip":
                    data = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))["data"]
                    shards = "::".join(map(str, sorted(Path(data["shards"]).glob("*.tar"))))
                    parts = killed_open_clip(folder, shards)
                else:
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    run = Run(folder, checkout.resolve(), arguments.config.resolve())
                    parts = (under_torchrun if name in faults[:3] else under_slurm)(run, name)
                found.setdefault((name, checkout.name), []).append(parts)
                print(json.dumps({"fault": name, "package": checkout.name, **parts}), flush=True)
    for (name, package), all_parts in found.items():
        middle = {part: statistics.median(one[part] for one in all_parts if part in one) for part in all_parts[0]}
        print(f"{name} {package}: " + ", ".join(f"{part} {value:.1f}" for part, value in middle.items()))


if __name__ == "__main__":
    main()
