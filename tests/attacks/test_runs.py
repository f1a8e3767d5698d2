"""Attacks on run directories: two runs at once, kills, torn files, signals, and folders of the user's."""

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from attacks import ground
from attacks.attack import Attack, Change, Ended, Make, later, refused, survived, test_of
from attacks.changes import kept, lacks, mine, obeys_nothing, pipe, text
from conftest import metrics, write_shards
from processes import wait_for

from flipscale.process.lock import FolderLock

During = Callable[[Path, list[int]], None]


def endless(folder: Path) -> list[str]:
    """A run longer than any attack."""
    ground.shards(folder)
    stage = {"name": "long", "samples": 16_000_000, "mask_ratio": 0.75, "base_lr": 0.012}
    return ground.pretrain(folder, stages=[stage], save={"every_samples": 16_000, "total_limit": 3})


def trains(folder: Path) -> bool:
    file = folder / "run/metrics.jsonl"
    return file.exists() and len(file.read_bytes().splitlines()) >= 3


@later
def send(
    folder: Path, pids: list[int], *numbers: int, to_all: bool = True, after: Callable[[Path], bool] = trains
) -> None:
    """Send signals to all processes, or to the first, once the run trains, each after the answer to the one before.

    The kernel merges two equal pending signals, and delivers the lower number of two different ones first.
    """
    wait_for(lambda: after(folder))
    stderr = folder.with_name(f"{folder.name}-output") / "stderr"
    for place, number in enumerate(numbers):
        wait_for(lambda place=place: not place or b"once more to end at once" in stderr.read_bytes())
        for pid in pids if to_all else pids[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def saved(folder: Path, ended: Ended) -> None:
    """Assert that the run saved all its steps and is not marked as done."""
    (checkpoint,) = list((folder / "run/checkpoints").iterdir())[-1:]
    assert int(checkpoint.name[5:]) >= metrics(folder / "run")[-1]["step"]
    assert not (folder / "run/DONE").exists()
    assert not (folder / "run/run.lock").exists()


def sizes(run: Path) -> dict[str, int]:
    return {str(path.relative_to(run)): path.stat().st_size for path in run.rglob("*") if path.is_file()}


def note_sizes(folder: Path) -> None:
    (folder / "before.json").write_text(json.dumps(sizes(folder / "run")))


@later
def held(folder: Path, content: bytes | None = None, age: float = 0.0, **changes: object) -> list[str]:
    """A stopped run whose lock this process touched `age` seconds ago, unless `changes` name another holder."""
    lock = ground.run_of(folder, up_to=4) / "run.lock"
    holder = {**dataclasses.asdict(FolderLock(lock, "").holder), **changes}
    lock.write_bytes(json.dumps(holder).encode() if content is None else content)
    os.utime(lock, (time.time() - age,) * 2)
    note_sizes(folder)
    return ground.pretrain(folder)


def untouched(folder: Path, ended: Ended) -> None:
    assert sizes(folder / "run") == json.loads((folder / "before.json").read_text())


def finished(folder: Path, ended: Ended) -> None:
    """Assert that the run went on to its end, with each step once."""
    steps = [record["step"] for record in metrics(folder / "run") if "loss" in record]
    assert steps == list(range(1, 11)), steps
    assert (folder / "run/DONE").exists()
    assert (folder / "run/model/config.json").exists()
    assert not (folder / "run/run.lock").exists()


@later
def trained_in(folder: Path, precision: str) -> list[str]:
    """A stopped run whose last start had this precision."""
    file = ground.run_of(folder, up_to=8) / "environment.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mixed_precision": precision}))
    return ground.pretrain(folder)


@later
def starts_in_new(folder: Path, *flags: str) -> list[str]:
    """A run in `new/run` from the weights of the trained model, with these flags."""
    ground.shards(folder)
    start = ["--model.init_from", str(ground.trained_model()), "--output_dir", "new/run"]
    return [*ground.pretrain(folder), *start, *flags]


def has_no_commit(folder: Path, ended: Ended) -> None:
    finished(folder, ended)
    assert json.loads((folder / "run/environment.json").read_text())["commit"] is None


def beat_elsewhere(folder: Path, pids: list[int]) -> None:
    lock, end = folder / "run/run.lock", time.monotonic() + 200
    while psutil.pid_exists(pids[0]) and time.monotonic() < end:
        os.utime(lock)
        time.sleep(0.2)


def rob(folder: Path, pids: list[int]) -> None:
    """Suspend the run, give it to another machine, and wake it up."""
    wait_for(lambda: trains(folder))
    os.kill(pids[0], signal.SIGSTOP)
    lock = folder / "run/run.lock"
    about = json.loads(lock.read_text())
    lock.write_text(json.dumps({**about, "token": "theirs", "host": "far", "machine": "another boot"}))
    (folder / "at.json").write_text(json.dumps(sorted(p.name for p in (folder / "run/checkpoints").glob("*"))))
    os.kill(pids[0], signal.SIGCONT)
    os.kill(pids[0], signal.SIGTERM)


def saves_nothing(folder: Path, ended: Ended) -> None:
    assert json.loads((folder / "at.json").read_text()) == [p.name for p in (folder / "run/checkpoints").glob("*")]
    assert json.loads((folder / "run/run.lock").read_text())["token"] == "theirs"


@later
def done_without(folder: Path, *names: str) -> list[str]:
    ground.run_of(folder)
    for name in names:
        path = folder / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    note_sizes(folder)
    return ground.pretrain(folder)


@later
def without_page(folder: Path, change: Change) -> list[str]:
    """A finished run without its page, after `change` to its directory."""
    (ground.run_of(folder) / "report.html").unlink()
    change(folder / "run")
    return ground.pretrain(folder)


@later
def torn(folder: Path, name: str, tail: bytes) -> list[str]:
    """A stopped run with bytes at the end of a file."""
    with open(ground.run_of(folder, up_to=8) / name, "ab") as file:
        file.write(tail)
    return ground.pretrain(folder)


@later
def in_the_way(folder: Path, change: Change) -> list[str]:
    """A new run after `change` to its folder."""
    ground.shards(folder)
    change(folder)
    return ground.pretrain(folder)


@later
def study(folder: Path, *names: str, prepare: Change = lambda folder: None, minutes: str = "0.05") -> list[str]:
    """A race in `out` of recipes of these names."""
    ground.shards(folder)
    prepare(folder)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        ground.recipe(folder).replace(folder / name)
    return ["study", "race", *names, "--minutes", minutes, "--output_dir", "out"]


def study_trains(folder: Path) -> bool:
    file = folder / "out/a/metrics.jsonl"
    return file.exists() and len(file.read_bytes()) > 0


def leaves_no_run(folder: Path, ended: Ended) -> None:
    def left() -> bool:
        found = psutil.process_iter(["cmdline"])
        return any(str(folder) in word for process in found for word in process.info["cmdline"] or [])

    wait_for(lambda: not left())  # because a killed process first returns its memory


@later
def export(folder: Path, *names: str) -> list[str]:
    """An export to a folder with these files of the user's."""
    run = ground.run_of(folder)
    if "config.json" not in names:
        shutil.copytree(run / "model", folder / "out")
    for name in names:
        mine(f"out/{name}")(folder)
    return ["export", "run", "--out", "out"]


@later
def status(folder: Path, change: Change) -> list[str]:
    """The status of a stopped run after `change` to its directory."""
    change(ground.run_of(folder, up_to=8))
    return ["status", "run"]


@later
def resumed(folder: Path, change: Change) -> list[str]:
    """A stopped run that goes on after `change` to its directory."""
    change(ground.run_of(folder, up_to=8))
    return ground.pretrain(folder)


def other_data(run: Path) -> None:
    write_shards(run.parent / "data", [30, 17, 1, 48], seed=1)


def remove(folder: Path, pids: list[int]) -> None:
    wait_for(lambda: trains(folder))
    (folder / "run").rename(folder / "elsewhere")


def line(name: str, **record: object) -> Change:
    """Append a record with these fields to a file of a run."""
    whole = {"step": 9, "samples_seen": 144, "trained_seconds": 1.0, "time": 1.0, "num_processes": 1}
    if name == "results.jsonl":
        whole |= {"task": "zero_shot", "kind": "zero_shot", "metric": "top1", "value": 1.0}

    def append(run: Path) -> None:
        with open(run / name, "a") as file:
            file.write(json.dumps({**whole, **record}).replace("Infinity", "1e400") + "\n")

    return append


@later
def folder_at(run: Path, name: str) -> None:
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir(parents=True)


@later
def file_at(run: Path, name: str) -> None:
    shutil.rmtree(run / name)
    (run / name).write_text("mine")


def heartbeat(**content: object) -> Change:
    beat = {"time": 1.0, "step": 4, "phase": "training", "step_s": 0.1, **content}
    return text("heartbeat.json", json.dumps(beat).replace("Infinity", "1e400"))


CURSOR = "\x1b[2J\x1b]0;theirs\x07\u202e"


@later
def compare(folder: Path, *names: str, change: Change = lambda folder: None) -> list[str]:
    """A comparison of runs, after `change` to the folder of the run `run` and of a copy `other`."""
    ground.run_of(folder)
    shutil.copytree(folder / "run", folder / "other")
    change(folder)
    return ["compare", *names]


SHOWN = "(\\x1b[2J\\x1b]0;theirs\\x07\\u202e)"
INFINITE, NAN = float("inf"), float("nan")
STATUS = [
    survived("a heartbeat after 1e400 seconds", status(heartbeat(time=INFINITE)), "starting"),
    survived("a heartbeat of NaN", status(heartbeat(time=NAN, step_s=NAN)), "starting"),
    survived("a step of 400 digits", status(heartbeat(step=10**400)), "160 of 160 pairs"),
    survived("a speed in words", status(line("metrics.jsonl", images_per_s="fast")), "1 of 11 lines", alone=True),
    survived("a result of other types", status(line("results.jsonl", n="x", low=[1])), "1 of 1 lines", alone=True),
    survived("a number of bad checkpoints", status(line("starts.jsonl", set_aside=5)), "1 of 2 lines", alone=True),
    refused("a heartbeat that is a folder", status(folder_at("heartbeat.json")), "heartbeat.json"),
    survived("a speed of 0", status(line("metrics.jsonl", images_per_s=0)), "0 images/s"),
    survived("a speed that ends in 10^300 years", status(line("metrics.jsonl", images_per_s=1e-300)), "160 of"),
    survived("a loss without its rate", status(line("metrics.jsonl", images_per_s=1.0, loss=1.0)), "160 of"),
    survived(
        "a stage that moves the cursor", status(line("metrics.jsonl", images_per_s=5.0, stage=CURSOR)), SHOWN,
        check=obeys_nothing,
    ),
    survived(
        "a result that moves the cursor", status(line("results.jsonl", label=CURSOR, unit=CURSOR, who=CURSOR)),
        "\\x1b[2J", check=obeys_nothing,
    ),
    refused("metrics that are a pipe", status(pipe("metrics.jsonl")), "metrics.jsonl"),
    refused("metrics that are a folder", status(folder_at("metrics.jsonl")), "metrics.jsonl"),
    survived("crashes that are no text", status(text("slurm/crashes", b"\xff"))),
    refused("the status of an empty recipe", status(text("recipe.yaml", "")), "run/recipe.yaml"),
    refused("the status of a recipe in binary", status(text("recipe.yaml", b"\xff\xfe")), "run/recipe.yaml"),
    refused("the status of a recipe that is code", status(text("recipe.yaml", "a: !!python/name:os.x")), "run/recipe"),
    refused("the status of a recipe without stages", status(text("recipe.yaml", "data: {}")), "run/recipe.yaml"),
    refused("the status of a recipe that is a pipe", status(pipe("recipe.yaml")), "run/recipe.yaml"),
]  # fmt: skip


def send_soon(number: int) -> During:
    """Send a signal as soon as the command handles it, before it trains."""

    def handles(pid: int) -> bool:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        caught = next(line for line in lines if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)

    def during(folder: Path, pids: list[int]) -> None:
        wait_for(lambda: handles(pids[0]))
        os.kill(pids[0], number)

    return during


def stopped_by(name: str, says: str, *numbers: int, world: int = 1) -> Attack:
    """A run that saves and stops at these signals."""
    return Attack(name, endless, 0, (says,), saved, during=send(*numbers), world=world)


def goes_on(name: str, make: Make, *says: str, **environment: str) -> Attack:
    return Attack(name, make, 0, says, finished, environment=environment)


STUDY = {"megabytes": 4000}
HELD, FAR = "trains in ", {"host": "far", "machine": "another boot"}
NO_PAGE = lacks("compare.html")
COMPARE = [
    refused("a comparison of one run", compare("run"), "run", check=NO_PAGE),
    refused("a comparison of a run with itself", compare("run", "./run"), "twice", check=NO_PAGE),
    refused(
        "a comparison of a run with a link to it",
        compare("run", "b", change=lambda folder: (folder / "b").symlink_to("run")), "twice", check=NO_PAGE,
    ),
    refused("a comparison with a folder of data", compare("run", "data"), "data", "recipe.yaml", check=NO_PAGE),
    refused(
        "a comparison with a run without a record", compare("run", "other", change=text("other/metrics.jsonl", "")),
        "other has no metrics.jsonl", check=NO_PAGE,
    ),
    refused(
        "a comparison with a recipe without stages", compare("run", "other", change=text("other/recipe.yaml", "a: 1")),
        "other/recipe.yaml", check=NO_PAGE,
    ),
    refused("a comparison with a recipe as a pipe", compare("run", "other", change=pipe("other/recipe.yaml")), "other"),
    refused("a comparison to a text file", compare("run", "other", "--out", "a.txt"), "--out", check=lacks("a.txt")),
    survived(
        "a comparison with a stage that moves the cursor",
        compare("run", "other", change=lambda folder: line("metrics.jsonl", loss=1.0, stage=CURSOR)(folder / "other")),
        "recipes are equal", check=obeys_nothing,
    ),
]  # fmt: skip
ATTACKS = [
    *STATUS,
    *COMPARE,
    Attack(
        "SIGTERM before the first step", endless, 128 + signal.SIGTERM, ("SIGTERM",), during=send_soon(signal.SIGTERM)
    ),
    Attack(
        "a terminal that is closed before the first step", endless, 128 + signal.SIGHUP, ("SIGHUP",),
        during=send_soon(signal.SIGHUP),
    ),
    refused("a second run of a directory", held(), f"process {os.getpid()} on ", HELD, check=untouched, alone=True),
    refused("a second run of a directory, of two processes", held(), HELD, check=untouched, world=2),
    Attack(
        "a second run of a directory that another machine trains in", held(**FAR), 2,
        ("on far (", HELD), untouched, during=beat_elsewhere,
    ),
    goes_on("a lock of a killed process of this machine", held(started="1"), "is gone"),
    goes_on("a lock of a machine that died long ago", held(age=1e4, **FAR), "is gone"),
    goes_on("a lock of a machine that died a minute ago", held(age=52.0, **FAR), "60 s", "is gone"),
    goes_on(
        "a requeued Slurm job, seconds after its node died", held(**FAR, slurm_job="7"), "is gone",
        SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1",
    ),
    goes_on("an empty lock", held(b"", 1e4)),
    goes_on("a lock of binary garbage", held(b"\0\xff" * 500, 1e4)),
    refused("a pipe for a lock", resumed(pipe("run.lock")), "run.lock"),
    refused("a folder for a lock", in_the_way(lambda f: (f / "run/run.lock").mkdir(parents=True)), "run.lock"),
    Attack(
        "a suspended run whose directory another has taken", endless, 1, ("on far (",), saves_nothing, during=rob
    ),
    survived("DONE, and the checkpoints removed", done_without("checkpoints"), "done", check=untouched),
    survived("DONE, and the model removed", done_without("model"), "flipscale export", check=untouched),
    survived("DONE, and both removed", done_without("checkpoints", "model"), "done", check=untouched),
    survived(
        "the page of a run whose facts are damaged",
        without_page(text("environment.json", '{"num_parameters": ["x"]}')),
        "run/report.html was not written", "flipscale pretrain --config", check=lacks("run/report.html"),
    ),
    goes_on("DONE removed", done_without("DONE")),
    refused("DONE and the checkpoints removed", done_without("DONE", "checkpoints"), "model", check=untouched),
    goes_on("recipe.yaml of a stopped run removed", done_without("DONE", "model", "recipe.yaml")),
    survived(
        "a machine without git", in_the_way(lambda folder: None), check=has_no_commit, environment={"PATH": "/nowhere"}
    ),
    goes_on(
        "a run in bf16 that resumes in fp32", trained_in("bf16"), "precision is fp32", "was bf16 before",
        "set mixed_precision bf16", ACCELERATE_MIXED_PRECISION="no", FLIPSCALE_STOP_FILE="stop",
    ),
    goes_on("a torn starts.jsonl", torn("starts.jsonl", b'{"time": 12')),
    goes_on("a starts.jsonl that lost its fields", torn("starts.jsonl", b'{"time": 12}\n')),
    refused("starts that are a pipe", resumed(pipe("starts.jsonl")), "starts.jsonl"),
    refused("metrics to go on from that are a pipe", resumed(pipe("metrics.jsonl")), "metrics.jsonl"),
    Attack("a run directory that is removed while it trains", endless, 1, ("run",), during=remove),
    goes_on("a torn metrics.jsonl", torn("metrics.jsonl", b'{"step": 8, "lo')),
    goes_on(
        "binary garbage in metrics.jsonl", torn("metrics.jsonl", b'\0\xff\n[1]\n{"step": null}\n'), "3 of 13 lines"
    ),
    goes_on("binary garbage in results.jsonl", torn("results.jsonl", b'\0\xff\n{"step": "x"}\n{}\n')),
    goes_on(
        "binary garbage in bad_samples.jsonl",
        torn("bad_samples.jsonl", b'\0\xff\n{"shard": "a", "position": "b"}\n'),
    ),
    goes_on("garbage in heartbeat.json", torn("heartbeat.json", b"\0\xff{")),
    goes_on("shards of other samples in the same numbers", resumed(other_data), "step-00000008", "other lengths"),
    goes_on("a file where figures go", resumed(file_at("figures")), "figures was not written"),
    refused("garbage in recipe.yaml", torn("recipe.yaml", b"\n\t- {"), "recipe.yaml"),
    stopped_by("Ctrl-C", "SIGINT", signal.SIGINT),
    stopped_by("a terminal that is closed", "SIGHUP", signal.SIGHUP),
    stopped_by("a batch system that sends SIGTERM and SIGHUP", "SIGTERM", signal.SIGTERM, signal.SIGHUP),
    stopped_by("Ctrl-C with two processes", "sav", signal.SIGINT, world=2),
    stopped_by("Ctrl-C with a launcher that sends it on", "sav", signal.SIGINT, signal.SIGINT, world=2),
    refused(
        "an empty output_dir", lambda f: [*in_the_way(lambda folder: None)(f), "--output_dir", ""], "output_dir is ''",
        check=lacks("checkpoints", "environment.json"),
    ),
    refused(
        "start weights of another width", starts_in_new("--model.vision_config.hidden_size", "64"),
        "has the shape [32", "[64", check=lacks("new"),
    ),
    refused("an output_dir that is a file", in_the_way(mine("run")), "run", check=kept("run")),
    refused("an output_dir that is a link to nothing", in_the_way(lambda f: (f / "run").symlink_to(f / "no")), "link"),
    refused(
        "a folder of the user's where the model will be", in_the_way(mine("run/model/notes.txt")),
        "model", check=kept("run/model/notes.txt"),
    ),
    refused("a study of two recipes of one name", study("x/a.yaml", "y/a.yaml"), "name"),
    refused("a study of a recipe whose name is in colours", study("\x1b[31m.yaml"), "rename"),
    refused("a study of a recipe called model", study("model.yaml"), "model", "rename"),
    refused(
        "a study in a folder with a model of the user's", study("a.yaml", prepare=mine("out/model/m")),
        "out holds model", check=kept("out/model/m"),
    ),
    refused(
        "a study in a folder with figures of the user's",
        study("a.yaml", prepare=mine("out/figures/m")), "out holds figures", check=kept("out/figures/m"),
    ),
    refused("a study in the folder of its recipes", study("out/a.yaml"), "out holds a.yaml"),
    refused("a study in a run directory", study("a.yaml", prepare=mine("out/recipe.yaml")), "out holds"),
    refused("a study in a file", study("a.yaml", prepare=mine("out")), "out", check=kept("out")),
    Attack(
        "a study whose session ends", study("a.yaml", "b c.yaml", minutes="2"), 128 + signal.SIGHUP, ("saved",),
        leaves_no_run, during=send(signal.SIGHUP, signal.SIGTERM, to_all=False, after=study_trains), long=True, **STUDY,
    ),
    Attack(
        "Ctrl-C twice on a study", study("a.yaml", "ä.yaml", minutes="2"), 130, ("once more",), leaves_no_run,
        during=send(signal.SIGINT, signal.SIGINT, to_all=False, after=study_trains), long=True, **STUDY,
    ),
    refused(
        "a study with a run that fails", study("a.yaml", prepare=lambda f: shutil.rmtree(f / "data")),
        "exit code 2", "out/a.log", check=leaves_no_run, long=True,
    ),
    refused(
        "an export over notes of the user's", export("notes.txt"), "out holds notes.txt", check=kept("out/notes.txt")
    ),
    refused("an export over a folder of the user's", export("x/notes.txt"), "out", check=kept("out/x/notes.txt")),
    refused("an export over another config.json", export("config.json"), "out", check=kept("out/config.json")),
]  # fmt: skip

test_attack = test_of(ATTACKS)
