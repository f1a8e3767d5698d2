"""Stages in steps, and the learning rate of each."""

import math

import pytest

from flipscale.recipe.optim import StageRecipe
from flipscale.recipe.schedule import Schedule, schedule_stages


def test_the_paper_s_run() -> None:
    """1.024e-3 at a batch of 65,536; tuning starts a schedule and an optimiser of its own."""
    stages = [
        StageRecipe("masked", 12_800_000_000, 0.5, 4e-6, 51_200_000),
        StageRecipe("tuning", 128_000_000, 0.0, 4e-8, 25_600_000),
    ]
    masked, tuning = schedule_stages(stages, 65536)
    assert masked.peak_lr == pytest.approx(1.024e-3)
    assert tuning.peak_lr == pytest.approx(1.024e-5)
    assert (masked.last, tuning.first, tuning.last) == (195312, 195312, 195312 + 1953)
    assert masked.warmup == 781
    assert masked.learning_rate(0) == 0.0
    assert masked.learning_rate(781) == pytest.approx(1.024e-3)
    assert masked.learning_rate(195311) < 1e-12
    schedule = Schedule((masked, tuning))
    assert [schedule.step(n, n, n - 1).resets_optimizer for n in (0, 1, 195311, 195312)] == [True, False, False, True]
    assert tuning.learning_rate(195312) == 0.0


def test_a_stage_without_a_rate_goes_on_under_the_schedule_before() -> None:
    stages = [StageRecipe("a", 100, 0.75, 0.256, 20), StageRecipe("b", 60, 0.0), StageRecipe("c", 40, 0.0, 0.0256)]
    a, b, c = schedule_stages(stages, 10)
    assert (b.schedule_first, b.schedule_last) == (a.schedule_first, a.schedule_last) == (0, 16)
    assert [Schedule((a, b, c)).step(n, n, n - 1).resets_optimizer for n in (10, 16)] == [False, True]
    rates = [a.learning_rate(s) for s in range(10)] + [b.learning_rate(s) for s in range(10, 16)]
    assert rates[:3] == pytest.approx([0.0, 0.005, 0.01])
    assert rates[9] == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi * 7 / 14)))
    assert rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True)


def test_a_cooldown_falls_from_a_constant_rate() -> None:
    stages = [
        StageRecipe("trunk", 100, 0.75, 0.256, 20, schedule="constant"),
        StageRecipe("more", 60),
        StageRecipe("cooldown", 30, schedule="cooldown"),
        StageRecipe("unmasked", 10),
    ]
    planned = schedule_stages(stages, 10)
    schedule = Schedule(tuple(planned))
    steps = [schedule.step(n, n, n - 1) for n in range(20)]
    assert [step.resets_optimizer for step in steps] == [True] + [False] * 19
    rates = [step.learning_rate for step in steps]
    assert rates[:3] == pytest.approx([0.0, 0.005, 0.01])
    assert rates[2:16] == [rates[2]] * 14
    assert rates[16:] == pytest.approx([0.01 * (1 - math.sqrt(n / 4)) for n in range(4)])
    linear = schedule_stages([*stages[:2], StageRecipe("c", 40, schedule="linear_cooldown")], 10)[2]
    assert [linear.learning_rate(n) for n in range(16, 21)] == pytest.approx([0.01, 0.0075, 0.005, 0.0025, 0.0])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], r"stages\[0\].base_lr is missing"),
        ([StageRecipe("a", base_lr=1.0)], "stage 'a' has no samples"),
        ([StageRecipe("a", 100)], r"stages\[0\].base_lr is missing"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(stages: list[StageRecipe], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_stages(stages, 10)
