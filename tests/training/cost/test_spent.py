"""Hours as a cloud bills them: whatever the devices did while they were occupied."""

import json
from pathlib import Path

import pytest

from flipscale.training.cost.energy import Energy
from flipscale.training.cost.recipe import CostRecipe
from flipscale.training.cost.spent import occupied_device_hours, spent

# Eight devices for an hour, killed; a start that died before its first sign; two devices for half an hour.
STARTS = [
    {"time": 10_000.0, "last_sign_before": None, "step": 0, "trained_seconds": 0.0, "num_processes": 8},
    {"time": 20_000.0, "last_sign_before": 13_600.0, "step": 5, "trained_seconds": 600.0, "num_processes": 8},
    {"time": 30_000.0, "last_sign_before": 13_600.0, "step": 5, "trained_seconds": 600.0, "num_processes": 2},
]


def write(run_dir: Path, starts: list[dict], sign: float | None) -> None:
    (run_dir / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    if sign is not None:
        (run_dir / "heartbeat.json").write_text(json.dumps({"time": sign, "step": 9}) + "\n")


def test_every_start_counts_to_its_last_sign(tmp_path: Path) -> None:
    write(tmp_path, STARTS, 31_800.0)
    assert occupied_device_hours(tmp_path) == pytest.approx(9.0)
    cost = CostRecipe(device_hour_dollars=2.0)
    found = spent(STARTS[1:], {"trained_seconds": 1600.0}, Energy(), cost, occupied_device_hours(tmp_path))
    assert (found.device_hours, found.dollars) == (pytest.approx(9.0), pytest.approx(18.0))


def test_where_a_time_is_missing_the_hours_of_training_are_known(tmp_path: Path) -> None:
    assert occupied_device_hours(tmp_path) is None
    write(tmp_path, STARTS, None)
    assert occupied_device_hours(tmp_path) is None
    former = [{name: value for name, value in start.items() if name != "last_sign_before"} for start in STARTS]
    write(tmp_path, former, 31_800.0)
    assert occupied_device_hours(tmp_path) is None
    found = spent([former[0], former[2]], {"trained_seconds": 4200.0}, Energy(), CostRecipe(device_hour_dollars=2.0))
    assert found.device_hours == pytest.approx((600 * 8 + 3600 * 2) / 3600)
