"""Successive halving: all paths train for a short time, and the best of them, from the beginning, for longer ones.

search.yaml  rung1/PATH.yaml  rung1/PATH/  rung1/PATH.log  rung1/PATH.failed  rung2/...  report.md  front.png
winner.yaml

The rungs of Jamieson and Talwalkar, 2016 (arXiv:1502.07943), go on from where the last one stopped. Here each is a
whole schedule: the model in the middle of a longer one is worse than what the same time can give.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flipscale.evaluation.reports.comparison import read_curve
from flipscale.evaluation.results import THIS_MODEL
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.io.files import check_writable, read_text
from flipscale.io.options import changed_fields
from flipscale.studies.pool import train_some
from flipscale.studies.runs import StudyRun, in_time
from flipscale.studies.search.grid import Search, path_recipes, read_search
from flipscale.studies.search.report import Rung, Trained, best_first, write_search_report
from flipscale.training.recipe import Recipe, to_yaml

SEARCH_FILE = "search.yaml"


def search_paths(file: Path, output_dir: Path, workers: int) -> None:
    """Train the paths of a search, rung after rung, and write the report, the figure and the winner's recipe. What is
    done is not done again.

    Args:
        workers: how many runs train side by side.

    Raises:
        ValueError: as `read_search` and `path_recipes`, or the folder holds something else or another search.
        OSError: no path of a rung could be trained.
        SystemExit: the search was told to end; the runs have saved.
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
    for number, (minutes, count) in enumerate(zip(times, [*keep, 1], strict=True)):
        runs = [_run(search, name, recipes[name], minutes, output_dir / f"rung{number + 1}") for name in left]
        print(f"rung {number + 1} of {len(times)}: {minutes:g} min", flush=True)
        rungs.append(Rung(minutes, _trained(runs, workers, search.validation)))
        left = [path.name for path in best_first(rungs[-1].paths)][:count]
        if not left:
            failures = "; ".join(f"{path.name}: {path.failure}" for path in rungs[-1].paths)
            raise OSError(f"no path of rung {number + 1} could be trained: {failures}")
    winner = _finished(recipes[left[0]], search.minutes, output_dir / "winner")
    told = write_search_report(rungs, recipes, search.validation, output_dir)
    comment = f"# {left[0]}, of {len(recipes)} paths the best by {told} after {search.minutes:g} minutes of training.\n"
    write_text(output_dir / "winner.yaml", comment + to_yaml(winner))


def _claim(search: Search, recipes: Mapping[str, Recipe], minutes: float, file: Path, output_dir: Path) -> None:
    """Write the search and the runs of its first rung to its folder.

    Raises:
        ValueError: the folder holds something else, or a search that said otherwise.
    """
    check_writable(output_dir, "output_dir")
    mark = output_dir / SEARCH_FILE
    if output_dir.exists() and not mark.exists() and any(output_dir.iterdir()):
        there = sorted(output_dir.iterdir())[0].name
        raise UserError(f"{output_dir} holds {there}, which no search wrote; name a new or an empty folder")
    content = yaml.safe_load(yaml.safe_dump(_plain(search), sort_keys=False))
    changed = sorted(changed_fields(yaml.safe_load(read_text(mark)), content)) if mark.exists() else []
    runs = [_run(search, name, recipe, minutes, output_dir / "rung1") for name, recipe in recipes.items()]
    for run in runs if not changed else []:
        if run.beside("yaml").exists():
            saved = yaml.safe_load(read_text(run.beside("yaml")))
            now = {**yaml.safe_load(to_yaml(run.recipe)), "output_dir": saved.get("output_dir")}
            changed += sorted(changed_fields(saved, now, run.name))
    if changed:
        raise UserError(
            f"{output_dir} was begun otherwise than {file} says now ({'; '.join(changed)}); name another folder"
        )
    (output_dir / "rung1").mkdir(parents=True, exist_ok=True)
    if not mark.exists():
        write_text(mark, yaml.safe_dump(content, sort_keys=False))


def _plain(search: Search) -> dict[str, Any]:
    fields = dataclasses.asdict(search)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _run(search: Search, name: str, recipe: Recipe, minutes: float, folder: Path) -> StudyRun:
    """Return a path's run of a rung, which is evaluated once, at its end, by what paths are chosen by."""
    timed = _finished(recipe, minutes, folder / name)
    place = [task.name for task in recipe.eval.planned()].index(search.validation)
    judge = recipe.eval.tasks[place]
    assert isinstance(judge, dict), "path_recipes writes evaluations out"
    judged = dataclasses.replace(recipe.eval, tasks=[{**judge, "every_samples": 0}], every_samples=0, every_share=0.0)
    return StudyRun(name, dataclasses.replace(timed, eval=judged))


def _finished(recipe: Recipe, minutes: float, folder: Path) -> Recipe:
    return dataclasses.replace(in_time(recipe, minutes), output_dir=str(folder))


def _trained(runs: Sequence[StudyRun], workers: int, validation: str) -> list[Trained]:
    """Train those runs of a rung that are neither done nor have failed, and return what all have come to."""
    runs[0].run_dir.parent.mkdir(parents=True, exist_ok=True)
    for run in runs:
        write_text(run.beside("yaml"), to_yaml(run.recipe))
    for name, words in train_some([run for run in runs if not run.beside("failed").exists()], workers).items():
        write_text(next(run for run in runs if run.name == name).beside("failed"), words + "\n")
    return [_read(run, validation) for run in runs]


def _read(run: StudyRun, validation: str) -> Trained:
    if run.beside("failed").exists():
        return Trained(run.name, read_text(run.beside("failed")).strip())
    curve = read_curve(run.run_dir)
    results = [r for r in curve.results if r.task == validation and r.headline and r.who == THIS_MODEL]
    last = curve.records[-1]
    return Trained(run.name, "", results[0], last["trained_seconds"], last["samples_seen"])
