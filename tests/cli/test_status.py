"""`flipscale status` on a run directory in every state."""

import dataclasses
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flipscale.cli import main
from flipscale.cli.status import as_table, read_status
from flipscale.evaluation.results import Result, append_results
from flipscale.process.lock import FolderLock
from flipscale.records.run_directory import environment

NOW = 1_700_000_000.0
RECORD = {
    "step": 40, "samples_seen": 4000, "trained_seconds": 50.0, "loss": 2.5, "lr": 1e-3, "stage": "masked",
    "images_per_s": 100.0, "mfu": 0.41, "data_wait_share": 0.02, "peak_memory_bytes": 2**30,
    "num_replaced": 3, "replaced/undecodable": 3, "num_skipped": 1, "num_slow": 0,
}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 100 steps of 100 pairs in the middle of its second start, its last sign 5 s old."""
    stages = [{"name": "masked", "samples": 10_000, "mask_ratio": 0.5, "base_lr": 0.1}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"data": {"global_batch_size": 100}, "stages": stages}))
    evaluated = {"step": 20, "samples_seen": 2000, "trained_seconds": 20.0, "zero_shot/top1": 31.5}
    lines = [json.dumps(record) + "\n" for record in (RECORD, evaluated, RECORD)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4')
    append_results(tmp_path, [Result("zero_shot", "zero_shot", "top1", 31.5)], 20, 2000, 20.0)
    starts = [{"time": NOW - age, "step": 0, "num_processes": 8} for age in (5000.0, 90.0)]
    (tmp_path / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    for step in (10, 30):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/crashes").write_text("start job 1\n")
    beat(tmp_path, age=5.0)
    return tmp_path


def beat(run_dir: Path, age: float, phase: str = "training", step_s: float | None = 1.0) -> None:
    sign = {"time": NOW - age, "step": 45, "phase": phase, "step_s": step_s}
    (run_dir / "heartbeat.json").write_text(json.dumps(sign))


def test_a_running_run(run_dir: Path) -> None:
    beat(run_dir, age=100.0)  # before the last start
    assert read_status(run_dir, NOW)["state"] == "starting"
    beat(run_dir, age=5.0)
    status = read_status(run_dir, NOW)
    assert status["state"] == "running"
    assert (status["samples_seen"], status["total_samples"]) == (4500, 10_000)
    assert status["seconds_left"] == 55.0
    assert status["checkpoint_samples"] == 3000
    assert (status["num_starts"], status["num_crashes"], status["seconds_since_start"]) == (2, 1, 90.0)
    assert (status["num_bad_samples"], status["num_skipped_steps"]) == (6, 2)
    assert status["metrics"] == {"zero_shot/top1": 31.5}


@pytest.mark.parametrize(
    ("age", "phase", "step_s", "state"),
    [
        (119.0, "training", 1.0, "running"),
        (121.0, "training", 1.0, "dead"),
        (121.0, "training", 60.0, "running"),
        (1200.0, "evaluating or saving", 1.0, "running"),
        (10.0, "ended", 1.0, "stopped"),
        (1.0, "failed", 1.0, "dead"),
    ],
)
def test_states(run_dir: Path, age: float, phase: str, step_s: float, state: str) -> None:
    (run_dir / "starts.jsonl").unlink()
    beat(run_dir, age, phase, step_s)
    assert read_status(run_dir, NOW)["state"] == state


def test_a_clock_that_went_back(run_dir: Path) -> None:
    status = read_status(run_dir, NOW - 86_400)
    assert status["state"] == "running"
    assert (status["seconds_since_last_sign"], status["seconds_since_start"]) == (0.0, 0.0)
    assert status["checkpoint_age_seconds"] == 0.0


@pytest.mark.parametrize(
    ("holder", "age", "state", "has_process"),
    [
        ({}, 5.0, "running", True),
        ({"started": "1"}, 5.0, "dead", False),  # another process has its number
        ({"machine": "another", "host": "far"}, 5.0, "running", None),
        ({"machine": "another", "host": "far"}, 200.0, "dead", None),
    ],
)
def test_the_process_that_holds_the_lock(
    run_dir: Path, holder: dict[str, str], age: float, state: str, has_process: bool | None
) -> None:
    """One that was killed on this machine is seen at once, and one of another machine is judged by its signs."""
    (run_dir / "starts.jsonl").unlink()
    held = dataclasses.asdict(FolderLock(run_dir / "run.lock", "trains").holder)
    (run_dir / "run.lock").write_text(json.dumps({**held, **holder}))
    beat(run_dir, age)
    status = read_status(run_dir, NOW)
    assert (status["state"], status["has_process"]) == (state, has_process)


def test_watching_prints_a_line_for_each_look_and_the_table_at_the_end(
    run_dir: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / "environment.json").write_text('{"command": "flipscale pretrain --config demo"}')
    monkeypatch.setattr("time.time", lambda: NOW)
    looks = iter([lambda: None, lambda: beat(run_dir, age=0.0, phase="failed")])
    monkeypatch.setattr("time.sleep", lambda seconds: next(looks)())
    main(["status", str(run_dir), "--watch"])
    first, second, *table = capsys.readouterr().out.splitlines()
    assert first == second
    assert first.startswith(f"{run_dir}: running, 4,500 of 10,000 pairs (45.0%), loss 2.5000, 100 images/s")
    assert table[0] == str(run_dir)
    assert "no process; the same command resumes from 3,000 pairs: flipscale pretrain --config demo" in table[1]


def test_a_run_of_a_batch_script_names_its_job(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can type the command that the script ran."""
    monkeypatch.setenv("FLIPSCALE_STOP_FILE", str(run_dir / "slurm/7.0.stop"))
    (run_dir / "environment.json").write_text(json.dumps(environment()))
    start = {"time": NOW - 90.0, "step": 0, "num_processes": 8, "slurm_job": "7"}
    (run_dir / "starts.jsonl").write_text(json.dumps(start) + "\n")
    beat(run_dir, age=5.0, phase="ended")
    status = read_status(run_dir, NOW)
    assert (status["command"], status["slurm_job"]) == (None, "7")
    assert "Slurm job 7 resumes by itself, from 3,000 pairs" in as_table(status)


def test_watching_redraws_a_terminal(run_dir: Path) -> None:
    beat(run_dir, age=1.0, phase="ended")
    ours, terminal = pty.openpty()
    subprocess.run([sys.executable, "-m", "flipscale.cli", "status", run_dir, "--watch"], stdout=terminal, check=True)
    os.close(terminal)
    assert os.read(ours, 1 << 16).startswith(f"\033[H\033[J{run_dir}\r\n  state           stopped ".encode())
    os.close(ours)
