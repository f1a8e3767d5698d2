"""The file of a search: a base recipe, a budget of minutes, and the paths through it that are compared."""

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import yaml

from flipscale.io.errors import UserError
from flipscale.io.options import Count, MinutesAboveZero, OpenShare, Positive, Range, check_ranges
from flipscale.io.yaml_text import read_outline
from flipscale.studies.design import NAME, change, checked, plain_number
from flipscale.training.recipe import Recipe, parse_recipe, to_yaml

_NEEDED = ("base", "minutes", "validation", "paths")
_LISTS = ("tuning", "rates", "rungs", "keep")
# What a path may change; the others do not decide what is learned, or are the same for all.
_SECTIONS = ("model", "data", "mask", "loss", "optim", "stages")
_WARMUP = 0.05


@dataclass(frozen=True)
class Search:
    """What the file of a search says.

    Args:
        base: the recipe that is changed, a file or a name.
        minutes: the budget: how long a recipe is trained in the end.
        validation: which of the base's evaluations the paths are chosen by. No other is done.
        paths: what each path changes, values by their path in the recipe; `stages`, with shares of the budget, is one.
        tuning: which shares of the budget the last of several stages has; each makes a path of its own. The stages
            before it have the rest, in proportion to their shares, or in equal parts if they have none.
        rates: the `base_lr` of a first stage that names none; each makes a path of its own. Left out, the base's.
        rungs: the minutes of the rungs before the last, which has the budget; left out, each has 1 / `eta` of the next.
        keep: how many paths go on from each of those; left out, one of `eta`, until `eta` of them are left.
        eta: how much longer a rung is than the one before.
    """

    base: str
    minutes: MinutesAboveZero
    validation: str
    paths: Mapping[str, Mapping[str, Any]]
    tuning: Sequence[OpenShare] = ()
    rates: Sequence[Positive] = ()
    rungs: Sequence[MinutesAboveZero] = ()
    keep: Sequence[Count] = ()
    eta: Annotated[int, Range(at_least=2, at_most=1000)] = 3

    def routes(self) -> dict[str, dict[str, Any]]:
        """Return what each path changes, by its name, with each share of tuning and each rate.

        Raises:
            ValueError: two have one name, or stages are no list of mappings.
        """
        found: dict[str, dict[str, Any]] = {}
        for name, changes in self.paths.items():
            stages = changes.get("stages")
            if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
                raise UserError(f"path {name}: stages must be a list, such as [{{name: whole, image_size: 32}}]")
            shares: Sequence[float | None] = (self.tuning if len(stages) > 1 else ()) or [None]
            rates: Sequence[float | None] = (self.rates if "base_lr" not in stages[0] else ()) or [None]
            for share, rate in itertools.product(shares, rates):
                words = [name]
                words += [f"tuned{share:g}"] if len(shares) > 1 else []
                words += [f"lr{rate:g}"] if len(rates) > 1 else []
                full = "+".join(words)
                if full in found:
                    raise UserError(f"two paths are called {full}; give each a name of its own, and each value once")
                found[full] = {**changes, "stages": _stages(stages, share, rate)}
        return found

    def kept(self, count: int) -> list[int]:
        """Return how many of `count` paths go on from each rung but the last.

        Raises:
            ValueError: `keep` does not fit the rungs or the paths.
        """
        if not self.keep:
            left, found = count, list[int]()
            while len(found) < len(self.rungs) if self.rungs else left > self.eta:
                left = math.ceil(left / self.eta)
                found.append(left)
            return found
        if self.rungs and len(self.keep) != len(self.rungs):
            raise UserError(f"keep has {len(self.keep)} numbers, and rungs has {len(self.rungs)}; give one for each")
        for before, after in itertools.pairwise([count, *self.keep]):
            if after >= before:
                raise UserError(f"keep is {list(self.keep)} of {count} paths; each rung must keep fewer than it has")
        return list(self.keep)

    def times(self, num_rungs: int) -> list[float]:
        """Return the minutes of each rung.

        Raises:
            ValueError: one is not longer than the one before.
        """
        if not self.rungs:
            return [float(f"{self.minutes / self.eta**left:.4g}") for left in range(num_rungs - 1, 0, -1)] + [
                self.minutes
            ]
        for before, after in itertools.pairwise([*self.rungs, self.minutes]):
            if after <= before:
                raise UserError(
                    f"rungs is {list(self.rungs)} of a budget of {self.minutes:g} minutes; each must be longer than "
                    "the one before, and all shorter than the budget"
                )
        return [*self.rungs, self.minutes]


def _stages(stages: Sequence[dict[str, Any]], tuning: float | None, rate: float | None) -> list[dict[str, Any]]:
    """Return the stages with their shares, the rate of the first and its warm-up."""
    made = [{field: plain_number(value) for field, value in stage.items()} for stage in stages]
    if len(made) == 1:
        made[0].setdefault("share", 1.0)
    elif tuning is not None:
        parts = [stage.get("share", 1.0) for stage in made[:-1]]
        if all(type(part) in (int, float) and part > 0 for part in parts):
            for stage, part in zip(made, parts, strict=False):
                stage["share"] = round((1.0 - tuning) * part / sum(parts), 6)
            made[-1]["share"] = tuning
    if rate is not None:
        made[0]["base_lr"] = rate
    made[0].setdefault("warmup_share", _WARMUP)
    return made


def read_search(file: Path) -> Search:
    """Return what the file of a search says.

    Raises:
        ValueError: it is none.
        OSError: it cannot be read.
    """
    read_outline(file)
    content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    fields = (*_NEEDED, *_LISTS, "eta")
    if not isinstance(content, dict) or set(content) - set(fields) or set(_NEEDED) - set(content):
        given = set(content) if isinstance(content, dict) else set()
        wrong = sorted(map(str, given - set(fields)))
        found = f"has {wrong[0]!r}" if wrong else f"has no {next(name for name in _NEEDED if name not in given)}"
        raise UserError(f"{file} is no search, it {found}; a search has {', '.join(fields)}")
    content = {name: plain_number(value) for name, value in content.items()}
    for name in _LISTS:
        listed = content.get(name, [])
        content[name] = [plain_number(value) for value in listed] if isinstance(listed, list) else listed
        if not isinstance(listed, list) or not all(_is_number(value, name == "keep") for value in content[name]):
            words = "whole numbers" if name == "keep" else "numbers"
            raise UserError(f"{file}: {name} is {listed!r:.60}; it must be a list of {words}")
    for name, whole in {"minutes": False, "eta": True}.items():
        if name in content and not _is_number(content[name], whole):
            raise UserError(f"{file}: {name} is {content[name]!r:.60}; it must be a {'whole ' * whole}number")
    paths = content["paths"]
    if not isinstance(paths, dict) or not all(isinstance(changes, dict) for changes in paths.values()):
        raise UserError(f"{file}: paths must have names, and these changes: 'paths: {{half: {{stages: [...]}}}}'")
    for name in paths:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(
                f"{file}: {str(name)[:40]!r} names a path; use letters, digits and . _ -, in quotes if it is a number"
            )
    search = Search(**{**content, "base": str(content["base"]), "validation": str(content["validation"])})
    check_ranges(search)
    return search


def _is_number(value: Any, is_whole: bool) -> bool:
    return type(value) is int or (type(value) is float and not is_whole)


def path_recipes(search: Search) -> dict[str, Recipe]:
    """Return the recipe of each path, which ends after the whole budget and has all evaluations of the base, at the
    size of its last stage; each is checked as far as it can be without its data.

    Raises:
        ValueError: there are fewer than two, the base is no recipe or lacks the evaluation to choose by, or a path
            changes what no recipe has or what all have in common, or cannot be run.
    """
    routes = search.routes()
    if len(routes) < 2:
        raise UserError(f"there is {len(routes)} path, which is nothing to choose from; give two or more")
    base = parse_recipe(["--config", search.base])
    names = [task.name for task in base.eval.planned()]
    if search.validation not in names:
        has = f"has {', '.join(names)}" if names else "has none"
        raise UserError(
            f"validation is {search.validation!r:.60}, which is none of eval.tasks of {search.base}: it {has}; name "
            "one whose images no test has"
        )
    rate = base.stages[0].base_lr if base.stages else None
    plain = yaml.safe_load(to_yaml(base))
    return {name: _recipe(plain, changes, rate, search.minutes, name) for name, changes in routes.items()}


def _recipe(
    base: Mapping[str, Any], changes: Mapping[str, Any], rate: float | None, minutes: float, name: str
) -> Recipe:
    """Return the recipe of a path.

    Raises:
        ValueError: it changes what no path may, or cannot be run.
    """
    content = {**copy.deepcopy(dict(base)), "budget_minutes": minutes}
    for path, value in changes.items():
        if str(path).split(".")[0] not in _SECTIONS:
            raise UserError(f"path {name} changes {path!s:.60}; a path may change {', '.join(_SECTIONS)}")
        change(content, str(path), value, f"paths.{name}")
    content["stages"][0].setdefault("base_lr", rate)
    recipe = checked(content, f"path {name}")
    return replace(recipe, eval=replace(recipe.eval, tasks=_listed(recipe), zero_shot=None, retrieval=None))


def _listed(recipe: Recipe) -> list[str | dict[str, Any]]:
    """Return the evaluations of a path, the short forms among them, at the size of its last stage."""
    given = [dict(task) if isinstance(task, dict) else {"task": task} for task in recipe.eval.tasks]
    planned, size = recipe.eval.planned(), recipe.stages[-1].image_size
    given += [{"kind": task.kind} for task in planned[len(given) :]]
    sized = {} if size is None else {"image_size": size}
    return [{**sized, **content, "data": task.data} for content, task in zip(given, planned, strict=True)]
