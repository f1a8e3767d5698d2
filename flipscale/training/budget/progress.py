"""Where a run is in its schedule: at which step or, in a run with a time budget, at which share of the budget."""

import statistics
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from flipscale.training.schedule import Stage, stage_of

# The last steps of a stage, whose median says how long the next ones take.
_REMEMBERED = 9


class Progress:
    """Where a run is in a schedule that is counted in steps."""

    def __init__(self, stages: Sequence[Stage], step: int):
        """`step` steps are done."""
        self.stages = stages
        self.step = step
        self._before: float = step - 1
        self._position: float = step

    @property
    def position(self) -> float:
        """Of the step that comes next."""
        return self._position

    @property
    def stage(self) -> Stage:
        """That the next step is in; the last one once the run is over."""
        return stage_of(self.stages, self._position)

    @property
    def is_over(self) -> bool:
        """Whether no step comes next."""
        return self._position >= self.stages[-1].last

    @property
    def starts_afresh(self) -> bool:
        """Whether the optimisers have no moments before the next step."""
        return not self.is_over and self.stage.starts_afresh(self._before, self._position)

    @property
    def last_step(self) -> int:
        """How many steps are done once the stage has ended, as far as that is known."""
        return int(self.stage.last)

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self.stage.learning_rate(self._position)

    def advance(self) -> int:
        """Count a step, and return how many are done."""
        self.step += 1
        self._before, self._position = self._position, self._next()
        return self.step

    def pace(self, trained_seconds: float, is_main: bool) -> list[float]:
        """Return what this process tells the others of its clock, at the end of a step: nothing."""
        return []

    def hear(self, step: int, pace: Sequence[float]) -> None:
        """Take what the processes agreed on in a step of the main process's clock."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, beside the number of steps."""
        return {}

    def seconds_left(self, step: int, step_seconds: float, pair_flops: Mapping[str, int]) -> float:
        """Return how long the steps from `step` on take, those of other stages by their operations.

        Args:
            step_seconds: of the step before.
            pair_flops: the operations of a pair in each stage, by its name.
        """
        measured = pair_flops[stage_of(self.stages, step - 1).name]
        left = ((one.name, one.last - max(one.first, step)) for one in self.stages)
        return sum(step_seconds * pair_flops[name] / measured * steps for name, steps in left if steps > 0)

    def place(self) -> str:
        """Return where the run is."""
        return f"step {self.step:,} of {int(self.stages[-1].last):,}"

    def words(self, step: int) -> str:
        """Return how far the run is after this many steps."""
        total = int(self.stages[-1].last)
        return f"step {step:,} of {total:,} ({step / total:.1%})"

    @property
    def total_steps(self) -> int | None:
        """How many steps the run has, None where the clock decides that."""
        return int(self.stages[-1].last)

    def record(self, step: int, position: float, learning_rate: float) -> list[dict[str, Any]]:
        """Return what is recorded of a step's place in the schedule: nothing where its number says that."""
        return []

    def _next(self) -> float:
        return self.step


class TimedProgress(Progress):
    """Where a run is in a schedule that is a function of the share of its time budget.

    The clock is the main process's, of the seconds that it trained in all its starts, evaluations and saves left out.
    The processes agree on it in every step, with the loss, and hear of it a step or two later. So the position of a
    step is computed from an earlier one's: the share used by then and what the steps in between take, up to the middle
    of the step itself. All processes compute it from the same numbers. It never goes back.
    """

    def __init__(self, stages: Sequence[Stage], step: int, budget_seconds: float, state: Mapping[str, Any]):
        """`state` is of the checkpoint that the run goes on from, if it goes on from one."""
        super().__init__(stages, step)
        self._budget = budget_seconds
        self._before, self._position = state.get("budget_before", -1.0), state.get("budget_used", 0.0)
        # The step that was heard of last, the share that was used after it, and what a step takes of the budget.
        self._heard: tuple[int, float, float] = (step - 1, state.get("trained_seconds", 0.0) / budget_seconds, 0.0)
        self._recent: deque[float] = deque(maxlen=_REMEMBERED)
        self._step_seconds = 0.0
        self._last: float | None = None

    @property
    def last_step(self) -> int:
        """No step is known to be the last."""
        return sys.maxsize

    def advance(self) -> int:
        """Count a step, compute the position of the next, and return how many are done."""
        stage = self.stage
        super().advance()
        if self.stage is not stage:
            # Steps of another length follow; the first of them also waits for its data.
            self._recent.clear()
            self._last = None
        return self.step

    def pace(self, trained_seconds: float, is_main: bool) -> list[float]:
        """Return the shares of the budget that are used, and that a step takes; 0 except in the main process."""
        if self._last is not None:
            self._recent.append(trained_seconds - self._last)
            self._step_seconds = statistics.median_low(self._recent)
        self._last = trained_seconds
        return [trained_seconds / self._budget, self._step_seconds / self._budget] if is_main else [0.0, 0.0]

    def hear(self, step: int, pace: Sequence[float]) -> None:
        """Take the main process's clock at the end of `step`."""
        share, step_share = pace
        self._heard = (step, share, step_share)

    def state(self) -> dict[str, Any]:
        """Return the positions of the last step and the next."""
        return {"budget_before": self._before, "budget_used": self._position}

    def seconds_left(self, step: int, step_seconds: float, pair_flops: Mapping[str, int]) -> float:
        """Return what is left of the budget."""
        return max(1.0 - self._position, 0.0) * self._budget

    def place(self) -> str:
        """Return where the run is."""
        return self.words(self.step)

    @property
    def total_steps(self) -> int | None:
        """None: the clock decides."""
        return None

    def record(self, step: int, position: float, learning_rate: float) -> list[dict[str, Any]]:
        """Return the step, the share of the budget that was used at it, and its learning rate."""
        return [{"step": step, "budget_used": position, "lr": learning_rate}]

    def words(self, step: int) -> str:
        """Return how far the run is after this many steps."""
        return f"step {step:,} ({min(self._position, 1.0):.1%} of {self._budget / 60:g} min)"

    def _next(self) -> float:
        heard, share, step_share = self._heard
        return max(self._position, share + (self.step - heard - 0.5) * step_share)
