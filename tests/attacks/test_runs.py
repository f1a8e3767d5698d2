"""Attacks on run directories: two runs at once, kills, torn files, signals, and folders that are somebody's."""

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
import pytest
from attacks import ground
from attacks.attack import Attack, Ended, hold
from conftest import metrics

from flipscale.io.lock import FolderLock


def endless(folder: Path) -> list[str]:
    """A run that takes longer than any attack."""
    ground.shards(folder)
    stage = {"name": "long", "samples": 16_000_000, "mask_ratio": 0.75, "base_lr": 0.012}
    return ground.pretrain(folder, stages=[stage], save={"every_samples": 16_000, "total_limit": 3})


def wait_for(seen: Callable[[], bool], seconds: float = 200.0) -> None:
    end = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.01)


def trains(folder: Path) -> bool:
    file = folder / "run/metrics.jsonl"
    return file.exists() and len(file.read_bytes().splitlines()) >= 3


def send(*numbers: int) -> Callable[[Path, list[int]], None]:
    """Signals to all processes once the run trains, each as soon as the one before it was heard: of two that wait at
    the same time, the kernel passes on one if they are alike, and the lower number first if they are not."""

    def during(folder: Path, pids: list[int]) -> None:
        wait_for(lambda: trains(folder))
        for place, number in enumerate(numbers):
            if place:
                wait_for(lambda: says(folder, "once more to end at once"))
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    return during


def says(folder: Path, words: str) -> bool:
    """Whether the command of an attack has said this."""
    return words.encode() in (folder.with_name(f"{folder.name}-output") / "stderr").read_bytes()


def saved(folder: Path, ended: Ended) -> None:
    """The run saved all of its steps and marked nothing done."""
    (checkpoint,) = list((folder / "run/checkpoints").iterdir())[-1:]
    assert int(checkpoint.name[5:]) >= metrics(folder / "run")[-1]["step"]
    assert not (folder / "run/DONE").exists()
    assert not (folder / "run/run.lock").exists()


def _everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _held(folder: Path, **changes: object) -> list[str]:
    """A stopped run that another process has, this one, unless the lock's file is `changed`."""
    ground.run_of(folder, up_to=4)
    lock = FolderLock(folder / "run/run.lock", "")
    (folder / "run/run.lock").write_text(json.dumps({**dataclasses.asdict(lock.holder), **changes}))
    (folder / "before.json").write_text(json.dumps({name: len(data) for name, data in _everything(folder).items()}))
    return ground.pretrain(folder)


def untouched(folder: Path, ended: Ended) -> None:
    before = json.loads((folder / "before.json").read_text())
    after = {name: len(data) for name, data in _everything(folder / "run").items()}
    assert after == {name[4:]: size for name, size in before.items() if name.startswith("run/")}


def finished(folder: Path, ended: Ended) -> None:
    """The run went on to its end, with each of its steps once."""
    steps = [record["step"] for record in metrics(folder / "run") if "loss" in record]
    assert steps == list(range(1, 11)), steps
    assert (folder / "run/DONE").exists()
    assert (folder / "run/model/config.json").exists()
    assert not (folder / "run/run.lock").exists()


def _silent(folder: Path, age: float = 1e4, **changes: object) -> list[str]:
    """The run of another machine whose lock was touched `age` seconds ago."""
    command = _held(folder, host="far", machine="another boot", **changes)
    os.utime(folder / "run/run.lock", (time.time() - age,) * 2)
    return command


def _garbled(content: bytes, age: float = 1e4) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        command = _held(folder)
        (folder / "run/run.lock").write_bytes(content)
        os.utime(folder / "run/run.lock", (time.time() - age,) * 2)
        return command

    return make


def _beats_elsewhere(folder: Path, pids: list[int]) -> None:
    lock, end = folder / "run/run.lock", time.monotonic() + 200
    while psutil.pid_exists(pids[0]) and time.monotonic() < end:
        os.utime(lock)
        time.sleep(0.2)


def _robbed(folder: Path, pids: list[int]) -> None:
    """It is suspended, another machine's process takes the run, and it wakes up."""
    wait_for(lambda: trains(folder))
    os.kill(pids[0], signal.SIGSTOP)
    lock = folder / "run/run.lock"
    about = json.loads(lock.read_text())
    lock.write_text(json.dumps({**about, "token": "theirs", "host": "far", "machine": "another boot"}))
    (folder / "at.json").write_text(json.dumps(sorted(p.name for p in (folder / "run/checkpoints").glob("*"))))
    os.kill(pids[0], signal.SIGCONT)
    os.kill(pids[0], signal.SIGTERM)


def nothing_saved(folder: Path, ended: Ended) -> None:
    assert json.loads((folder / "at.json").read_text()) == [p.name for p in (folder / "run/checkpoints").glob("*")]
    assert json.loads((folder / "run/run.lock").read_text())["token"] == "theirs"


def _one_left(folder: Path, ended: Ended) -> None:
    steps = [record["step"] for record in metrics(folder / "run") if "loss" in record]
    assert steps == list(range(1, 11)), steps


def _done_without(*names: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        ground.run_of(folder)
        for name in names:
            path = folder / "run" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (folder / "before.json").write_text(json.dumps({name: len(data) for name, data in _everything(folder).items()}))
        return ground.pretrain(folder)

    return make


def _torn(name: str, tail: bytes) -> Callable[[Path], list[str]]:
    """A file of a stopped run whose last line was cut, or in which something else lies."""

    def make(folder: Path) -> list[str]:
        run = ground.run_of(folder, up_to=8)
        with open(run / name, "ab") as file:
            file.write(tail)
        return ground.pretrain(folder)

    return make


def _in_the_way(make_it: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        ground.shards(folder)
        make_it(folder)
        return ground.pretrain(folder)

    return make


def _kept(*names: str) -> Callable[[Path, Ended], None]:
    """What the user had put there is still there."""

    def check(folder: Path, ended: Ended) -> None:
        for name in names:
            assert (folder / name).read_text() == "mine", name

    return check


def _mine(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    return path


def _study(
    *names: str, prepare: Callable[[Path], object] = lambda folder: None, minutes: str = "0.05"
) -> Callable[[Path], list[str]]:
    """A study in `out` of recipes of these names."""

    def make(folder: Path) -> list[str]:
        ground.shards(folder)
        prepare(folder)
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            ground.recipe(folder).replace(folder / name)
        return ["study", "race", *names, "--minutes", minutes, "--output_dir", "out"]

    return make


def _trains(folder: Path) -> bool:
    file = folder / "out/a/metrics.jsonl"
    return file.exists() and len(file.read_bytes()) > 0


def _told(*numbers: int) -> Callable[[Path, list[int]], None]:
    """Signals to the study once its runs train."""

    def during(folder: Path, pids: list[int]) -> None:
        wait_for(lambda: _trains(folder))
        for place, number in enumerate(numbers):
            if place:
                wait_for(lambda: says(folder, "once more to end at once"))
            os.kill(pids[0], number)

    return during


def no_run_is_left(folder: Path, ended: Ended) -> None:
    def left() -> bool:
        found = psutil.process_iter(["cmdline"])
        return any(str(folder) in word for process in found for word in process.info["cmdline"] or [])

    wait_for(lambda: not left())  # one that was killed has its memory to give back


def _export(*names: str) -> Callable[[Path], list[str]]:
    """An export to a folder of which these files are the user's."""

    def make(folder: Path) -> list[str]:
        run = ground.run_of(folder)
        if "config.json" not in names:
            shutil.copytree(run / "model", folder / "out")
        for name in names:
            _mine(folder / "out" / name)
        return ["export", "run", "--out", "out"]

    return make


def _status(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    """The status of a stopped run after `change` to its directory."""

    def make(folder: Path) -> list[str]:
        change(ground.run_of(folder, up_to=8))
        return ["status", "run"]

    return make


def _resumed(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    """A stopped run that goes on after `change` to its directory."""

    def make(folder: Path) -> list[str]:
        change(ground.run_of(folder, up_to=8))
        return ground.pretrain(folder)

    return make


def _removed(folder: Path, pids: list[int]) -> None:
    wait_for(lambda: trains(folder))
    (folder / "run").rename(folder / "elsewhere")


def _line(name: str, **record: object) -> Callable[[Path], object]:
    """Appends a record to a file of a run, whole but for `record`."""
    whole = {"step": 9, "samples_seen": 144, "trained_seconds": 1.0, "time": 1.0, "num_processes": 1}
    if name == "results.jsonl":
        whole |= {"task": "zero_shot", "kind": "zero_shot", "metric": "top1", "value": 1.0}

    def append(run: Path) -> None:
        with open(run / name, "a") as file:
            file.write(json.dumps({**whole, **record}).replace("Infinity", "1e400") + "\n")

    return append


def _text(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(content.encode() if isinstance(content, str) else content)


def _pipe(name: str) -> Callable[[Path], object]:
    def make(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)

    return make


def _folder(name: str) -> Callable[[Path], object]:
    def make(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir(parents=True)

    return make


def _crashes(run: Path) -> None:
    (run / "slurm").mkdir()
    (run / "slurm/crashes").write_bytes(b"\xff")


def _heartbeat(**content: object) -> Callable[[Path], object]:
    beat = {"time": 1.0, "step": 4, "phase": "training", "step_s": 0.1, **content}
    return _text("heartbeat.json", json.dumps(beat).replace("Infinity", "1e400"))


def obeys_nothing(folder: Path, ended: Ended) -> None:
    """No character that a terminal obeys was printed."""
    assert not set("\x1b\x07\x9b\u202e") & set(ended.stdout + ended.stderr), ended


_CURSOR = "\x1b[2J\x1b]0;theirs\x07\u202e"
_DAMAGED = ("run/recipe.yaml is not the recipe that the run began with",)
STATUS = [
    Attack("a heartbeat that is a folder", _status(_folder("heartbeat.json")), 2, ("heartbeat.json is a folder",)),
    Attack("a speed of 0", _status(_line("metrics.jsonl", images_per_s=0)), says=("0 images/s",)),
    Attack("a speed that ends in 10^300 years", _status(_line("metrics.jsonl", images_per_s=1e-300)), says=("160 of",)),
    Attack("a loss without its rate", _status(_line("metrics.jsonl", images_per_s=1.0, loss=1.0)), says=("160 of",)),
    Attack(
        "a stage that moves the cursor",
        _status(_line("metrics.jsonl", images_per_s=5.0, stage=_CURSOR)),
        says=("(\\x1b[2J\\x1b]0;theirs\\x07\\u202e)",), check=obeys_nothing,
    ),
    Attack(
        "a result that moves the cursor",
        _status(_line("results.jsonl", label=_CURSOR, unit=_CURSOR, who=_CURSOR)),
        says=("\\x1b[2J",), check=obeys_nothing,
    ),
    Attack("metrics that are a pipe", _status(_pipe("metrics.jsonl")), 2, ("metrics.jsonl is no plain file",)),
    Attack("metrics that are a folder", _status(_folder("metrics.jsonl")), 2, ("metrics.jsonl is a folder",)),
    Attack("crashes that are no text", _status(_crashes)),
    Attack("the status of an empty recipe", _status(_text("recipe.yaml", "")), 2, _DAMAGED),
    Attack("the status of a recipe in binary", _status(_text("recipe.yaml", b"\xff\xfe")), 2, _DAMAGED),
    Attack("the status of a recipe that is code", _status(_text("recipe.yaml", "a: !!python/name:os.x")), 2, _DAMAGED),
    Attack("the status of a recipe without stages", _status(_text("recipe.yaml", "data: {}")), 2, _DAMAGED),
    Attack("the status of a recipe that is a pipe", _status(_pipe("recipe.yaml")), 2, _DAMAGED),
]  # fmt: skip


def _soon(number: int) -> Callable[[Path, list[int]], None]:
    """A signal as soon as the command has begun, long before it trains."""

    def during(folder: Path, pids: list[int]) -> None:
        for pid in pids:
            wait_for(lambda pid=pid: _hears(pid, number))
            os.kill(pid, number)

    return during


def _hears(pid: int, number: int) -> bool:
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


ATTACKS = [
    *STATUS,
    Attack(
        "SIGTERM before the first step", endless, 128 + signal.SIGTERM, ("SIGTERM: ended; the same command",),
        during=_soon(signal.SIGTERM),
    ),
    Attack(
        "a terminal that is closed before the first step", endless, 128 + signal.SIGHUP, ("SIGHUP: ended",),
        during=_soon(signal.SIGHUP),
    ),
    Attack(
        "a second run of a directory", _held, 2, (f"process {os.getpid()} on ", "trains in ", "stop it"), untouched
    ),
    Attack("a second run of a directory, of two processes", _held, 2, ("trains in ",), untouched, world=2),
    Attack(
        "a second run of a directory that another machine trains in",
        lambda folder: _silent(folder, age=0.0),
        2,
        ("on far (", "trains in "),
        untouched,
        during=_beats_elsewhere,
    ),
    Attack("a lock of a killed process of this machine", lambda f: _held(f, started="1"), 0, ("is gone",), finished),
    Attack("a lock of a machine that died long ago", _silent, 0, ("is gone",), finished),
    Attack(
        "a lock of a machine that died a minute ago",
        lambda f: _silent(f, age=52.0),
        0,
        ("waiting up to 60 s", "is gone"),
        finished,
    ),
    Attack(
        "a requeued Slurm job, seconds after its node died",
        lambda f: _silent(f, age=0.0, slurm_job="7"),
        0,
        ("is gone",),
        finished,
        environment={"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"},
    ),
    Attack("an empty lock", _garbled(b""), 0, (), finished),
    Attack("a lock of binary garbage", _garbled(b"\0\xff" * 500), 0, (), finished),
    Attack("a pipe for a lock", _resumed(_pipe("run.lock")), 2, ("run.lock is no plain file",)),
    Attack("a folder for a lock", _in_the_way(lambda f: (f / "run/run.lock").mkdir(parents=True)), 2, ("run.lock",)),
    Attack(
        "a suspended run whose directory another has taken", endless, 1, ("on far (", "writes nothing more"),
        nothing_saved, during=_robbed,
    ),
    Attack("DONE, and the checkpoints removed", _done_without("checkpoints"), 0, ("is done",), untouched),
    Attack("DONE, and the model removed", _done_without("model"), 0, ("flipscale export",), untouched),
    Attack("DONE, and both removed", _done_without("checkpoints", "model"), 0, ("its model is gone",), untouched),
    Attack("DONE removed", _done_without("DONE"), 0, (), finished),
    Attack("DONE and the checkpoints removed", _done_without("DONE", "checkpoints"), 2, ("model is there",), untouched),
    Attack("recipe.yaml of a stopped run removed", _done_without("DONE", "model", "recipe.yaml"), 0, (), finished),
    Attack("a torn starts.jsonl", _torn("starts.jsonl", b'{"time": 12'), 0, (), finished),
    Attack("a starts.jsonl that lost its fields", _torn("starts.jsonl", b'{"time": 12}\n'), 0, (), finished),
    Attack("starts that are a pipe", _resumed(_pipe("starts.jsonl")), 2, ("starts.jsonl is no plain file",)),
    Attack("metrics to go on from that are a pipe", _resumed(_pipe("metrics.jsonl")), 2, ("is no plain file",)),
    Attack(
        "a run directory that is removed while it trains", endless, 1, ("run is not there any more",),
        during=_removed,
    ),
    Attack("a torn metrics.jsonl", _torn("metrics.jsonl", b'{"step": 8, "lo'), 0, (), finished),
    Attack(
        "binary garbage in metrics.jsonl", _torn("metrics.jsonl", b"\0\xff\n[1]\n{}\n"), 0,
        ("metrics.jsonl: 3 of 13 lines are no records of it and are skipped",), finished,
    ),
    Attack("binary garbage in results.jsonl", _torn("results.jsonl", b'\0\xff\n{"step": "x"}\n{}\n'), 0, (), finished),
    Attack("binary garbage in bad_samples.jsonl", _torn("bad_samples.jsonl", b"\0\xff\n{}\n"), 0, (), finished),
    Attack("garbage in heartbeat.json", _torn("heartbeat.json", b"\0\xff{"), 0, (), finished),
    Attack("garbage in recipe.yaml", _torn("recipe.yaml", b"\n\t- {"), 2, ("recipe.yaml is not the recipe",)),
    Attack("Ctrl-C", endless, 0, ("SIGINT: saving and stopping",), saved, during=send(signal.SIGINT)),
    Attack("a terminal that is closed", endless, 0, ("SIGHUP: saving",), saved, during=send(signal.SIGHUP)),
    Attack(
        "a batch system that sends SIGTERM and SIGHUP", endless, 0, ("SIGTERM: saving",), saved,
        during=send(signal.SIGTERM, signal.SIGHUP),
    ),
    Attack("Ctrl-C with two processes", endless, 0, ("saving",), saved, during=send(signal.SIGINT), world=2),
    Attack(
        "Ctrl-C with a launcher that sends it on", endless, 0, ("saving",), saved,
        during=send(signal.SIGINT, signal.SIGINT), world=2,
    ),
    Attack("an output_dir that is a file", _in_the_way(lambda f: _mine(f / "run")), 2, ("is a file",), _kept("run")),
    Attack(
        "an output_dir that is a link to nothing", _in_the_way(lambda f: (f / "run").symlink_to(f / "nowhere")), 2,
        ("is a link to",),
    ),
    Attack(
        "a folder of the user's where the model will be", _in_the_way(lambda f: _mine(f / "run/model/notes.txt")), 2,
        ("model is there", "move it away"), _kept("run/model/notes.txt"),
    ),
    Attack("a study of two recipes of one name", _study("x/a.yaml", "y/a.yaml"), 2, ("same name", "rename")),
    Attack("a study of a recipe whose name is in colours", _study("\x1b[31m.yaml"), 2, ("rename the file",)),
    Attack("a study of a recipe called model", _study("model.yaml"), 2, ("rename the file",)),
    Attack(
        "a study in a folder with a model of the user's", _study("a.yaml", prepare=lambda f: _mine(f / "out/model/m")),
        2,
        ("out holds model, which no study wrote",), _kept("out/model/m"),
    ),
    Attack(
        "a study in a folder with figures of the user's",
        _study("a.yaml", prepare=lambda f: _mine(f / "out/figures/m")), 2,
        ("out holds figures, which no study wrote",), _kept("out/figures/m"),
    ),
    Attack(
        "a study in the folder of its recipes",
        _study("out/a.yaml"), 2, ("out holds a.yaml, which no study wrote",),
    ),
    Attack(
        "a study in a run directory",
        _study("a.yaml", prepare=lambda f: _mine(f / "out/recipe.yaml")), 2, ("out holds",),
    ),
    Attack(
        "a study in a file",
        _study("a.yaml", prepare=lambda f: _mine(f / "out")), 2, ("out is a file",), _kept("out"),
    ),
    Attack(
        "a study whose terminal is closed", _study("a.yaml", "b c.yaml", minutes="2"), 128 + signal.SIGHUP,
        ("the runs have saved",),
        no_run_is_left, during=_told(signal.SIGHUP), megabytes=4000,
    ),
    Attack(
        "Ctrl-C twice on a study", _study("a.yaml", "ä.yaml", minutes="2"), 130,
        ("once more to end at once", "ended before"),
        no_run_is_left, during=_told(signal.SIGINT, signal.SIGINT), megabytes=4000,
    ),
    Attack(
        "a study with a run that fails", _study("a.yaml", prepare=lambda f: shutil.rmtree(f / "data")), 2,
        ("the run of a ended with exit code 2: ", "its output is in out/a.log"), no_run_is_left,
        megabytes=4000,
    ),
    Attack(
        "an export over notes of the user's",
        _export("notes.txt"), 2, ("out holds notes.txt",), _kept("out/notes.txt"),
    ),
    Attack(
        "an export over a folder of the user's",
        _export("x/notes.txt"), 2, ("out holds x",), _kept("out/x/notes.txt"),
    ),
    Attack("an export over another config.json", _export("config.json"), 2, ("out",), _kept("out/config.json")),
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)
