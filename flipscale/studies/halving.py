"""`flipscale study budget`: the best schedule for a training time, by successive halving.

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
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from flipscale.evaluation.presentation.curves import read_curve
from flipscale.evaluation.results import NOTHING, THIS_MODEL, Result
from flipscale.evaluation.suite import listed_tasks, planned_tasks
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.io.files import quoted, read_text
from flipscale.io.options import Count, MinutesAboveZero, OpenShare, changed_fields
from flipscale.io.text_table import markdown_table
from flipscale.recipe.recipe import Recipe, to_yaml
from flipscale.runs.complete_recipe import parse_recipe
from flipscale.studies.design import change, check_folder, check_names, checked, read_fields, resolve_base
from flipscale.studies.figures import draw_rungs
from flipscale.studies.runs import StudyRun, in_time, train_runs, write_recipes

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
        rungs: minutes of the rungs before the last.
        keep: number of paths that advance from each of those rungs.
        tuning: shares of the budget for the last of several stages; each makes a path of its own; the stages before
            divide the rest in proportion to their shares, or equally.
    """

    base: str
    minutes: MinutesAboveZero
    validation: str
    paths: dict[str, dict[str, Any]]
    rungs: list[MinutesAboveZero]
    keep: list[Count]
    tuning: list[OpenShare] = field(default_factory=list)

    def expanded_paths(self) -> dict[str, dict[str, Any]]:
        """Return the changes of each path by name, a path for each share of tuning."""
        paths: dict[str, dict[str, Any]] = {}
        for name, changes in self.paths.items():
            stages = changes.get("stages")
            if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
                raise UserError(f"path {name}: stages must be a list, such as [{{name: whole, image_size: 32}}]")
            shares: Sequence[float | None] = (self.tuning if len(stages) > 1 else ()) or [None]
            for share in shares:
                full = name + (f"+tuned{share:g}" if len(shares) > 1 else "")
                if full in paths:
                    raise UserError(f"two paths are called {full}; give each a name of its own, and each value once")
                paths[full] = {**changes, "stages": _with_shares(stages, share)}
        return paths


def _with_shares(stages: Sequence[dict[str, Any]], tuning: float | None) -> list[dict[str, Any]]:
    """Return the stages with their shares, and the first with its warm-up."""
    made = copy.deepcopy(list(stages))
    if len(made) == 1:
        made[0].setdefault("share", 1.0)
    elif tuning is not None:
        total = sum(stage.get("share", 1.0) for stage in made[:-1])
        for stage in made[:-1]:
            stage["share"] = round((1.0 - tuning) * stage.get("share", 1.0) / total, 6)
        made[-1]["share"] = tuning
    made[0].setdefault("warmup_share", 0.05)
    return made


def read_search(file: Path) -> BudgetSearch:
    """Return the search in a file. Raises as `read_fields`."""
    search = read_fields(file, BudgetSearch)
    check_names(search.paths, file)
    times, counts = [*search.rungs, search.minutes], [len(search.expanded_paths()), *search.keep]
    if len(times) != len(counts):
        raise UserError(f"{file}: keep is {search.keep}, and rungs is {search.rungs}; give a number for each rung")
    if any(after <= before for before, after in itertools.pairwise(times)):
        raise UserError(f"{file}: rungs is {search.rungs} of {search.minutes:g} minutes; each must take longer")
    if counts[0] < 2 or any(after >= before for before, after in itertools.pairwise(counts)):
        raise UserError(f"{file}: keep is {search.keep} of {counts[0]} paths; each rung must keep fewer than it has")
    return replace(search, base=resolve_base(search.base, file))


def path_recipes(search: BudgetSearch) -> dict[str, Recipe]:
    """Return the recipe of each path for the whole budget, with the evaluations of the base at the size of the path's
    last stage. Raise UserError if the base is not a recipe or lacks the evaluation, or a path cannot be run."""
    base = parse_recipe(["--config", search.base])
    planned = planned_tasks(base.eval)
    if search.validation not in (names := [task.name for task in planned]):
        raise UserError(
            f"validation is {search.validation!r:.60}; name one of the eval.tasks of {search.base}, whose images no "
            f"test has: {', '.join(names)}"
        )
    # Short forms of evaluations become listed ones, because only those have an image size.
    tasks = [{**task, "data": own.data} for task, own in zip(listed_tasks(base.eval), planned, strict=True)]
    recipes = {}
    for name, changes in search.expanded_paths().items():
        for path in changes:
            if path.split(".")[0] not in _SECTIONS:
                raise UserError(f"path {name} changes {path:.60}; a path may change {', '.join(_SECTIONS)}")
        content = {**yaml.safe_load(to_yaml(base)), "budget_minutes": search.minutes}
        change(content, changes, f"paths.{name}")
        content["stages"][0].setdefault("base_lr", base.stages[0].base_lr if base.stages else None)
        size = content["stages"][-1].get("image_size")
        sized = [{"image_size": size, **task} if size else task for task in tasks]
        content["eval"] |= {"tasks": sized, "zero_shot": None, "retrieval": None}
        recipes[name] = checked(content, f"path {name}")
    return recipes


@dataclass(frozen=True)
class Rung:
    """The paths that trained for one time, in minutes.

    Args:
        results: results that choose paths, by name, best first; equals in the order of the file.
        failures: reasons of the paths that failed.
    """

    minutes: float
    results: dict[str, Result]
    failures: dict[str, str]

    def cell(self, name: str) -> str:
        """Return a path's result as text in tables, the best of the rung in bold."""
        if name not in self.results:
            return "failed" if name in self.failures else NOTHING
        text = self.results[name].estimate_text
        return f"**{text}**" if name == next(iter(self.results)) else text


def search_paths(file: Path, output_dir: Path, workers: int) -> None:
    """Train the unfinished paths of a search rung by rung, and write the report, the figure and the winner's recipe.

    Raises:
        UserError: the search is wrong, or the folder holds something else or another search.
        OSError: no path of a rung could be trained.
    """
    search = read_search(file)
    recipes = path_recipes(search)
    mark, content = output_dir / "search.yaml", dataclasses.asdict(search)
    check_folder(output_dir, mark.name, "search")
    if changed := sorted(changed_fields(yaml.safe_load(read_text(mark)), content)) if mark.exists() else []:
        raise UserError(f"{output_dir} holds another search than {file} ({'; '.join(changed)}); name another folder")
    times, counts = [*search.rungs, search.minutes], [len(recipes), *search.keep, 1]
    total = sum(count * minutes for count, minutes in zip(counts, times, strict=False))
    words = ", ".join(f"{count} for {minutes:g} min" for count, minutes in zip(counts, times, strict=False))
    print(f"{len(recipes)} paths: {words}; {total:,.0f} minutes of training by {workers} side by side", flush=True)
    rungs: list[Rung] = []
    left = list(recipes)
    for number, (minutes, kept) in enumerate(zip(times, counts[1:], strict=True), 1):
        runs = [_run(search, name, recipes[name], minutes, output_dir / f"rung{number}") for name in left]
        print(f"rung {number} of {len(times)}: {minutes:g} min", flush=True)
        write_recipes(runs, mark, yaml.safe_dump(content, sort_keys=False))
        rungs.append(_train(runs, workers, search.validation, minutes))
        left = list(rungs[-1].results)[:kept]
        if not left:
            failures = "; ".join(f"{name}: {failure}" for name, failure in rungs[-1].failures.items())
            raise OSError(f"no path of rung {number} could be trained: {failures}")
    choice = _write_report(rungs, search.validation, output_dir)
    winner = replace(in_time(recipes[left[0]], search.minutes), output_dir=str(output_dir / "winner"))
    comment = f"# {left[0]}, of {len(recipes)} paths the best by {choice} after {search.minutes:g} minutes of training."
    write_text(output_dir / "winner.yaml", f"{comment}\n{to_yaml(winner)}")


def _run(search: BudgetSearch, name: str, recipe: Recipe, minutes: float, folder: Path) -> StudyRun:
    """Return a path's run of a rung, with the evaluation that chooses paths once at its end."""
    place = [task.name for task in planned_tasks(recipe.eval)].index(search.validation)
    chosen = recipe.eval.tasks[place]
    assert isinstance(chosen, dict), "path_recipes lists all evaluations"
    evaluated = replace(recipe.eval, tasks=[{**chosen, "every_samples": 0}], every_samples=0, every_share=0.0)
    return StudyRun(name, replace(in_time(recipe, minutes), output_dir=str(folder / name), eval=evaluated))


def _train(runs: Sequence[StudyRun], workers: int, validation: str, minutes: float) -> Rung:
    """Train the runs of a rung that have neither finished nor failed, and return the rung."""
    failed = train_runs([run for run in runs if not run.beside("failed").exists()], workers)
    rung = Rung(minutes, {}, {})
    for run in runs:
        if run.name in failed:
            write_text(run.beside("failed"), failed[run.name][1] + "\n")
        if run.beside("failed").exists():
            rung.failures[run.name] = read_text(run.beside("failed")).strip()
            continue
        results = read_curve(run.run_dir).results
        own = [r for r in results if r.task == validation and r.headline and r.who == THIS_MODEL]
        rung.results[run.name] = own[0]

    def badness(name: str) -> float:
        result = rung.results[name]
        if not math.isfinite(result.value):
            return math.inf
        return -result.value if result.higher_is_better else result.value

    return replace(rung, results={name: rung.results[name] for name in sorted(rung.results, key=badness)})


def _write_report(rungs: Sequence[Rung], validation: str, output_dir: Path) -> str:
    """Write `report.md` and `front.png`, print the table, and return the winner's metric and result."""
    results = rungs[-1].results
    winner, *others = results
    last = results[winner]
    words = f"{validation} {last.shown}"
    # Paths of later rungs come first.
    order = dict.fromkeys([*(name for rung in reversed(rungs) for name in rung.results), *rungs[0].failures])
    table = [[f"path, {words}", *(f"{rung.minutes:g} min" for rung in rungs)]]
    table += [[name, *(rung.cell(name) for rung in rungs)] for name in order]
    parts = [markdown_table(table, 1)]
    if last.low is not None and last.high is not None:
        near = [name for name in others if last.low <= results[name].value <= last.high]
        parts.append(f"Within the interval of {winner}, of one seed, lie: {', '.join(near) or 'no other paths'}.")
    failed = [(name, rung.minutes, why) for rung in rungs for name, why in rung.failures.items()]
    if failed:
        parts.append("Failed, and out:\n\n" + "\n".join(f"- {n}, {minutes:g} min: {why}" for n, minutes, why in failed))
    text = "\n\n".join(parts)
    write_text(output_dir / "report.md", f"# The search\n\n{text}\n")
    courses: dict[str, list[tuple[float, Result]]] = {name: [] for name in order}
    for rung in rungs:
        for name, result in rung.results.items():
            courses[name].append((60 * rung.minutes, result))
    draw_rungs(courses, f"{words}, {last.unit}".rstrip(", "), output_dir / "front.png")
    command = f"flipscale pretrain --config {quoted(output_dir / 'winner.yaml')}"
    print(f"\n{text}\n\n{output_dir}: report.md, front.png, winner.yaml; {command}")
    return f"{words}, {last.estimate_text},"
