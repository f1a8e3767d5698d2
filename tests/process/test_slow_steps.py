"""The late process is the last at the first collective where arrivals part, by clocks that need not agree."""

import numpy as np
import pytest

from flipscale.process.slow_steps import Parting, PhaseLog, Window, find_parting, slowest_ranks

CLOCKS = np.array([0.0, 7200.0, -3.5])  # one is two hours ahead


def test_the_first_parting_counts() -> None:
    together = np.array([0.1, 0.2, 0.3, 0.4]) + CLOCKS[:, None]
    late = np.array([[0, 0, 0, 2], [0, 0, 0.01, 0], [0, 0, 2, 2.5]])
    assert find_parting(together + late, CLOCKS, 1.0) == Parting(2, 2, pytest.approx(2.0))
    assert find_parting(together, CLOCKS, 1.0) is None


def test_phases_are_counted_within_a_time() -> None:
    phases = PhaseLog()
    entered = [(10, "data"), (20, "forward"), (50, "backward")]
    phases.entries.extend((int(second * 1e9), phase) for second, phase in entered)
    spent = phases.seconds(int(15e9), int(60e9))
    assert {phase: seconds for phase, seconds in spent.items() if seconds} == {
        "data": 5.0,
        "forward": 30.0,
        "backward": 10.0,
    }


def test_pauses_are_no_part_of_a_step() -> None:
    window = Window(3, int(10e9), 0.5, int(20e9), [(int(12e9), int(18e9))])
    assert window.seconds == 4.0
    assert [second for second in range(8, 22) if window.has(int(second * 1e9))] == [10, 11, 18, 19]


def test_a_record_does_not_grow_with_the_world() -> None:
    ranks = [{"rank": rank, "step_s": 2.0 + rank / 1024} for rank in range(1024)]
    assert [rank["rank"] for rank in slowest_ranks({"late_rank": 5, "ranks": ranks})] == [5, *range(1009, 1024)]
