"""A study: a base recipe, axes that change it, the combinations to train, and its folder.

The folder has `study.yaml`, and a recipe `runs/NAME.yaml`, a run directory `runs/NAME/` and output `runs/NAME.log` for
each run. The report is written next to them.
"""

import copy
import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from flipscale.evaluation.presentation.curves import seed_suffix
from flipscale.evaluation.suite import check_image_sizes
from flipscale.io.errors import UserError
from flipscale.io.options import MinutesAboveZero, Seed, check_ranges, parser_message
from flipscale.io.paths import check_writable
from flipscale.io.yaml_text import read_yaml
from flipscale.objectives.build_objective import build_config
from flipscale.planning.budget import with_time_shares
from flipscale.recipe.flags import with_stage_number
from flipscale.recipe.recipe import Recipe, to_yaml
from flipscale.recipe.rules import check_rules
from flipscale.start.complete_recipe import parse_recipe
from flipscale.studies.runs import StudyRun, in_time, write_recipes

STUDY_FILE = "study.yaml"
# The default name of an axis' level without changes.
BASE = "base"
_MOST_RUNS = 10_000
# Fields that the study sets in each recipe, and their place in the study.
_OWN = {"seed": "list the seeds in seeds", "output_dir": "its runs lie in its folder, --output_dir"}
# Mappings whose fields need not be in the recipe.
_OPEN = ("model.vision_config", "model.text_config", "loss.options")

Levels = Mapping[str, str]
Axis = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class MoreSeeds:
    """Further seeds for a part of the combinations, such as the corners of a grid.

    Args:
        of: levels of the part by axis, with `base` for no change; axes left out have all levels.
    """

    seeds: list[Seed]
    of: dict[str, list[str]]


@dataclass(frozen=True)
class Study:
    """A study's file.

    Args:
        base: recipe to change: a name of the package, or a YAML file relative to the study's file.
        axes: levels by axis; a level's changes are values by their path in the recipe, such as `stages.0.samples`. A
            level without changes names the base of its axis.
        design: `star` or `grid`. A star has the base, each level alone, and the last levels of the first two axes, of
            the first three, and so on. A grid has all combinations of levels, with the base of each axis.
        seeds: seeds of every combination.
        minutes: training time of every run by its own clock, shared by its stages. None ends runs as the base does.
        changes: changes of the base in all runs: values by their path in the recipe.
        more_seeds: further seeds for a part of the combinations.
    """

    base: str
    axes: dict[str, Axis] = field(default_factory=dict)
    design: Literal["star", "grid"] = "star"
    seeds: list[Seed] = field(default_factory=lambda: [0])
    minutes: MinutesAboveZero | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    more_seeds: MoreSeeds | None = None

    def levels_of(self, axis: str) -> list[str]:
        """Return the levels of an axis, its base first."""
        return [base_of(self.axes[axis]), *(level for level, changes in self.axes[axis].items() if changes)]

    def label(self, levels: Levels) -> str:
        """Return the name of a combination: its levels without unnamed bases, or `base`."""
        names = [levels.get(axis, base_of(own)) for axis, own in self.axes.items()]
        return "+".join(name for name in names if name != BASE) or BASE

    def combinations(self) -> list[Levels]:
        """Return the changed levels of each combination by axis. The base comes first."""
        changing = {axis: self.levels_of(axis)[1:] for axis in self.axes}
        if self.design == "grid":
            choices = [[None, *levels] for levels in changing.values()]
            return [
                {axis: level for axis, level in zip(self.axes, chosen, strict=True) if level is not None}
                for chosen in itertools.product(*choices)
            ]
        alone: list[Levels] = [{axis: level} for axis, levels in changing.items() for level in levels]
        last = [(axis, levels[-1]) for axis, levels in changing.items()]
        return [{}, *alone, *(dict(last[:count]) for count in range(2, len(last) + 1))]

    def runs(self) -> dict[str, tuple[Levels, int]]:
        """Return the levels and the seed of each run by its name, in the order of training.

        All combinations come with one seed before the next seed, so a stopped study has all combinations.
        """
        if self.design == "grid":
            count = math.prod(len(self.levels_of(axis)) for axis in self.axes) * len(self.seeds)
            if count > _MOST_RUNS:
                raise UserError(f"the grid has {count:,} runs, more than {_MOST_RUNS:,}; give it fewer axes or a star")
        combinations = self.combinations()
        planned = [(levels, seed) for seed in self.seeds for levels in combinations]
        if (more := self.more_seeds) is not None:
            chosen = [
                levels
                for levels in combinations
                if all(levels.get(axis, base_of(self.axes[axis])) in own for axis, own in more.of.items())
            ]
            planned += [(levels, seed) for seed in more.seeds for levels in chosen]
        runs: dict[str, tuple[Levels, int]] = {}
        for levels, seed in planned:
            name = self.label(levels) + seed_suffix(seed)
            if name in runs:
                raise UserError(f"two runs are called {name}; give each level its own name, and each seed once")
            runs[name] = levels, seed
        return runs


def base_of(levels: Axis) -> str:
    """Return the name of an axis' base: its level without changes, or `base`."""
    return next((level for level, changes in levels.items() if not changes), BASE)


def read_study(file: Path) -> Study:
    """Return the study in a file.

    Raises:
        UserError: a field is unknown, missing, or of the wrong type or range, or names cannot be used.
        OSError: the file cannot be read.
    """
    read_yaml(file)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study)
    try:
        content = vars(parser.instantiate(parser.parse_path(file)))
    except (ArgumentError, ValueError, OverflowError) as error:
        raise UserError(f"{file}: {parser_message(error)}") from None
    study = Study(**{one.name: content[one.name] for one in dataclasses.fields(Study)})
    check_ranges(study)
    for name in itertools.chain(study.axes, *study.axes.values()):
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise UserError(f"{file}: {str(name)[:40]!r} names runs; use letters, digits and . _ -, and quote a number")
    for axis, levels in study.axes.items():
        changing = sum(map(bool, levels.values()))
        if not changing or len(levels) - changing > 1:
            raise UserError(
                f"{file}: axes.{axis} is {levels}; it must have levels with changes, such as 'large: {{model.size: "
                "l16}', and at most one without, which names the base"
            )
    if not study.seeds:
        raise UserError(f"{file}: seeds is []; it must have a seed")
    for axis, chosen in study.more_seeds.of.items() if study.more_seeds else ():
        if axis not in study.axes:
            raise UserError(f"{file}: more_seeds.of has {axis[:40]!r}; the axes are {', '.join(study.axes)}")
        known = study.levels_of(axis)
        if not set(chosen) <= set(known):
            raise UserError(f"{file}: more_seeds.of.{axis} is {chosen!r}; list some of {', '.join(known)}")
    return study


def plan(study: Study, folder: Path) -> list[StudyRun]:
    """Return the runs of a study with a resolved base, each checked as far as possible without its data. Raise
    UserError if the base is not a recipe, a change has no place in it, a recipe cannot be run, or runs share a name."""
    timed = [] if study.minutes is None else ["--budget_minutes", str(study.minutes)]
    recipe = parse_recipe(["--config", study.base, *timed])
    base = yaml.safe_load(to_yaml(recipe if study.minutes is None else in_time(recipe, study.minutes)))
    runs = []
    for name, (levels, seed) in study.runs().items():
        content = {**copy.deepcopy(base), "seed": seed, "output_dir": str(folder / name)}
        change(content, study.changes, "changes")
        for axis, level in levels.items():
            change(content, study.axes[axis][level], f"axes.{axis}.{level}")
        runs.append(StudyRun(name, checked(content, f"run {name}")))
    return runs


def change(content: dict[str, Any], changes: Mapping[str, Any], where: str) -> None:
    """Set fields of a recipe, each by a path such as `stages.masked.samples` or `stages.0.samples`. Raise UserError if
    there is no such field, or it is a section, or the study sets it."""
    for path, value in changes.items():
        if path in _OWN:
            raise UserError(f"{where}: {path} is the study's own; {_OWN[path]}")
        place: Any = content
        try:
            *parents, last = with_stage_number(path, content["stages"]).split(".")
            for part in parents:
                place = place[int(part) if isinstance(place, list) else part]
            key = int(last) if isinstance(place, list) else last
            old = place.get(key) if ".".join(parents) in _OPEN else place[key]
        except (LookupError, TypeError, ValueError):
            has = f"the fields are {', '.join(place)}" if isinstance(place, dict) else f"it ends at {place!r:.40}"
            if place is content["stages"]:
                has = f"the stages are {', '.join(str(stage['name']) for stage in place)}"
            raise UserError(f"{where}: {path} is not a field of the recipe; {has}") from None
        if not parents and isinstance(old, dict):
            raise UserError(f"{where}: {path} is a whole section of the recipe; change its fields, as {path}.NAME")
        # Whole powers of ten are floats in YAML. Copied, because a later change may be inside the value.
        place[key] = int(value) if isinstance(value, float) and value.is_integer() else copy.deepcopy(value)


def checked(content: dict[str, Any], name: str) -> Recipe:
    """Return the recipe of a mapping. `name` begins the message if it cannot be run."""
    data = content["data"]
    batch, lanes = data["global_batch_size"], data["lanes"]
    if isinstance(batch, int) and isinstance(lanes, int) and lanes and batch % lanes:
        data["lanes"] = None  # They belong to another batch size.
    words: list[str] = []
    for section, value in content.items():
        # One flag for each field, because a flag for a section would quote the whole section in an error.
        fields = {f".{name}": one for name, one in value.items()} if isinstance(value, dict) else {"": value}
        for suffix, one in fields.items():
            words += [f"--{section}{suffix}", one if isinstance(one, str) else json.dumps(one)]
    try:
        recipe = with_time_shares(parse_recipe(words))
        check_rules(recipe)
        check_image_sizes(recipe.eval, build_config(recipe).vision_config.patch_size)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    return recipe


def write_plan(file: Path, output_dir: Path) -> list[StudyRun]:
    """Write the recipe of each run of a study to `output_dir/runs`, and return the runs.

    A study may be planned again with other runs. Raise UserError if the study is wrong, the folder holds something
    else, or an earlier run has changed.
    """
    study = read_study(file)
    if study.base.endswith((".yaml", ".yml")):
        study = dataclasses.replace(study, base=os.path.normpath(file.parent / study.base))
    runs = plan(study, output_dir / "runs")
    check_study_folder(output_dir, STUDY_FILE)
    content = {name: value for name, value in dataclasses.asdict(study).items() if value}
    write_recipes(runs, output_dir / STUDY_FILE, yaml.safe_dump(content, sort_keys=False))
    return runs


def check_study_folder(output_dir: Path, mark: str) -> None:
    """Raise unless a folder can be written, and is empty or holds the file `mark`."""
    check_writable(output_dir, "output_dir")
    there = sorted(path.name for path in output_dir.glob("*") if not path.name.startswith("."))
    if there and mark not in there:
        raise UserError(f"{output_dir} holds {there[0]}, which no study wrote; name a new or an empty folder")


def read_plan(output_dir: Path) -> tuple[Study, list[StudyRun]]:
    """Return a planned study and its runs. Raise UserError if the folder holds no planned study, or a recipe is
    missing."""
    file = output_dir / STUDY_FILE
    if not file.is_file():
        raise UserError(f"{output_dir} holds no planned study; write one there: flipscale study plan STUDY.yaml")
    study = read_study(file)
    recipes = [output_dir / "runs" / f"{name}.yaml" for name in study.runs()]
    for recipe in recipes:
        if not recipe.is_file():
            raise UserError(f"{recipe} is missing; plan the study again: flipscale study plan STUDY.yaml")
    return study, [StudyRun(recipe.stem, parse_recipe(["--config", str(recipe.absolute())])) for recipe in recipes]
