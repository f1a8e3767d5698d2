"""The design of a study: a base recipe, axes along which it is changed, and the combinations that are trained."""

import copy
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flipscale.evaluation.reports.comparison import seed_suffix
from flipscale.io.errors import UserError
from flipscale.io.options import MinutesAboveZero, check_ranges
from flipscale.io.yaml_text import read_outline
from flipscale.studies.runs import StudyRun, in_time
from flipscale.training.recipe import RECIPES, Recipe, parse_recipe, to_yaml
from flipscale.training.schedule import plan_stages

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_POWER_OF_TEN = re.compile(r"[-+]?\d+(\.\d*)?[eE]\d+|[-+]?\d+[eE]-\d+")
_MOST_RUNS = 10_000
_DESIGNS = ("star", "grid")
_FIELDS = ("base", "changes", "axes", "design", "seeds", "more_seeds", "minutes")
# What the level of an axis at which it changes nothing is called where the study has no name for it.
BASE = "base"
STUDIES = RECIPES / "studies"

Levels = Mapping[str, str]


@dataclass(frozen=True)
class MoreSeeds:
    """Seeds that only a part of the combinations is trained with, such as the corners of a grid.

    Args:
        seeds: the seeds.
        of: of some axes, the levels that the part has, `base` among them; it has all levels of the others.
    """

    seeds: Sequence[int]
    of: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Study:
    """What a study's file says.

    Args:
        base: the recipe that is changed, a file or a name.
        axes: of each axis, by its levels' names, what a level changes: values by their path in the recipe, such as
            `stages.0.samples`. A level that changes nothing is the name of the axis' base.
        design: `star` is the base, each level alone, then the last levels of the first two axes together, of the first
            three, and so on. `grid` is all combinations of levels, the base of each axis among them.
        seeds: every combination is trained with each.
        minutes: how long every run trains, by its own clock; the stages of the base then have shares of that time. Left
            out, runs end as the base does.
        changes: what all runs change of the base: values by their path in the recipe.
        more_seeds: further seeds of a part of the combinations.
    """

    base: str
    axes: Mapping[str, Mapping[str, Mapping[str, Any]]]
    design: str
    seeds: Sequence[int]
    minutes: MinutesAboveZero | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    more_seeds: MoreSeeds | None = None

    def levels_of(self, axis: str) -> list[str]:
        """Return the levels of an axis at which it changes something."""
        return [level for level, changes in self.axes[axis].items() if changes]

    def label(self, levels: Levels) -> str:
        """Return what a combination is called: its level of each axis, bases without a name left out; `base` where that
        leaves nothing."""
        found = [levels.get(axis, base_of(own)) for axis, own in self.axes.items()]
        return "+".join(level for level in found if level != BASE) or BASE

    def combinations(self) -> list[Levels]:
        """Return the levels of the axes that are not at their base, of each combination; the first is the base."""
        if self.design == "grid":
            choices = [[None, *self.levels_of(axis)] for axis in self.axes]
            return [
                {axis: level for axis, level in zip(self.axes, chosen, strict=True) if level is not None}
                for chosen in itertools.product(*choices)
            ]
        alone: list[Levels] = [{axis: level} for axis in self.axes for level in self.levels_of(axis)]
        last = [(axis, self.levels_of(axis)[-1]) for axis in self.axes]
        return [{}, *alone, *(dict(last[:count]) for count in range(2, len(last) + 1))]

    def runs(self) -> dict[str, tuple[Levels, int]]:
        """Return the levels and the seed of each run, by its name: its label and its seed. One seed comes after the
        other, so that a study which is not finished has all its combinations.

        Raises:
            ValueError: two have one name, or there are more than anybody trains.
        """
        if self.design == "grid":
            count = math.prod(len(self.levels_of(axis)) + 1 for axis in self.axes) * len(self.seeds)
            if count > _MOST_RUNS:
                raise UserError(f"the grid has {count:,} runs, more than {_MOST_RUNS:,}; give it fewer axes or a star")
        planned = [(levels, seed) for seed in self.seeds for levels in self.combinations()]
        if (more := self.more_seeds) is not None:
            part = [
                levels
                for levels in self.combinations()
                if all(levels.get(axis, base_of(self.axes[axis])) in chosen for axis, chosen in more.of.items())
            ]
            planned += [(levels, seed) for seed in more.seeds for levels in part]
        found: dict[str, tuple[Levels, int]] = {}
        for levels, seed in planned:
            name = self.label(levels) + seed_suffix(seed)
            if name in found:
                raise UserError(f"two runs are called {name}; give each level a name of its own, and each seed once")
            found[name] = levels, seed
        return found


def base_of(levels: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what the base of an axis with these levels is called: the level that changes nothing, or `base`."""
    return next((level for level, changes in levels.items() if not changes), BASE)


def study_file(name: str) -> Path:
    """Return the file of a study; a bare name is one of the package's.

    Raises:
        ValueError: there is neither.
    """
    named = STUDIES / f"{name}.yaml"
    if "/" in name or os.path.isfile(name):
        return Path(name)
    if named.is_file():
        return named
    names = ", ".join(sorted(path.stem for path in STUDIES.glob("*.yaml")))
    raise UserError(f"study {name[:200]!r} is neither a file nor one of {names}")


def read_study(file: Path) -> Study:
    """Return what a study's file says.

    Raises:
        ValueError: it is no study.
        OSError: it cannot be read.
    """
    read_outline(file)
    content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict) or set(content) - set(_FIELDS) or "base" not in content:
        what = sorted(set(content) - set(_FIELDS)) if isinstance(content, dict) else []
        found = f"has {what[0]!r}" if what else "has no base"
        raise UserError(f"{file} is no study, it {found}; a study has {', '.join(_FIELDS)}")
    axes, seeds = content.get("axes") or {}, content.get("seeds", [0])
    if not isinstance(axes, dict) or not all(_is_axis(levels) for levels in axes.values()):
        raise UserError(
            f"{file}: axes must have levels, and these changes: 'axes: {{model: {{large: {{model.size: l16}}}}}}'; one "
            "level beside them may have none, {}, and names the base"
        )
    for name in itertools.chain(axes, *axes.values()):
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(
                f"{file}: {str(name)[:40]!r} names runs; use letters, digits and . _ -, in quotes if it is a number"
            )
    if not _are_seeds(seeds):
        raise UserError(f"{file}: seeds is {seeds!r}; it must be a list of whole numbers, such as [0, 1, 2]")
    design = content.get("design", "star")
    if design not in _DESIGNS:
        raise UserError(f"{file}: design is {design!r}; use {' or '.join(_DESIGNS)}")
    changes = content.get("changes") or {}
    if not isinstance(changes, dict):
        raise UserError(f"{file}: changes is {str(changes)[:40]!r}; it must be as 'changes: {{data.fraction: 0.5}}'")
    minutes = content.get("minutes")
    if minutes is not None and type(minutes) not in (int, float):
        raise UserError(f"{file}: minutes is {minutes!r}; it must be a number, such as 10")
    more = _more_seeds(content.get("more_seeds"), axes, file)
    study = Study(str(content["base"]), axes, design, seeds, minutes, changes, more)
    check_ranges(study)
    return study


def _more_seeds(given: Any, axes: Mapping[str, Mapping[str, Any]], file: Path) -> MoreSeeds | None:
    """Return what a study says of further seeds.

    Raises:
        ValueError: it is something else, or names an axis or a level that the study has not.
    """
    if given is None:
        return None
    if not isinstance(given, dict) or set(given) != {"seeds", "of"} or not isinstance(given["of"], dict):
        raise UserError(
            f"{file}: more_seeds must have seeds, and levels of axes: "
            "'more_seeds: {seeds: [1, 2], of: {model: [base, large]}}'"
        )
    if not _are_seeds(given["seeds"]):
        raise UserError(f"{file}: more_seeds.seeds is {given['seeds']!r}; it must be a list of whole numbers")
    for axis, chosen in given["of"].items():
        if axis not in axes:
            raise UserError(f"{file}: more_seeds.of has {str(axis)[:40]!r}; the axes are {', '.join(axes)}")
        known = list(dict.fromkeys([base_of(axes[axis]), *axes[axis]]))
        if not isinstance(chosen, list) or not chosen or not all(level in known for level in chosen):
            raise UserError(f"{file}: more_seeds.of.{axis} is {chosen!r}; list some of {', '.join(known)}")
    return MoreSeeds(given["seeds"], given["of"])


def _are_seeds(seeds: Any) -> bool:
    return isinstance(seeds, list) and bool(seeds) and all(type(seed) is int and seed >= 0 for seed in seeds)


def _is_axis(levels: Any) -> bool:
    if not isinstance(levels, dict) or not all(isinstance(changes, dict) for changes in levels.values()):
        return False
    changing = sum(map(bool, levels.values()))
    return changing > 0 and len(levels) - changing <= 1


def plan(study: Study, output_dir: Path) -> list[StudyRun]:
    """Return the runs of a study, each checked as far as it can be without its data.

    Args:
        output_dir: their run directories are made in it.

    Raises:
        ValueError: the base is no recipe, an axis changes what no recipe has, a changed recipe cannot be run, or two
            runs have one name.
    """
    recipe = parse_recipe(["--config", study.base])
    base = yaml.safe_load(to_yaml(recipe if study.minutes is None else in_time(recipe, study.minutes)))
    runs = []
    for name, (levels, seed) in study.runs().items():
        content = {**copy.deepcopy(base), "seed": seed, "output_dir": str(output_dir / name)}
        for path, value in study.changes.items():
            change(content, str(path), value, "changes")
        for axis, level in levels.items():
            for path, value in study.axes[axis][level].items():
                change(content, str(path), value, f"axes.{axis}.{level}")
        runs.append(StudyRun(name, checked(content, f"run {name}")))
    return runs


def change(content: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Set what a path such as `stages.0.samples` names in a recipe.

    Raises:
        ValueError: there is no such place, or it is a whole section, or the study's own.
    """
    if path in _OWN:
        raise UserError(f"{where}: {path} is the study's own; {_OWN[path]}")
    *parents, last = path.split(".")
    place: Any = content
    for number, part in enumerate([*parents, last]):
        is_there = (isinstance(place, list) and part.isdecimal() and int(part) < len(place)) or (
            isinstance(place, dict) and (part in place or ".".join(parents) in _OPEN)
        )
        if not is_there:
            inside = ".".join(path.split(".")[:number]) or "it"
            has = ", ".join(place) if isinstance(place, dict) else "no such part"
            raise UserError(f"{where}: {path} is no field of the recipe: {inside} has {has}")
        if number < len(parents):
            place = place[int(part)] if isinstance(place, list) else place[part]
    if not parents and isinstance(place[last], dict):
        first = next(iter(place[last]))
        raise UserError(f"{where}: {path} is a whole section of the recipe; change its fields, such as {path}.{first}")
    # A copy: an axis may change what lies in it.
    place[int(last) if isinstance(place, list) else last] = copy.deepcopy(plain_number(value))


def plain_number(value: Any) -> Any:
    """Return a value of YAML, a power of ten as the number that people mean by it: `1e9` is a text to YAML 1.1."""
    if isinstance(value, str) and _POWER_OF_TEN.fullmatch(value):
        return int(float(value)) if float(value).is_integer() else float(value)
    return value


# What the study sets in each recipe.
_OWN = {"seed": "list the seeds in seeds", "output_dir": "its runs lie in its folder, --output_dir"}
# Sections whose fields are not listed in a recipe that leaves them out.
_OPEN = ("model.vision_config", "model.text_config", "loss.options")


def checked(content: dict[str, Any], name: str) -> Recipe:
    """Return the recipe that a mapping says.

    Args:
        name: begins the message.

    Raises:
        ValueError: it cannot be run.
    """
    data = content["data"]
    batch, lanes = data["global_batch_size"], data["lanes"]
    if isinstance(batch, int) and isinstance(lanes, int) and lanes and batch % lanes:
        data["lanes"] = None  # those of another batch
    words: list[str] = []
    for section, value in content.items():
        # A field at a time: of a whole section, the message of a mistake has all of it.
        fields = (
            {f"{section}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {section: value}
        )
        for flag, one in fields.items():
            # JSON is YAML, and of the kind that flags are read as.
            words += [f"--{flag}", one if isinstance(one, str) else json.dumps(one)]
    try:
        recipe = parse_recipe(words)
        plan_stages(recipe.stages, recipe.data.global_batch_size, recipe.budget_minutes)
        recipe.model_config()
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    return recipe
