"""A study: a base recipe, axes that change it, the combinations to train, and its folder.

The folder has `study.yaml`, and a recipe `runs/NAME.yaml`, a run directory `runs/NAME/` and output `runs/NAME.log` for
each run. The report is written beside them.
"""

import copy
import dataclasses
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

from flipscale.evaluation.reports.curves import seed_suffix
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.io.files import check_writable
from flipscale.io.options import MinutesAboveZero, changed_fields, check_ranges
from flipscale.io.yaml_text import read_outline
from flipscale.studies.runs import StudyRun, in_time
from flipscale.training.recipe import Recipe, parse_recipe, to_yaml
from flipscale.training.schedule import plan_stages

STUDY_FILE = "study.yaml"
# The default name of an axis' level without changes.
BASE = "base"
_POWER_OF_TEN = re.compile(r"[-+]?\d+(\.\d*)?[eE]\d+|[-+]?\d+[eE]-\d+")
_MOST_RUNS = 10_000
# Fields that the study sets in each recipe, and their place in the study.
_OWN = {"seed": "list the seeds in seeds", "output_dir": "its runs lie in its folder, --output_dir"}
# Mappings whose fields need not be in the recipe.
_OPEN = ("model.vision_config", "model.text_config", "loss.options")

Levels = Mapping[str, str]
Axis = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class MoreSeeds:
    """Further seeds for a part of the combinations, such as the corners of a grid.

    Args:
        of: levels of the part by axis, with `base` for no change; axes left out have all levels.
    """

    seeds: Sequence[int]
    of: Mapping[str, Sequence[str]]


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
        minutes: training time of every run by its own clock; the stages of the base get shares of it. None ends runs
            as the base does.
        changes: changes of the base in all runs: values by their path in the recipe.
        more_seeds: further seeds for a part of the combinations.
    """

    base: str
    axes: Mapping[str, Axis]
    design: str
    seeds: Sequence[int]
    minutes: MinutesAboveZero | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    more_seeds: MoreSeeds | None = None

    def levels_of(self, axis: str) -> list[str]:
        """Return the levels of an axis that change something."""
        return [level for level, changes in self.axes[axis].items() if changes]

    def label(self, levels: Levels) -> str:
        """Return the name of a combination: its levels without unnamed bases, or `base`."""
        names = [levels.get(axis, base_of(own)) for axis, own in self.axes.items()]
        return "+".join(name for name in names if name != BASE) or BASE

    def combinations(self) -> list[Levels]:
        """Return the changed levels of each combination by axis. The base comes first."""
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
        """Return the levels and the seed of each run by its name, in the order of training.

        All combinations come with one seed before the next seed, so a stopped study has all combinations.
        """
        if self.design == "grid":
            count = math.prod(len(self.levels_of(axis)) + 1 for axis in self.axes) * len(self.seeds)
            if count > _MOST_RUNS:
                raise UserError(f"the grid has {count:,} runs, more than {_MOST_RUNS:,}; give it fewer axes or a star")
        planned = [(levels, seed) for seed in self.seeds for levels in self.combinations()]
        if (more := self.more_seeds) is not None:
            planned += [
                (levels, seed)
                for seed in more.seeds
                for levels in self.combinations()
                if all(levels.get(axis, base_of(self.axes[axis])) in chosen for axis, chosen in more.of.items())
            ]
        runs: dict[str, tuple[Levels, int]] = {}
        for levels, seed in planned:
            name = self.label(levels) + seed_suffix(seed)
            if name in runs:
                raise UserError(f"two runs are called {name}; give each level a name of its own, and each seed once")
            runs[name] = levels, seed
        return runs


def base_of(levels: Axis) -> str:
    """Return the name of an axis' base: its level without changes, or `base`."""
    return next((level for level, changes in levels.items() if not changes), BASE)


def resolve_base(base: str, file: Path) -> str:
    """Return the base recipe's path: YAML files are relative to the study's file, names are the package's."""
    return os.path.normpath(file.parent / base) if base.endswith((".yaml", ".yml")) else base


def read_fields(file: Path, what: str, needed: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a study's or a search's file."""
    read_outline(file)
    content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    given = content if isinstance(content, dict) else {}
    unknown = sorted(map(str, given.keys() - {*needed, *others}))
    missing = [name for name in needed if name not in given]
    if unknown or missing:
        fault = f"has {unknown[0]!r}" if unknown else f"has no {missing[0]}"
        raise UserError(f"{file} is no {what}, it {fault}; a {what} has {', '.join([*needed, *others])}")
    return given


def read_study(file: Path) -> Study:
    """Return the study in a file.

    Raises:
        UserError: the file is not a study.
        OSError: the file cannot be read.
    """
    others = ("changes", "axes", "design", "seeds", "more_seeds", "minutes")
    content = read_fields(file, "study", ("base",), others)
    axes, seeds = content.get("axes") or {}, content.get("seeds", [0])
    if not isinstance(axes, dict) or not all(_is_axis(levels) for levels in axes.values()):
        raise UserError(
            f"{file}: axes must have levels with changes: 'axes: {{model: {{large: {{model.size: l16}}}}}}'; one level "
            "of an axis may have none, {}, and names the base"
        )
    for name in itertools.chain(axes, *axes.values()):
        check_name(name, "runs", file)
    if not _are_seeds(seeds):
        raise UserError(f"{file}: seeds is {seeds!r}; it must be a list of whole numbers, such as [0, 1, 2]")
    design = content.get("design", "star")
    if design not in ("star", "grid"):
        raise UserError(f"{file}: design is {design!r}; use star or grid")
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


def check_name(name: Any, what: str, file: Path) -> None:
    """Raise unless a name in a study's file can name a folder."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise UserError(
            f"{file}: {str(name)[:40]!r} names {what}; use letters, digits and . _ -, in quotes if it is a number"
        )


def _more_seeds(given: Any, axes: Mapping[str, Axis], file: Path) -> MoreSeeds | None:
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


def plan(study: Study, folder: Path) -> list[StudyRun]:
    """Return the runs of a study with a resolved base, each checked as far as possible without its data.

    Raises:
        UserError: the base is not a recipe, a change has no place in it, a changed recipe cannot be run, or two runs
            have one name.
    """
    recipe = parse_recipe(["--config", study.base])
    base = yaml.safe_load(to_yaml(recipe if study.minutes is None else in_time(recipe, study.minutes)))
    runs = []
    for name, (levels, seed) in study.runs().items():
        content = {**copy.deepcopy(base), "seed": seed, "output_dir": str(folder / name)}
        for path, value in study.changes.items():
            change(content, str(path), value, "changes")
        for axis, level in levels.items():
            for path, value in study.axes[axis][level].items():
                change(content, str(path), value, f"axes.{axis}.{level}")
        runs.append(StudyRun(name, checked(content, f"run {name}")))
    return runs


def change(content: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Set a field of a recipe, by a path such as `stages.0.samples`.

    Raises:
        UserError: there is no such field, or it is a section, or the study sets it.
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
    # Copied, because a later change may be inside the value.
    place[int(last) if isinstance(place, list) else last] = copy.deepcopy(plain_number(value))


def plain_number(value: Any) -> Any:
    """Return a value of YAML with a power of ten as a number, because `1e9` is text in YAML 1.1."""
    if isinstance(value, str) and _POWER_OF_TEN.fullmatch(value):
        return int(float(value)) if float(value).is_integer() else float(value)
    return value


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
        recipe = parse_recipe(words)
        plan_stages(recipe.stages, recipe.data.global_batch_size, recipe.budget_minutes)
        recipe.model_config()
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    return recipe


def write_plan(file: Path, output_dir: Path) -> list[StudyRun]:
    """Write the recipe of each run of a study to `output_dir/runs`, and return the runs.

    A study may grow: planned again, a folder gets the missing recipes.

    Raises:
        UserError: the study is wrong, the folder holds something else, or an earlier run has changed or is gone.
    """
    study = read_study(file)
    study = dataclasses.replace(study, base=resolve_base(study.base, file))
    check_writable(output_dir, "output_dir")
    folder = output_dir / "runs"
    runs = plan(study, folder)
    refuse_foreign(output_dir, STUDY_FILE, "study")
    planned = {run.name: run for run in runs}
    for saved in sorted(folder.glob("*.yaml")):
        if saved.stem not in planned:
            raise UserError(f"{output_dir} has a planned run {saved.stem}, but {file} has none; name another folder")
        changed = sorted(changed_fields(_fields(_load(saved)), _fields(planned[saved.stem].recipe)))
        if changed:
            raise UserError(f"{saved} was planned otherwise than {file} ({'; '.join(changed)}); name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    content = {name: value for name, value in dataclasses.asdict(study).items() if value}
    write_text(output_dir / STUDY_FILE, yaml.safe_dump(content, sort_keys=False))
    for run in runs:
        if not (folder / f"{run.name}.yaml").exists():
            write_text(folder / f"{run.name}.yaml", to_yaml(run.recipe))
    return runs


def refuse_foreign(output_dir: Path, mark: str, what: str) -> None:
    """Raise if a folder holds files but not `mark`."""
    there = sorted(path.name for path in output_dir.glob("*") if not path.name.startswith("."))
    if there and mark not in there:
        raise UserError(f"{output_dir} holds {there[0]}, which no {what} wrote; name a new or an empty folder")


def read_plan(output_dir: Path) -> tuple[Study, list[StudyRun]]:
    """Return a planned study and its runs.

    Raises:
        UserError: the folder holds no planned study, or a recipe is missing.
    """
    file = output_dir / STUDY_FILE
    if not file.is_file():
        raise UserError(f"{output_dir} holds no planned study; write one there: flipscale study plan STUDY.yaml")
    study = read_study(file)
    recipes = [output_dir / "runs" / f"{name}.yaml" for name in study.runs()]
    for recipe in recipes:
        if not recipe.is_file():
            raise UserError(f"{recipe} is missing; plan the study again: flipscale study plan STUDY.yaml")
    return study, [StudyRun(recipe.stem, _load(recipe)) for recipe in recipes]


def _load(file: Path) -> Recipe:
    return parse_recipe(["--config", str(file.absolute())])


def _fields(recipe: Recipe) -> dict[str, Any]:
    # Made absolute, because the folder may be given by another path next time.
    fields: dict[str, Any] = yaml.safe_load(to_yaml(recipe))
    return {**fields, "output_dir": str(Path(recipe.output_dir).absolute())}
