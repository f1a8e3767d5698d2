"""Stages: the mask and the learning rate of every step, as pure functions of its position in the run: the step's number
or, in a run with a time budget, the share of the budget that is used."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flipscale.io.errors import UserError
from flipscale.io.options import (
    NonNegative,
    Pixels,
    Samples,
    SamplesOrZero,
    ShareAboveZero,
    ShareBelowOne,
    check_ranges,
)

# How far from 1 the sum of shares may be: they are written with a few digits.
_MOST_AMISS = 1e-4


@dataclass(frozen=True)
class StageRecipe:
    """One stretch of the run. The paper's recipe is two: masked pre-training, then unmasked tuning.

    Args:
        name: The name of the stage in the log; no two stages of a run share one.
        samples: How many pairs it sees, rounded down to whole steps; left out where the run has a time budget.
        mask_ratio: The fraction of the patches that is removed; at 0 the images are seen whole, once.
        text_mask_ratio: The fraction of the caption's tokens that is removed, padding counted.
        base_lr: The peak learning rate for 256 samples of batch: a schedule (warm-up, then cosine to 0) of its own,
            with a fresh optimiser, as the original's tuning has it. Leave it out and the schedule and optimiser of the
            stage before go on through this one.
        warmup_samples: How many samples of linear warm-up the schedule begins with.
        share: Its share of `budget_minutes`, in place of `samples`; those of all stages add up to 1.
        warmup_share: The share of `budget_minutes` that the warm-up takes, in place of `warmup_samples`.
        image_size: The side in pixels of the images in this stage, a multiple of the patch; left out, the model's own.
            A patch then shows more or less of the picture, and has the position of the place that it shows.
    """

    name: str
    samples: Samples | None = None
    mask_ratio: ShareBelowOne = 0.0
    base_lr: NonNegative | None = None
    warmup_samples: SamplesOrZero = 0
    text_mask_ratio: ShareBelowOne = 0.0
    share: ShareAboveZero | None = None
    warmup_share: ShareBelowOne = 0.0
    image_size: Pixels | None = None


@dataclass(frozen=True)
class Stage:
    """A stage in positions: numbers of steps or, in a run with a time budget, shares of the budget.

    Args:
        name: the recipe's name of it.
        mask_ratio: fraction of the patches removed.
        first, last: it has the positions [first, last) of the run.
        schedule_first, schedule_last: its learning-rate schedule, which several stages may share, has the positions
            [schedule_first, schedule_last).
        warmup: the length of the linear warm-up at the start of the schedule.
        peak_lr: the learning rate after the warm-up, of the whole batch.
        text_mask_ratio: fraction of the caption's tokens removed.
        image_size: in pixels, None for the model's own.
    """

    name: str
    mask_ratio: float
    first: float
    last: float
    schedule_first: float
    schedule_last: float
    warmup: float
    peak_lr: float
    text_mask_ratio: float = 0.0
    image_size: int | None = None

    def starts_afresh(self, before: float, position: float) -> bool:
        """Return whether the optimisers have no moments at `position`, the first of its schedule.

        Args:
            before: the position of the step before.
        """
        return before < self.schedule_first <= position

    def learning_rate(self, position: float) -> float:
        """Return the learning rate at a position: linear from 0 over the warm-up, then a cosine to 0."""
        position -= self.schedule_first
        if position < self.warmup:
            return self.peak_lr * position / self.warmup
        length = self.schedule_last - self.schedule_first - self.warmup
        return self.peak_lr * 0.5 * (1.0 + math.cos(math.pi * (position - self.warmup) / length))


def stage_of(stages: Sequence[Stage], position: float) -> Stage:
    """Return the stage that a position is in, the last one at the end of the run."""
    return next((stage for stage in stages if position < stage.last), stages[-1])


def is_due(step: int, step_samples: int, every_samples: int) -> bool:
    """Return whether the last of `step` steps of `step_samples` reached a multiple of `every_samples`; never for 0."""
    samples = step * step_samples
    return every_samples > 0 and samples // every_samples > (samples - step_samples) // every_samples


def has_passed(before: float, position: float, every_share: float) -> bool:
    """Return whether a multiple of a share of the budget lies between two positions; never for 0."""
    return every_share > 0 and math.floor(position / every_share) > math.floor(before / every_share)


def check_image_sizes(sizes: Mapping[str, int | None], patch_size: int) -> None:
    """Raise unless patches of `patch_size` pixels divide the images of every stage and evaluation.

    Args:
        sizes: in pixels, by what messages call the stage or the evaluation; None for the model's own.

    Raises:
        ValueError: they do not; the message names the stage and both sizes.
    """
    from flipscale.model.configuration_flip import patches_along  # seconds to import

    for name, size in sizes.items():
        try:
            patches_along(patch_size if size is None else size, patch_size)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None


def plan_stages(
    stages: Sequence[StageRecipe], global_batch_size: int, budget_minutes: float | None = None
) -> list[Stage]:
    """Return the stages in positions, one after the other: in steps, or in shares of the budget if there is one.

    Raises:
        ValueError: a number out of its range, no stage, two of one name, a first stage without base_lr, a stage shorter
            than a step, a length in the wrong unit, shares that do not add up, a warm-up as long as its schedule.
    """
    if not stages or stages[0].base_lr is None:
        raise UserError("stages[0].base_lr is missing; the first stage needs a learning rate per 256 samples")
    check_ranges(list(stages), "stages")
    names = [stage.name for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{names.count(name)} stages are named {name!r}; give every stage a name of its own")
    unit, timed = global_batch_size, budget_minutes is not None
    lengths: Sequence[float] = _shares(stages) if timed else _steps(stages, unit)
    ends = [0, *itertools.accumulate(lengths)]
    if timed:
        ends[-1] = 1.0
    planned: list[Stage] = []
    for number, stage in enumerate(stages):
        field = "warmup_share" if timed else "warmup_samples"
        given = getattr(stage, field)
        if stage.base_lr is not None:
            followers = next((n for n in range(number + 1, len(stages)) if stages[n].base_lr is not None), len(stages))
            schedule_first, schedule_last = ends[number], ends[followers]
            warmup = given if timed else given // unit
            peak_lr = stage.base_lr * global_batch_size / 256
        elif given:
            raise UserError(f"stage {stage.name!r}: {field} needs a base_lr of its own")
        if warmup >= (length := schedule_last - schedule_first):
            words = f"{given} of the budget" if timed else f"{given} samples"
            shown = f"{length:g}" if timed else length * unit
            raise UserError(f"stage {stage.name!r}: a warm-up of {words} is not shorter than its schedule of {shown}")
        planned.append(
            Stage(
                stage.name,
                stage.mask_ratio,
                ends[number],
                ends[number + 1],
                schedule_first,
                schedule_last,
                warmup,
                peak_lr,
                stage.text_mask_ratio,
                stage.image_size,
            )
        )
    return planned


def _steps(stages: Sequence[StageRecipe], global_batch_size: int) -> list[int]:
    """Return how many steps each stage of a run without a budget has.

    Raises:
        ValueError: one has none, or says its length as a share.
    """
    for stage in stages:
        if stage.share is not None or stage.warmup_share:
            field = "warmup_share" if stage.share is None else "share"
            raise UserError(
                f"stage {stage.name!r}: {field} is of budget_minutes, which is not set; set that, or give samples"
            )
        if stage.samples is None:
            raise UserError(f"stage {stage.name!r} has no samples; say how many pairs it sees")
        if stage.samples < global_batch_size:
            raise UserError(
                f"stage {stage.name!r}: {stage.samples} samples are less than one step of {global_batch_size} pairs"
            )
    return [(stage.samples or 0) // global_batch_size for stage in stages]


def _shares(stages: Sequence[StageRecipe]) -> list[float]:
    """Return which share of the budget each stage has.

    Raises:
        ValueError: one has none, says its length in samples, or they do not add up to 1.
    """
    for stage in stages:
        if stage.samples is not None or stage.warmup_samples:
            field, instead = ("warmup_samples", "warmup_share") if stage.samples is None else ("samples", "share")
            raise UserError(
                f"stage {stage.name!r}: {field} is a count, and the run ends by its clock (budget_minutes); give its "
                f"{instead} of the budget, or leave out budget_minutes"
            )
        if stage.share is None:
            raise UserError(f"stage {stage.name!r} has no share; say which share of budget_minutes it has")
    shares = [stage.share or 0.0 for stage in stages]
    if abs(sum(shares) - 1.0) > _MOST_AMISS:
        raise UserError(f"the shares of the stages add up to {sum(shares):g}; they must add up to 1")
    return shares
