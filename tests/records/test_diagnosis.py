"""A run that does not learn says why, once, and a run that learns says nothing."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flipscale.recipe.recipe import Recipe
from flipscale.records.diagnosis import Diagnosis
from flipscale.start.complete_recipe import parse_recipe

CHANCE = math.log(16)


@pytest.fixture
def tiny(write_recipe, tmp_path: Path) -> Recipe:
    return parse_recipe(["--config", str(write_recipe(tmp_path / "run"))])


def said(recipe: Recipe, captions: torch.Tensor | None = None, intervals: int = 60, **changes: object) -> list[str]:
    """Return what a run of intervals of 20 steps says; a change is a value or a function of the interval."""
    diagnosis, words = Diagnosis(recipe, CHANCE), []
    ids = torch.arange(128).view(16, 8) if captions is None else captions
    for number in range(intervals):
        record = {"samples_seen": 320 * (number + 1), "lr": 1e-3 * min(1.0, (number + 1) / 5), "grad_norm": 1.0}
        record |= {
            "stage": "masked",
            "loss": 2 * 0.97**number,
            "logit_scale": 14.3,
            "image_spread": 0.5,
            "text_spread": 0.5,
        }
        record |= {name: value(number) if callable(value) else value for name, value in changes.items()}
        diagnosis.look([{"input_ids": ids}])
        words += diagnosis.add(record, is_last=number == intervals - 1)
    return words


def diverging(number: int) -> float:
    return 20.0 if number > 45 else 1.0


def test_a_run_that_learns_says_nothing(tiny: Recipe) -> None:
    assert said(tiny) == []
    assert said(tiny, logit_scale=100.0, loss=lambda number: 1.0 - number / 60) == []
    assert said(tiny, loss=lambda number: CHANCE + 2 - number / 20) == [], "it starts above chance and falls"
    growing = [1.2**number for number in range(60)]
    assert said(tiny, grad_norm=growing.__getitem__) == [], "gradients may grow while the loss falls"
    late = [CHANCE] * 20 + [CHANCE * 0.9**number for number in range(40)]
    leaving = [0.01] * 15 + [0.01 * 2**number for number in range(5)] + [2.0] * 40
    assert said(tiny, loss=late.__getitem__, grad_norm=leaving.__getitem__) == [], "gradients grow at chance's end"
    assert said(tiny, loss=None, grad_norm=None) == [], "skipped steps have a message of their own"


@pytest.mark.parametrize(
    ("cause", "changes"),
    [
        ("the captions may belong to other images", {"loss": CHANCE}),
        ("raise stages.base_lr", {"loss": CHANCE, "lr": 1e-9}),
        ("nearly all images have one embedding; lower stages.base_lr", {"loss": CHANCE, "image_spread": 0.001}),
        ("75% of a batch's captions are one caption", {"loss": CHANCE, "text_spread": 0.0}),
        ("logit_scale is at its bound 100 at a loss of 2.5", {"loss": 2.5, "logit_scale": 99.99}),
        ("the gradient norm grew from 1 to 20; lower", {"loss": 1.0, "grad_norm": diverging}),
    ],
)
def test_each_cause_is_said_once_with_its_field(tiny: Recipe, cause: str, changes: dict) -> None:
    captions = torch.arange(128).view(16, 8)
    captions[:12] = 0
    (words,) = said(tiny, captions if cause.startswith("75%") else None, **changes)
    assert cause in words


@pytest.mark.parametrize(
    ("cause", "intervals", "changes"),
    [
        ("nearly all texts have one embedding; lower stages.base_lr", 2, {"text_spread": 1e-5}),
        ("the captions may belong to other images", 15, {}),
        ("the run has only 40 steps; give its stages more samples", 2, {}),
    ],
)
def test_a_short_run_at_chance_is_judged_at_its_end(tiny: Recipe, cause: str, intervals: int, changes: dict) -> None:
    (words,) = said(tiny, intervals=intervals, loss=CHANCE, **changes)
    assert cause in words
    assert said(tiny, intervals=intervals, **changes) == []


def test_a_temperature_frozen_in_its_stage_is_no_cause(tiny: Recipe) -> None:
    assert len(said(tiny, loss=2.5, logit_scale=100.0)) == 1
    frozen = replace(tiny, stages=[replace(tiny.stages[0], frozen=("logit_scale",)), *tiny.stages[1:]])
    assert said(frozen, loss=2.5, logit_scale=100.0) == []
    assert len(said(frozen, loss=2.5, logit_scale=100.0, stage="unmasked")) == 1
