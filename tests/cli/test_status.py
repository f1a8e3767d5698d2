"""`flipscale status` on a run directory in every state, without torch."""

import dataclasses
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flipscale.cli import main
from flipscale.evaluation.results import Result, append_results
from flipscale.io.lock import FolderLock
from flipscale.status import as_table, read_status

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
    assert "-" not in state_row(run_dir)


def lock(run_dir: Path, **about: object) -> None:
    """The lock of this process, or of one that differs."""
    held = dataclasses.asdict(FolderLock(run_dir / "run.lock", "trains").holder)
    (run_dir / "run.lock").write_text(json.dumps({**held, **about}))


def process_state(run_dir: Path) -> tuple[str, bool | None]:
    status = read_status(run_dir, NOW)
    return status["state"], status["has_process"]


def test_a_process_that_was_killed_here_is_seen_at_once(run_dir: Path) -> None:
    lock(run_dir)
    assert process_state(run_dir) == ("running", True)
    lock(run_dir, started="1")  # another process has its number
    assert process_state(run_dir) == ("dead", False)
    (run_dir / "environment.json").write_text('{"command": "flipscale pretrain --config demo"}')
    assert state_row(run_dir) == (
        "no process; the same command resumes from 3,000 pairs: flipscale pretrain --config demo"
    )


def test_a_run_that_failed_has_no_process(run_dir: Path) -> None:
    beat(run_dir, age=1.0, phase="failed")
    assert read_status(run_dir, NOW)["state"] == "dead"
    shutil.rmtree(run_dir / "checkpoints")
    assert state_row(run_dir) == "no process; the same command resumes from the start, because there is no checkpoint"


def test_a_process_of_another_machine_is_judged_by_its_signs(run_dir: Path) -> None:
    (run_dir / "starts.jsonl").unlink()
    lock(run_dir, machine="another", host="far")
    assert process_state(run_dir) == ("running", None)
    beat(run_dir, age=200.0)
    assert process_state(run_dir) == ("dead", None)


@pytest.mark.parametrize("content", [b"", b"\0\xff", None])
def test_a_lock_that_is_none_says_nothing(run_dir: Path, content: bytes | None) -> None:
    if content is None:
        os.mkfifo(run_dir / "run.lock")
    else:
        (run_dir / "run.lock").write_bytes(content)
    status = read_status(run_dir, NOW)
    assert (status["state"], status["has_process"], status["command"]) == ("running", None, None)


def state_row(run_dir: Path) -> str:
    return as_table(read_status(run_dir, NOW)).splitlines()[1].split(maxsplit=1)[1]


def test_watching_prints_a_line_for_each_look_and_the_table_at_the_end(
    run_dir: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock(run_dir)
    monkeypatch.setattr("time.time", lambda: NOW)
    looks = iter([lambda: None, (run_dir / "DONE").touch])
    monkeypatch.setattr("time.sleep", lambda seconds: next(looks)())
    main(["status", str(run_dir), "--watch"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"{run_dir}: running, 4,500 of 10,000 pairs (45.0%), loss 2.5000, 100 images/s, 55 s left"
    ] * 2  # fmt: skip
    assert lines[2:4] == [str(run_dir), "  state           done"]


def test_watching_redraws_a_terminal(run_dir: Path) -> None:
    beat(run_dir, age=1.0, phase="ended")
    ours, terminal = pty.openpty()
    subprocess.run([sys.executable, "-m", "flipscale.cli", "status", run_dir, "--watch"], stdout=terminal, check=True)
    os.close(terminal)
    assert os.read(ours, 1 << 16).startswith(f"\033[H\033[J{run_dir}\r\n  state           stopped ".encode())
    os.close(ours)


def test_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["status", str(tmp_path)])
    assert exit_info.value.code == 2
    assert f"{tmp_path} is not a run directory: it has no recipe.yaml" in capsys.readouterr().err


def test_it_needs_no_torch() -> None:
    code = "import sys, flipscale.status\nassert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
