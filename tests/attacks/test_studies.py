"""Attacks by study files and by the files they name, all refused before training except for one unforeseeable arm."""

import shutil
from pathlib import Path
from typing import Any

import yaml
from attacks import ground
from attacks.attack import Attack, Ended, Make, later, refused, test_of
from attacks.changes import kept, text

from flipscale.studies.design import write_plan

MASKED = {"name": "masked", "samples": 96, "mask_ratio": 0.75, "base_lr": 0.012, "warmup_samples": 16}


def study_file(folder: Path, **fields: Any) -> Path:
    ground.shards(folder)
    file = folder / "odd.yaml"
    file.write_text(yaml.safe_dump({"base": str(ground.recipe(folder)), **fields}))
    return file


def plan(**fields: Any) -> Make:
    """A study with these fields."""
    return lambda folder: ["study", "plan", study_file(folder, **fields), "--output_dir", "out"]


def level(path: str, value: Any) -> Make:
    """A study with one axis of one level, which changes this field."""
    return plan(axes={"axis": {"level": {path: value}}})


def undefined_alias(folder: Path) -> list[str]:
    (folder / "odd.yaml").write_text("a: &a [1, 2]\nbase: [*a, *b]\n")
    return ["study", "plan", "odd.yaml"]


@later
def race(folder: Path, *stages: dict[str, Any]) -> list[str]:
    """A race against a recipe of these stages."""
    ground.shards(folder)
    good = ground.recipe(folder).rename(folder / "good.yaml")
    odd = ground.recipe(folder, stages=list(stages)).rename(folder / "odd.yaml")
    return ["study", "race", str(good), str(odd), "--minutes", "0.05", "--output_dir", "out"]


@later
def with_levels(folder: Path, content: str) -> list[str]:
    """A race with a file of baselines."""
    text("levels.jsonl", content)(folder)
    return [*race(MASKED)(folder), "--baselines", "levels.jsonl"]


@later
def broken_mark(folder: Path, content: str) -> list[str]:
    """A race in a folder whose study.json somebody has changed."""
    text("out/study.json", content)(folder)
    return race(MASKED)(folder)


def others_in_the_model(folder: Path) -> list[str]:
    """A race in a folder whose model has a file of its user's."""
    text("out/study.json", '{"recipes": ["good", "odd"], "minutes": 0.05, "seeds": 1}')(folder)
    shutil.copytree(ground.trained_model(), folder / "out/model")
    (folder / "out/model/notes.txt").write_text("mine")
    return race(MASKED)(folder)


def changed_since(folder: Path) -> list[str]:
    """A planned study whose file now has another length."""
    levels = {"long": {"stages.0.samples": 192}}
    write_plan(study_file(folder, axes={"length": levels}), folder / "out")
    levels["long"]["stages.0.samples"] = 320
    content = {**yaml.safe_load((folder / "odd.yaml").read_text()), "axes": {"length": levels}}
    (folder / "odd.yaml").write_text(yaml.safe_dump(content))
    return ["study", "plan", "odd.yaml", "--output_dir", "out"]


def arm_without_data(folder: Path) -> list[str]:
    write_plan(study_file(folder, axes={"data": {"gone": {"data.shards": str(folder / "gone")}}}), folder / "out")
    return ["study", "run", "out"]


def other_arm_is_done(folder: Path, ended: Ended) -> None:
    assert (folder / "out/runs/base-seed0/DONE").exists()
    assert "gone-seed0: ended with exit code 2" in ended.stdout


def plans_nothing(folder: Path, ended: Ended) -> None:
    assert not list(folder.glob("out/runs/*/"))


def row(name: str, make: Make, *says: str) -> Attack:
    return refused(name, make, *says, check=plans_nothing)


LEVEL = '{"task": "other", "kind": "zero_shot", "metric": "top1", "value": 44, "who": "nearest image"}'
GRID = {f"a{n}": {f"l{n}{m}": {"seed": m} for m in range(9)} for n in range(12)}
ATTACKS = [
    row("an axis of nothing", level("model.sise", "b16"), "axes.axis.level", "model.sise"),
    row("an axis of a whole section", level("data", 3), "axes.axis.level", "data"),
    row("an axis of seeds", level("seed", 3), "axes.axis.level", "seed"),
    row("a budget of 0", level("budget_minutes", 0), "level-seed0", "budget_minutes is 0.0"),
    row("0 minutes", plan(minutes=0), "minutes is 0"),
    row("more than all data", level("data.fraction", 1.5), "level-seed0", "data.fraction is 1.5"),
    row("a word for a batch", level("data.global_batch_size", "big"), "data.global_batch_size", "big"),
    row("an arm that cannot be run", level("model.vision_config.hidden_size", 33), "level-seed0", "hidden_size 33"),
    row("a stage of another name", level("stages.whole.base_lr", 1.0), "axes.axis.level", "whole", "masked"),
    row("a warm-up longer than its stage", level("stages.0.warmup_samples", 320), "level-seed0", "320", "96"),
    row("two runs of one name", plan(seeds=[1, 1]), "base-seed1"),
    row("a grid of 10^12 runs", plan(design="grid", axes=GRID), "1,000,000,000,000"),
    row("an alias of nothing", undefined_alias, "*b"),
    row("a file that changed since it was planned", changed_since, "320"),
    row("a race with a warm-up longer than its stage", race({**MASKED, "warmup_samples": 900}), "odd", "900", "96"),
    row(
        "a race with a stage too short for a share of the time",
        race({**MASKED, "samples": 10**9}, {"name": "tuned", "samples": 16}), "odd", "'tuned'", "16",
    ),
    refused("a race over a user's file", others_in_the_model, "notes.txt", check=kept("out/model/notes.txt")),
    row("a race's mark that is cut short", broken_mark('{"recipes": ["go'), "study.json"),
    row("a race's mark of no fields", broken_mark("{}"), "study.json", "recipes is None"),
    row("a race's mark with words for seeds", broken_mark('{"recipes": [], "seeds": "two"}'), "seeds is 'two'"),
    row("a race's mark of deep lists", broken_mark("[" * 20_000), "study.json"),
    row("a race with baselines of nothing", with_levels("[]"), "--baselines is levels.jsonl"),
    row("a race with baselines of another task", with_levels(LEVEL), "levels.jsonl", "'other'", "good.yaml"),
    Attack(
        "an arm whose data is not there", arm_without_data, 1, ("1 of 2 runs", "gone-seed0"), other_arm_is_done,
        long=True,
    ),
]  # fmt: skip

test_attack = test_of(ATTACKS)
