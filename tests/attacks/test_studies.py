"""Attacks by files of studies and by what they name: all is refused before anything is trained, but for an arm that
nobody can know to fail."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from attacks import ground
from attacks.attack import Attack, Ended, hold

from flipscale.studies.design import write_plan

Make = Callable[[Path], list[str]]
MASKED = {"name": "masked", "samples": 96, "mask_ratio": 0.75, "base_lr": 0.012, "warmup_samples": 16}


def _file(folder: Path, **fields: Any) -> Path:
    ground.shards(folder)
    file = folder / "odd.yaml"
    file.write_text(yaml.safe_dump({"base": str(ground.recipe(folder)), **fields}))
    return file


def _plan(**fields: Any) -> Make:
    """A study with these fields."""

    def make(folder: Path) -> list[str]:
        return ["study", "plan", str(_file(folder, **fields)), "--output_dir", "out"]

    return make


def _level(path: str, value: Any) -> Make:
    """A study with one axis, whose one level changes this."""
    return _plan(axes={"axis": {"level": {path: value}}})


def _text(text: str) -> Make:
    def make(folder: Path) -> list[str]:
        (folder / "odd.yaml").write_text(text)
        return ["study", "plan", "odd.yaml"]

    return make


def _race(*stages: dict[str, Any]) -> Make:
    """A race against a recipe of these stages."""

    def make(folder: Path) -> list[str]:
        ground.shards(folder)
        good = ground.recipe(folder).rename(folder / "good.yaml")
        odd = ground.recipe(folder, stages=list(stages)).rename(folder / "odd.yaml")
        return ["study", "race", str(good), str(odd), "--minutes", "0.05", "--output_dir", "out"]

    return make


def _changed_since(folder: Path) -> list[str]:
    """A planned study whose file says another length now."""
    levels = {"long": {"stages.0.samples": 192}}
    write_plan(_file(folder, axes={"length": levels}), folder / "out")
    levels["long"]["stages.0.samples"] = 320
    content = {**yaml.safe_load((folder / "odd.yaml").read_text()), "axes": {"length": levels}}
    (folder / "odd.yaml").write_text(yaml.safe_dump(content))
    return ["study", "plan", "odd.yaml", "--output_dir", "out"]


def _arm_without_data(folder: Path) -> list[str]:
    write_plan(_file(folder, axes={"data": {"gone": {"data.shards": str(folder / "gone")}}}), folder / "out")
    return ["study", "run", "out"]


def _the_other_is_done(folder: Path, ended: Ended) -> None:
    assert (folder / "out/runs/base-seed0/DONE").exists()
    assert "gone-seed0: ended with exit code 2: no shards at" in ended.stdout


def _nothing_planned(folder: Path, ended: Ended) -> None:
    assert not list(folder.glob("out/runs/*/"))


def _refused(name: str, make: Make, *says: str) -> Attack:
    return Attack(name, make, 2, says, _nothing_planned)


ATTACKS = [
    _refused(
        "an axis of nothing", _level("model.sise", "b16"), "axes.axis.level: model.sise is no field of the recipe"
    ),
    _refused("an axis of a whole section", _level("data", 3), "axes.axis.level: data is a whole section of the recipe"),
    _refused(
        "an axis of seeds", _level("seed", 3), "axes.axis.level: seed is the study's own; list the seeds in seeds"
    ),
    _refused(
        "a budget of 0", _level("budget_minutes", 0), "run level-seed0: budget_minutes is 0.0; it must be above 0"
    ),
    _refused("0 minutes", _plan(minutes=0), "minutes is 0; it must be above 0"),
    _refused(
        "more than all data", _level("data.fraction", 1.5), "run level-seed0: data.fraction is 1.5; it must be abo"
    ),
    _refused(
        "a word for a batch", _level("data.global_batch_size", "big"), "data.global_batch_size is big; it must be a"
    ),
    _refused(
        "an arm that cannot be run",
        _level("model.vision_config.hidden_size", 33),
        "run level-seed0: model: vision_config: hidden_size 33 is not divisible by num_attention_heads 2",
    ),
    _refused(
        "a warm-up longer than its stage",
        _level("stages.0.warmup_samples", 320),
        "run level-seed0: stage 'masked': a warm-up of 320 samples is not shorter than its schedule of 96",
    ),
    _refused("two runs of one name", _plan(seeds=[1, 1]), "two runs are called base-seed1; give each level a name of"),
    _refused(
        "a grid of 10^12 runs",
        _plan(design="grid", axes={f"a{n}": {f"l{n}{m}": {"seed": m} for m in range(9)} for n in range(12)}),
        "the grid has 1,000,000,000,000 runs, more than 10,000; give it fewer axes or a star",
    ),
    _refused("an alias of nothing", _text("a: &a [1, 2]\nbase: [*a, *b]\n"), "uses *b, which is not defined"),
    _refused("a file that changed since it was planned", _changed_since, "was planned otherwise than", "320"),
    _refused(
        "a race with a warm-up longer than its stage",
        _race({**MASKED, "warmup_samples": 900}),
        "odd: stage 'masked': a warm-up of 900 samples is not shorter than its schedule of 96",
    ),
    _refused(
        "a race with a stage too short for a share of the time",
        _race({**MASKED, "samples": 10**9}, {"name": "tuned", "samples": 16}),
        "odd: stage 'tuned': 16 samples have no share of the time beside the others'; give it more",
    ),
    Attack(
        "an arm whose data is not there",
        _arm_without_data,
        1,
        ("1 of 2 runs failed: gone-seed0; the others are done, and the same command tries these again",),
        _the_other_is_done,
    ),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)
