"""The search for the best path through a budget of training time, by successive halving.

All paths train for a short time, and the best of them, from the beginning, for longer.

    search.yaml  report.md  front.png  winner.yaml
    rung1/PATH.yaml  rung1/PATH/  rung1/PATH.log  rung1/PATH.failed  rung2/...

In Jamieson and Talwalkar, 2016 (arXiv 1502.07943), a rung continues the one before. Here each rung is a whole schedule,
because the model in the middle of a longer schedule is worse than the same time can give.
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import yaml

from flipscale.evaluation.reports.curves import read_curve
from flipscale.evaluation.results import NOTHING, THIS_MODEL, Result
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.io.files import check_writable, read_text
from flipscale.io.options import Count, MinutesAboveZero, OpenShare, Positive, Range, changed_fields, check_ranges
from flipscale.io.text_table import markdown_table
from flipscale.studies.design import (
    change,
    check_name,
    checked,
    plain_number,
    read_fields,
    refuse_foreign,
    resolve_base,
)
from flipscale.studies.figures import draw_rungs
from flipscale.studies.runs import StudyRun, in_time, train_runs
from flipscale.training.recipe import Recipe, parse_recipe, to_yaml

_LISTS = ("tuning", "rates", "rungs", "keep")
# A path may change only what decides what is learned.
_SECTIONS = ("model", "data", "mask", "loss", "optim", "stages")


@dataclass(frozen=True)
class BudgetSearch:
    """The file of a search.

    Args:
        base: recipe to change: a name of the package, or a YAML file relative to the search's file.
        minutes: the budget: training time of the last rung.
        validation: name of the base's evaluation that chooses paths; no other evaluation is run.
        paths: changes of each path: values by their path in the recipe, and `stages` with shares of the budget.
        tuning: shares of the budget for the last of several stages; each makes a path of its own; the stages before
            divide the rest in proportion to their shares, or equally.
        rates: `base_lr` values of a first stage without a rate; each makes a path of its own; empty for the base's.
        rungs: minutes of the rungs before the last; empty for 1 / `eta` of the next rung.
        keep: number of paths that advance from each of those rungs; empty for 1 / `eta`, until `eta` are left.
        eta: ratio of the times of consecutive rungs.
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

    def expanded_paths(self) -> dict[str, dict[str, Any]]:
        """Return the changes of each path by name, a path for each share of tuning and each rate."""
        paths: dict[str, dict[str, Any]] = {}
        for name, changes in self.paths.items():
            stages = changes.get("stages")
            if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
                raise UserError(f"path {name}: stages must be a list, such as [{{name: whole, image_size: 32}}]")
            shares: Sequence[float | None] = (self.tuning if len(stages) > 1 else ()) or [None]
            rates: Sequence[float | None] = (self.rates if "base_lr" not in stages[0] else ()) or [None]
            for share, rate in itertools.product(shares, rates):
                full = name
                full += f"+tuned{share:g}" if len(shares) > 1 else ""
                full += f"+lr{rate:g}" if len(rates) > 1 else ""
                if full in paths:
                    raise UserError(f"two paths are called {full}; give each a name of its own, and each value once")
                paths[full] = {**changes, "stages": _stages(stages, share, rate)}
        return paths

    def kept(self, count: int) -> list[int]:
        """Return how many of `count` paths advance from each rung but the last."""
        if not self.keep:
            left, kept = count, list[int]()
            while len(kept) < len(self.rungs) if self.rungs else left > self.eta:
                left = math.ceil(left / self.eta)
                kept.append(left)
            return kept
        if self.rungs and len(self.keep) != len(self.rungs):
            raise UserError(f"keep has {len(self.keep)} numbers, and rungs has {len(self.rungs)}; give one for each")
        for before, after in itertools.pairwise([count, *self.keep]):
            if after >= before:
                raise UserError(f"keep is {list(self.keep)} of {count} paths; each rung must keep fewer than it has")
        return list(self.keep)

    def times(self, num_rungs: int) -> list[float]:
        """Return the minutes of each rung."""
        if not self.rungs:
            earlier = [float(f"{self.minutes / self.eta**left:.4g}") for left in range(num_rungs - 1, 0, -1)]
            return [*earlier, self.minutes]
        for before, after in itertools.pairwise([*self.rungs, self.minutes]):
            if after <= before:
                raise UserError(
                    f"rungs is {list(self.rungs)} of a budget of {self.minutes:g} minutes; each must be longer than "
                    "the one before, and all shorter than the budget"
                )
        return [*self.rungs, self.minutes]


def _stages(stages: Sequence[dict[str, Any]], tuning: float | None, rate: float | None) -> list[dict[str, Any]]:
    """Return the stages with their shares, and the first with its rate and warm-up."""
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
    made[0].setdefault("warmup_share", 0.05)
    return made


def read_search(file: Path) -> BudgetSearch:
    """Return the search in a file.

    Raises:
        UserError: the file is not a search.
        OSError: the file cannot be read.
    """
    given = read_fields(file, "search", ("base", "minutes", "validation", "paths"), (*_LISTS, "eta"))
    content = {name: plain_number(value) for name, value in given.items()}
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
        raise UserError(f"{file}: paths must have names and changes: 'paths: {{half: {{stages: [...]}}}}'")
    for name in paths:
        check_name(name, "a path", file)
    base = resolve_base(str(content["base"]), file)
    search = BudgetSearch(**{**content, "base": base, "validation": str(content["validation"])})
    check_ranges(search)
    return search


def _is_number(value: Any, is_whole: bool) -> bool:
    return type(value) is int or (type(value) is float and not is_whole)


def path_recipes(search: BudgetSearch) -> dict[str, Recipe]:
    """Return the recipe of each path for the whole budget, with all evaluations of the base at the size of the path's
    last stage. Each is checked as far as possible without its data.

    Raises:
        UserError: the base is not a recipe or lacks the evaluation, a path cannot be run, or there are fewer than two.
    """
    base, paths = parse_recipe(["--config", search.base]), search.expanded_paths()
    if len(paths) < 2:
        raise UserError(f"there is {len(paths)} path, which is nothing to choose from; give two or more")
    names = [task.name for task in base.eval.planned()]
    if search.validation not in names:
        has = f"has {', '.join(names)}" if names else "has none"
        raise UserError(
            f"validation is {search.validation!r:.60}, which is none of eval.tasks of {search.base}: it {has}; name "
            "one whose images no test has"
        )
    rate = base.stages[0].base_lr if base.stages else None
    plain = yaml.safe_load(to_yaml(base))
    return {name: _recipe(plain, changes, rate, search.minutes, name) for name, changes in paths.items()}


def _recipe(
    base: Mapping[str, Any], changes: Mapping[str, Any], rate: float | None, minutes: float, name: str
) -> Recipe:
    content = {**copy.deepcopy(dict(base)), "budget_minutes": minutes}
    for path, value in changes.items():
        if str(path).split(".")[0] not in _SECTIONS:
            raise UserError(f"path {name} changes {path!s:.60}; a path may change {', '.join(_SECTIONS)}")
        change(content, str(path), value, f"paths.{name}")
    content["stages"][0].setdefault("base_lr", rate)
    recipe = checked(content, f"path {name}")
    # Short forms of evaluations become listed ones, because only those have an image size.
    given = [dict(task) if isinstance(task, dict) else {"task": task} for task in recipe.eval.tasks]
    planned, size = recipe.eval.planned(), recipe.stages[-1].image_size
    given += [{"kind": task.kind} for task in planned[len(given) :]]
    sized = {} if size is None else {"image_size": size}
    tasks: list[str | dict[str, Any]] = [
        {**sized, **task, "data": own.data} for task, own in zip(given, planned, strict=True)
    ]
    return replace(recipe, eval=replace(recipe.eval, tasks=tasks, zero_shot=None, retrieval=None))


@dataclass(frozen=True)
class Trained:
    """A path's end in a rung.

    Args:
        failure: end of a failed run; empty for a finished run.
        result: result of the evaluation that chooses paths; None for a failed run.
        seconds: seconds of training.
        samples: number of pairs seen.
    """

    name: str
    failure: str
    result: Result | None = None
    seconds: float = 0.0
    samples: int = 0

    @property
    def badness(self) -> float:
        """Number to sort by: lower is better."""
        if self.result is None or not math.isfinite(self.result.value):
            return math.inf
        return -self.result.value if self.result.higher_is_better else self.result.value

    @property
    def cell(self) -> str:
        """Text in tables."""
        return "failed" if self.result is None else self.result.estimate_text


@dataclass(frozen=True)
class Rung:
    """The paths that trained for one time, in minutes."""

    minutes: float
    paths: Sequence[Trained]

    def best_first(self) -> list[Trained]:
        """Return the finished paths, best first; equals in the order of the file."""
        return sorted((path for path in self.paths if path.result is not None), key=lambda path: path.badness)


def search_paths(file: Path, output_dir: Path, workers: int) -> None:
    """Train the paths of a search rung by rung, and write the report, the figure and the winner's recipe. Finished runs
    are not trained again.

    Raises:
        UserError: the search is wrong, or the folder holds something else or another search.
        OSError: no path of a rung could be trained.
    """
    search = read_search(file)
    recipes = path_recipes(search)
    keep = search.kept(len(recipes))
    times = search.times(len(keep) + 1)
    counts = [len(recipes), *keep]
    _claim(search, recipes, times[0], file, output_dir)
    total = sum(count * minutes for count, minutes in zip(counts, times, strict=True))
    words = ", ".join(f"{count} for {minutes:g} min" for count, minutes in zip(counts, times, strict=True))
    print(f"{len(recipes)} paths: {words}; {total:,.0f} minutes of training by {workers} side by side", flush=True)
    rungs: list[Rung] = []
    left = list(recipes)
    for number, (minutes, count) in enumerate(zip(times, [*keep, 1], strict=True), 1):
        runs = [_run(search, name, recipes[name], minutes, output_dir / f"rung{number}") for name in left]
        print(f"rung {number} of {len(times)}: {minutes:g} min", flush=True)
        rungs.append(Rung(minutes, _train(runs, workers, search.validation)))
        left = [path.name for path in rungs[-1].best_first()][:count]
        if not left:
            failures = "; ".join(f"{path.name}: {path.failure}" for path in rungs[-1].paths)
            raise OSError(f"no path of rung {number} could be trained: {failures}")
    choice = _write_report(rungs, recipes, search.validation, output_dir)
    winner = replace(in_time(recipes[left[0]], search.minutes), output_dir=str(output_dir / "winner"))
    comment = f"# {left[0]}, of {len(recipes)} paths the best by {choice} after {search.minutes:g} minutes of training."
    write_text(output_dir / "winner.yaml", f"{comment}\n{to_yaml(winner)}")


def _claim(search: BudgetSearch, recipes: Mapping[str, Recipe], minutes: float, file: Path, output_dir: Path) -> None:
    """Write the search into its folder, unless it holds something else or a different search."""
    check_writable(output_dir, "output_dir")
    mark = output_dir / "search.yaml"
    refuse_foreign(output_dir, mark.name, "search")
    fields = dataclasses.asdict(search)
    content = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    changed = sorted(changed_fields(yaml.safe_load(read_text(mark)), content)) if mark.exists() else []
    runs = [_run(search, name, recipe, minutes, output_dir / "rung1") for name, recipe in recipes.items()]
    for run in runs if not changed else []:
        if run.beside("yaml").exists():
            saved = yaml.safe_load(read_text(run.beside("yaml")))
            now = {**yaml.safe_load(to_yaml(run.recipe)), "output_dir": saved.get("output_dir")}
            changed += sorted(changed_fields(saved, now, run.name))
    if changed:
        raise UserError(f"{output_dir} was begun otherwise than {file} ({'; '.join(changed)}); name another folder")
    output_dir.mkdir(parents=True, exist_ok=True)
    if not mark.exists():
        write_text(mark, yaml.safe_dump(content, sort_keys=False))


def _run(search: BudgetSearch, name: str, recipe: Recipe, minutes: float, folder: Path) -> StudyRun:
    """Return a path's run of a rung, with the evaluation that chooses paths once at its end."""
    place = [task.name for task in recipe.eval.planned()].index(search.validation)
    chosen = recipe.eval.tasks[place]
    assert isinstance(chosen, dict), "path_recipes lists all evaluations"
    evaluated = replace(recipe.eval, tasks=[{**chosen, "every_samples": 0}], every_samples=0, every_share=0.0)
    return StudyRun(name, replace(in_time(recipe, minutes), output_dir=str(folder / name), eval=evaluated))


def _train(runs: Sequence[StudyRun], workers: int, validation: str) -> list[Trained]:
    """Train the runs of a rung that have neither finished nor failed, and return the ends of all."""
    runs[0].run_dir.parent.mkdir(parents=True, exist_ok=True)
    for run in runs:
        write_text(run.beside("yaml"), to_yaml(run.recipe))
    failed = train_runs([run for run in runs if not run.beside("failed").exists()], workers)
    for run in runs:
        if run.name in failed:
            write_text(run.beside("failed"), failed[run.name][1] + "\n")
    ends = []
    for run in runs:
        if run.beside("failed").exists():
            ends.append(Trained(run.name, read_text(run.beside("failed")).strip()))
            continue
        curve = read_curve(run.run_dir)
        result = next(r for r in curve.results if r.task == validation and r.headline and r.who == THIS_MODEL)
        last = curve.records[-1]
        ends.append(Trained(run.name, "", result, last["trained_seconds"], last["samples_seen"]))
    return ends


def _write_report(rungs: Sequence[Rung], recipes: Mapping[str, Recipe], validation: str, output_dir: Path) -> str:
    """Write `report.md` and `front.png`, print the tables, and return the winner's metric and result."""
    best, ranked = [rung.best_first()[0] for rung in rungs], rungs[-1].best_first()
    last = best[-1].result
    assert last is not None
    words = f"{validation} {last.shown}"
    rows = [["training", "best path", "stages", "pairs seen", words]]
    for place, path in enumerate(best):
        if all(path.badness < before.badness for before in best[:place]):
            cells = [path.name, _stages_text(recipes[path.name]), f"{path.samples:,}", path.cell]
            rows.append([f"{rungs[place].minutes:g} min", *cells])
    parts = [markdown_table(rows, 3), _all_paths(rungs, recipes, words)]
    if last.low is not None and last.high is not None:
        near = [path.name for path in ranked[1:] if path.result and last.low <= path.result.value <= last.high]
        inside = f"the interval of {ranked[0].name}"
        lie = (
            f"Within {inside} lie {', '.join(near)}" if near else f"No other path of the last rung lies within {inside}"
        )
        parts.append(f"{lie}; each had one seed.")
    parts += unequal_clocks(rungs)
    failed = [
        f"- {path.name}, {rung.minutes:g} min: {path.failure}" for rung in rungs for path in rung.paths if path.failure
    ]
    if failed:
        parts.append("Failed, and out:\n\n" + "\n".join(failed))
    text = "\n\n".join(parts)
    write_text(output_dir / "report.md", f"# The search\n\n{text}\n")
    courses: dict[str, list[tuple[float, Result]]] = {name: [] for name in recipes}
    for rung in rungs:
        for path in rung.paths:
            if path.result:
                courses[path.name].append((60 * rung.minutes, path.result))
    draw_rungs(courses, f"{words}, {last.unit}".rstrip(", "), output_dir / "front.png")
    winner = output_dir / "winner.yaml"
    print(f"\n{text}\n\n{output_dir}: report.md, front.png, {winner.name}; flipscale pretrain --config {winner}")
    return f"{words}, {last.estimate_text},"


def _stages_text(recipe: Recipe) -> str:
    """Return the sizes, masks and shares of a path's stages: `32 px whole 85 %, 64 px whole 15 %`."""
    own = recipe.model_config().vision_config
    parts = []
    for stage in recipe.stages:
        masked = f"{100 * stage.mask_ratio:g} % masked ({recipe.mask.kind})" if stage.mask_ratio else "whole"
        parts.append(f"{stage.image_size or own.image_size} px {masked} {100 * (stage.share or 0.0):.3g} %")
    return ", ".join(parts)


def _all_paths(rungs: Sequence[Rung], recipes: Mapping[str, Recipe], words: str) -> str:
    """Return a row for each path with its result in each rung. Paths of later rungs come first."""
    by_name = [{path.name: path for path in rung.paths} for rung in rungs]
    order = dict.fromkeys([*(path.name for rung in reversed(rungs) for path in rung.best_first()), *recipes])
    rows = [[f"path, {words}", "stages", *(f"{rung.minutes:g} min" for rung in rungs)]]
    for name in order:
        cells = [paths[name].cell if name in paths else NOTHING for paths in by_name]
        rows.append([name, _stages_text(recipes[name]), *cells])
    return markdown_table(rows, 2)


def unequal_clocks(rungs: Sequence[Rung]) -> list[str]:
    """Return a line with the runs whose training time differs from their rung's."""
    late = [
        f"{path.name} {path.seconds:.1f} s in place of {60 * rung.minutes:.1f}"
        for rung in rungs
        for path in rung.paths
        if path.result and abs(path.seconds - 60 * rung.minutes) > 0.01 * 60 * rung.minutes
    ]
    return [f"Clocks that are more than 1 % off, which do not compare: {', '.join(late)}."] if late else []
