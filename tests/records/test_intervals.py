"""The records of a run: by default a hundred of them, and one each half minute of a long run."""

from flipscale.recipe.optim import StageRecipe
from flipscale.recipe.outputs import LogRecipe
from flipscale.recipe.schedule import BudgetProgress, Clock, Schedule, schedule_stages
from flipscale.records.tracking import Intervals


def ended(log: LogRecipe, num_steps: int, *ticks: int, batch_size: int = 16) -> list[int]:
    """Return the numbers of the steps at which an interval of a run ends; half minutes end with the steps `ticks`."""
    schedule = Schedule(tuple(schedule_stages([StageRecipe("only", num_steps * batch_size, base_lr=0.1)], batch_size)))
    clock, intervals, numbers = Clock(schedule, {}), Intervals(log, schedule, batch_size), []
    while not clock.step.is_over:
        if intervals.ends(clock.step, clock.step.number + 1 in ticks):
            numbers.append(clock.step.number + 1)
        clock.advance(None)
    return numbers


def test_each_hundredth_of_a_run_has_a_record() -> None:
    assert ended(LogRecipe(), 1000) == [*range(10, 1001, 10)]
    assert len(ended(LogRecipe(), 12_345)) == 100
    assert ended(LogRecipe(), 7) == [*range(1, 8)], "each step of a short run"


def test_each_half_minute_without_a_hundredth_has_a_record() -> None:
    assert ended(LogRecipe(), 1000, 3, 6, 15, 26) == sorted([3, 6, *range(10, 1001, 10)])


def test_stated_intervals_stay() -> None:
    assert ended(LogRecipe(every_samples=160), 100, 3, 6) == [*range(10, 101, 10)]
    assert ended(LogRecipe(every_samples=0), 100, 3, 6) == []


def test_each_hundredth_of_a_time_budget_has_a_record() -> None:
    stages = schedule_stages([StageRecipe("only", share=1.0, base_lr=0.1)], 16, 10.0)
    schedule = Schedule(tuple(stages), 600.0)
    clock, intervals, count = Clock(schedule, {}), Intervals(LogRecipe(), schedule, 16), 0
    for number in range(1000):
        count += intervals.ends(clock.step, ticked=False)
        clock.advance(BudgetProgress(number, (number + 1) / 1000, 0.001))
    assert count in (99, 100)
