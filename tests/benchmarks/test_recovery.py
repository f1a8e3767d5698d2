"""The parts of a recovery are measured, and add up to the whole."""

from pathlib import Path

import pytest

from benchmarks.recovery import STEPS_A_SAVE, STEPS_BEFORE, Run, under_torchrun


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_killed_rank(write_recipe, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", Path(__file__).parents[2], write_recipe(tmp_path / "unused"))
    parts = under_torchrun(run, "killed")
    assert {"ending", "waiting", "imports", "data", "processes", "checkpoint", "batch", "step"} <= parts.keys()
    whole, cpu, redone = (parts.pop(name) for name in ("all", "cpu", "redone"))
    assert sum(parts.values()) == pytest.approx(whole)
    assert min(parts.values()) > -0.1  # clocks of the boot and of the day
    assert 0.5 < cpu < whole
    assert redone >= STEPS_BEFORE % STEPS_A_SAVE
    assert run.ranks() == {}
