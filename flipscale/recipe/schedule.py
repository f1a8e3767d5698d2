"""The stage and the learning rate of every step, as functions of its position in the run.

The position is the step's number or, in a run with a time budget, the used share of the budget.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flipscale.io.errors import UserError
from flipscale.recipe.optim import StageRecipe

COOLDOWNS = ("cooldown", "linear_cooldown")


@dataclass(frozen=True, kw_only=True)
class Stage(StageRecipe):
    """A stage in positions: step numbers or, in a run with a time budget, used shares of the budget.

    Args:
        first, last: range of positions [first, last) of the stage.
        schedule_first, schedule_last: range of positions of its learning-rate schedule, which stages may share.
        warmup: length of the linear warm-up at the start of the schedule.
        shape: the `StageRecipe.schedule` that sets the rate after the warm-up.
        fall_first: position from which the rate falls, to 0 at `schedule_last`; not used if it is constant.
        peak_lr: learning rate of the whole batch after the warm-up.
    """

    first: float
    last: float
    schedule_first: float
    schedule_last: float
    warmup: float
    shape: str
    fall_first: float
    peak_lr: float

    def learning_rate(self, position: float) -> float:
        """Return the learning rate at a position: linear from 0 over the warm-up, then by the stage's shape."""
        if (started := position - self.schedule_first) < self.warmup:
            return self.peak_lr * started / self.warmup
        if self.shape == "constant":
            return self.peak_lr
        fallen, length = position - self.fall_first, self.schedule_last - self.fall_first
        if self.shape == "cosine":
            return self.peak_lr * 0.5 * (1.0 + math.cos(math.pi * fallen / length))
        return self.peak_lr * max(1.0 - (fallen / length) ** (0.5 if self.shape == "cooldown" else 1.0), 0.0)


@dataclass(frozen=True)
class Step:
    """A step of the run, or the point after its last step.

    Args:
        number: step index, from 0; also the number of steps taken before it.
        position: position in the schedule.
        before: position of the step before.
        stage: stage of the position; the last stage after the last step.
        is_over: whether the run ended before this step.
    """

    number: int
    position: float
    before: float
    stage: Stage
    is_over: bool = False

    @property
    def learning_rate(self) -> float:
        return self.stage.learning_rate(self.position)

    @property
    def resets_optimizer(self) -> bool:
        """Whether a schedule begins, at which the optimisers drop their moments."""
        return not self.is_over and self.before < self.stage.schedule_first <= self.position


class BudgetProgress(NamedTuple):
    """Use of the time budget, by the main process's clock.

    Args:
        step: index of the step in which the processes agreed on it.
        share: share of the budget used after that step.
        step_share: share of the budget that a step takes.
    """

    step: int
    share: float
    step_share: float


@dataclass(frozen=True)
class Schedule:
    """Stages of the whole run, and its optional time budget.

    With a budget, a step's position is the share of the budget used in the middle of the step. Evaluations and saves
    use none. The main process's clock counts; all processes learn it with the loss, a step or two later. They compute
    the position from the last known share and the steps since then, so all get the same one. It never goes back.
    """

    stages: tuple[Stage, ...]
    budget_seconds: float | None = None

    def step(self, number: int, position: float, before: float) -> Step:
        return Step(number, position, before, stage_of(self.stages, position), position >= self.stages[-1].last)

    def first(self, state: Mapping[str, Any]) -> Step:
        """Return the first step after a checkpoint with this state; empty for a fresh start."""
        number = state.get("step", 0)
        if self.budget_seconds is None:
            return self.step(number, number, number - 1)
        return self.step(number, state.get("budget_used", 0.0), state.get("budget_before", -1.0))

    def last_evaluated(self, state: Mapping[str, Any]) -> int:
        """Return the last step whose evaluations a start with this state keeps. Those at its own step run again if a
        stop left them, or if they are those before the first step or at the end."""
        first = self.first(state)
        runs_again = first.number == 0 or first.is_over or bool(state.get("evaluations_left"))
        return first.number - runs_again

    def after(self, step: Step, progress: BudgetProgress | None) -> Step:
        """Return the next step, by the last agreed progress; None without a budget."""
        number = step.number + 1
        if progress is None:
            return self.step(number, number, step.position)
        position = progress.share + (number - progress.step - 0.5) * progress.step_share
        return self.step(number, max(step.position, position), step.position)

    def state(self, step: Step) -> dict[str, float]:
        """Return the schedule's part of the state of a checkpoint before a step."""
        return {} if self.budget_seconds is None else {"budget_before": step.before, "budget_used": step.position}

    @property
    def total_steps(self) -> int | None:
        """Number of steps of the run; None with a budget."""
        return int(self.stages[-1].last) if self.budget_seconds is None else None

    def ends_hundredth(self, step: Step) -> bool:
        """Return whether a step ends a hundredth of the run; true of all steps if there are fewer than a hundred."""
        if self.total_steps is None:
            return has_passed(step.before, step.position, 0.01)
        return is_due(step.number + 1, 100, self.total_steps)

    def seconds_left(self, number: int, position: float, step_seconds: float, pair_flops: Mapping[str, int]) -> float:
        """Return the time to the end of the run after `number` steps, by the operations of a pair in each stage.

        Args:
            position: newest known position.
            step_seconds: duration of the last step.
            pair_flops: operations by the stage's name.
        """
        if self.budget_seconds is not None:
            return max(1.0 - position, 0.0) * self.budget_seconds
        measured = pair_flops[stage_of(self.stages, number - 1).name]
        left = ((stage.name, stage.last - max(stage.first, number)) for stage in self.stages)
        return sum(step_seconds * pair_flops[name] / measured * steps for name, steps in left if steps > 0)

    def words(self, number: int, position: float) -> str:
        """Return how far the run is after `number` steps at a position, such as `step 5 of 20 (25.0%)`."""
        if self.budget_seconds is not None:
            return f"step {number:,} ({min(position, 1.0):.1%} of {self.budget_seconds / 60:g} min)"
        total = int(self.stages[-1].last)
        return f"step {number:,} of {total:,} ({number / total:.1%})"


class Clock:
    """The next step of a run; the loop advances it."""

    def __init__(self, schedule: Schedule, state: Mapping[str, Any]):
        """Start after a checkpoint with this state; empty for a fresh start."""
        self.schedule = schedule
        self.step = schedule.first(state)

    def advance(self, progress: BudgetProgress | None) -> Step:
        self.step = self.schedule.after(self.step, progress)
        return self.step


def stage_of(stages: Sequence[Stage], position: float) -> Stage:
    """Return the stage of a position, the last stage at the end of the run."""
    return next((stage for stage in stages if position < stage.last), stages[-1])


def is_due(num_steps: int, step_samples: int, every_samples: int) -> bool:
    """Return whether the last of `num_steps` steps reached a multiple of `every_samples`; never for 0."""
    samples = num_steps * step_samples
    return every_samples > 0 and samples // every_samples > (samples - step_samples) // every_samples


def has_passed(before: float, position: float, every_share: float) -> bool:
    """Return whether a multiple of a share lies between two positions; never for 0."""
    return every_share > 0 and math.floor(position / every_share) > math.floor(max(before, 0.0) / every_share)


def schedule_stages(stages: Sequence[StageRecipe], global_batch_size: int, minutes: float | None = None) -> list[Stage]:
    """Return the stages in positions: in steps or, with a budget of minutes, in shares of it. Raise UserError if they
    lack a length or the first a learning rate; `recipe.rules` has the other rules."""
    if not stages or stages[0].base_lr is None:
        raise UserError("stages[0].base_lr is missing; the first stage needs a learning rate per 256 samples")
    is_timed = minutes is not None
    ends: list[float] = [0]
    for stage in stages:
        if (length := stage.share if is_timed else stage.samples) is None:
            raise UserError(f"stage {stage.name!r} has no {'share' if is_timed else 'samples'}; set it")
        ends.append(ends[-1] + length if is_timed else int(ends[-1] + length // global_batch_size))
    if is_timed:
        ends[-1] = 1.0
    planned: list[Stage] = []
    for number, stage in enumerate(stages):
        if stage.base_lr is not None:
            end = next((n for n in range(number + 1, len(stages)) if stages[n].base_lr is not None), len(stages))
            schedule_first, schedule_last = ends[number], ends[end]
            warmup = stage.warmup_share if is_timed else stage.warmup_samples // global_batch_size
            peak_lr = stage.base_lr * global_batch_size / 256
            shape, fall_first = stage.schedule or "cosine", schedule_first + warmup
        elif stage.schedule is not None:
            shape, fall_first = stage.schedule, ends[number]
        schedule = {"schedule_first": schedule_first, "schedule_last": schedule_last, "warmup": warmup, "shape": shape}
        times: dict[str, Any] = {"first": ends[number], "last": ends[number + 1], "fall_first": fall_first, **schedule}
        planned.append(Stage(**vars(stage), **times, peak_lr=peak_lr))
    return planned
