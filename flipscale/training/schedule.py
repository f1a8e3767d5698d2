"""Stages: the mask and the learning rate of every step, as pure functions of the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flipscale.files.ranges import NotNegative, Samples, SamplesOrNone, ShareBelowAll, check_ranges


@dataclass(frozen=True)
class StageRecipe:
    """One stretch of the run. The paper's recipe is two: masked pre-training, then unmasked tuning.

    Args:
        name: The name of the stage in the log; no two stages of a run share one.
        samples: How many pairs it sees, rounded down to whole steps.
        mask_ratio: The fraction of the patches that is removed; at 0 the images are seen whole, once.
        text_mask_ratio: The fraction of the caption's tokens that is removed, padding counted.
        base_lr: The peak learning rate for 256 samples of batch: a schedule (warm-up, then cosine to 0) of its own,
            with a fresh optimiser, as the original's tuning has it. Leave it out and the schedule and optimiser of the
            stage before go on through this one.
        warmup_samples: How many samples of linear warm-up the schedule begins with.
    """

    name: str
    samples: Samples
    mask_ratio: ShareBelowAll = 0.0
    base_lr: NotNegative | None = None
    warmup_samples: SamplesOrNone = 0
    text_mask_ratio: ShareBelowAll = 0.0


@dataclass(frozen=True)
class Stage:
    """A stage in steps.

    Args:
        name: the recipe's name of it.
        mask_ratio: fraction of the patches removed.
        first_step, last_step: it has the steps [first_step, last_step) of the run.
        schedule_first, schedule_last: its learning-rate schedule, which several stages may share, has the steps
            [schedule_first, schedule_last).
        warmup_steps: linear warm-up at the start of the schedule.
        peak_lr: the learning rate after the warm-up, of the whole batch.
        text_mask_ratio: fraction of the caption's tokens removed.
    """

    name: str
    mask_ratio: float
    first_step: int
    last_step: int
    schedule_first: int
    schedule_last: int
    warmup_steps: int
    peak_lr: float
    text_mask_ratio: float = 0.0

    def starts_afresh(self, step: int) -> bool:
        """Return whether the optimisers have no moments before `step`: it is the first of its schedule."""
        return step == self.schedule_first

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of `step`: linear from 0 over the warm-up, then a cosine to 0."""
        step -= self.schedule_first
        if step < self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        length = self.schedule_last - self.schedule_first - self.warmup_steps
        return self.peak_lr * 0.5 * (1.0 + math.cos(math.pi * (step - self.warmup_steps) / length))


def stage_of(stages: Sequence[Stage], step: int) -> Stage:
    """Return the stage that `step` is in, the last one at the end of the run."""
    return next((stage for stage in stages if step < stage.last_step), stages[-1])


def is_due(step: int, step_samples: int, every_samples: int) -> bool:
    """Return whether the last of `step` steps of `step_samples` reached a multiple of `every_samples`; never for 0."""
    samples = step * step_samples
    return every_samples > 0 and samples // every_samples > (samples - step_samples) // every_samples


def plan_stages(stages: Sequence[StageRecipe], global_batch_size: int) -> list[Stage]:
    """Return the stages in steps, one after the other.

    Raises:
        ValueError: a number out of its range, no stage, two of one name, a first stage without base_lr, a stage shorter
            than a step, a warm-up as long as its schedule.
    """
    if not stages or stages[0].base_lr is None:
        raise ValueError("stages[0].base_lr is missing; the first stage needs a learning rate per 256 samples")
    check_ranges(list(stages), "stages")
    names = [stage.name for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} stages are named {name!r}; give every stage a name of its own")
    steps = [stage.samples // global_batch_size for stage in stages]
    planned: list[Stage] = []
    for number, stage in enumerate(stages):
        if steps[number] < 1:
            raise ValueError(
                f"stage {stage.name!r}: {stage.samples} samples are less than one step of {global_batch_size} pairs"
            )
        first_step = planned[-1].last_step if planned else 0
        if stage.base_lr is not None:
            followers = next((n for n in range(number + 1, len(stages)) if stages[n].base_lr is not None), len(stages))
            schedule_first, schedule_last = first_step, first_step + sum(steps[number:followers])
            warmup_steps = stage.warmup_samples // global_batch_size
            peak_lr = stage.base_lr * global_batch_size / 256
        elif stage.warmup_samples:
            raise ValueError(f"stage {stage.name!r}: warmup_samples needs a base_lr of its own")
        if warmup_steps >= schedule_last - schedule_first:
            raise ValueError(
                f"stage {stage.name!r}: a warm-up of {stage.warmup_samples} samples is not shorter than its schedule "
                f"of {(schedule_last - schedule_first) * global_batch_size}"
            )
        planned.append(
            Stage(
                stage.name,
                stage.mask_ratio,
                first_step,
                first_step + steps[number],
                schedule_first,
                schedule_last,
                warmup_steps,
                peak_lr,
                stage.text_mask_ratio,
            )
        )
    return planned
