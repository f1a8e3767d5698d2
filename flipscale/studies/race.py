"""The race: recipes that train side by side for the same time, then a table, figures and the first recipe's model."""

import dataclasses
import json
import shutil
from pathlib import Path

import torch

from flipscale.evaluation.presentation.curves import (
    comparison_table,
    read_curve,
    record_baselines,
    seed_suffix,
    times_to_equal,
)
from flipscale.evaluation.presentation.figures import draw_curves
from flipscale.evaluation.results import read_baselines
from flipscale.evaluation.suite import planned_tasks
from flipscale.hub.card import write_card
from flipscale.hub.export import check_replaceable
from flipscale.hub.loading import load_with_tokenizer
from flipscale.io.atomic import atomic_write, write_text
from flipscale.io.cores import usable_cores
from flipscale.io.errors import UserError
from flipscale.io.model_folder import read_object
from flipscale.io.options import Count, check_entries
from flipscale.pages.run_page import offer_page
from flipscale.process.console import only_describes
from flipscale.start.complete_recipe import parse_recipe
from flipscale.studies.design import check_study_folder
from flipscale.studies.runs import StudyRun, in_time, train_missing, train_runs, write_recipes

# Marks a folder as a race's.
_MARK = "study.json"


def race(recipe_names: list[str], minutes: float, seeds: int, output_dir: Path, baselines: Path | None) -> None:
    """Train every recipe for the same time with each seed, and write a table, figures and the first recipe's model.

    The runs of one seed train side by side, as many at a time as there are cores, one seed after the other.

    Raises:
        UserError: a recipe cannot be run, the folder holds something else, or the file of baselines is not for the
            first recipe.
        OSError: a run failed.
    """
    names = [Path(recipe).stem for recipe in recipe_names]
    _check_folder(output_dir, recipe_names, names, seeds)
    heats: list[list[StudyRun]] = [[] for _ in range(seeds)]
    for name, file in zip(names, recipe_names, strict=True):
        try:
            recipe = in_time(parse_recipe(["--config", file, "--budget_minutes", str(minutes)]), minutes)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
        for number, heat in enumerate(heats):
            seed = recipe.seed + number
            own = name if seeds == 1 else name + seed_suffix(seed)
            heat.append(StudyRun(own, dataclasses.replace(recipe, seed=seed, output_dir=str(output_dir / own))))
    runs = [run for heat in heats for run in heat]
    first = runs[0].recipe
    levels = read_baselines(baselines) if baselines else []
    if strange := {level.task for level in levels} - {task.name for task in planned_tasks(first.eval)}:
        raise UserError(
            f"--baselines is {baselines}, of task {min(strange)!r}; expected a task of {recipe_names[0]}. Write it "
            "again with --task"
        )
    mark = json.dumps({"recipes": names, "minutes": minutes, "seeds": seeds}) + "\n"
    write_recipes(runs, output_dir / _MARK, mark)
    if torch.cuda.is_available() or len(names) <= usable_cores():
        for number, heat in enumerate(heats, 1):
            failed = train_runs(heat, len(heat), stops_at_failure=True, later=runs[number * len(heat) :])
            for name, (code, text) in failed.items():
                raise (UserError if code == 2 else OSError)(f"the run of {name} {text}")
    else:
        train_missing(runs, usable_cores())
    for run in runs if levels else []:
        record_baselines(run.run_dir, levels)
        offer_page(run.recipe, load_with_tokenizer)
    _report(runs, output_dir)


def _check_folder(output_dir: Path, recipes: list[str], names: list[str], seeds: int) -> None:
    """Raise unless `output_dir` is this race's or can become it, and the recipes' names can name runs."""
    for recipe, name in zip(recipes, names, strict=True):
        if names.count(name) > 1 or name in ("model", "figures") or not name.isprintable():
            raise UserError(
                f"{recipe!r} is named {name!r}, and a run's folder has its recipe's name; rename the file, to be "
                "printable, unlike the other names, and neither model nor figures"
            )
    check_study_folder(output_dir, _MARK)
    check_replaceable(output_dir / "model")
    if (output_dir / _MARK).exists():
        remedy = "name another folder, or remove it"
        begun = read_object(output_dir / _MARK, remedy)
        check_entries(begun, {"recipes": list, "seeds": Count}, output_dir / _MARK, remedy)
        # The number of seeds may change. Only a single seed has run names without the seed.
        if (begun["recipes"], begun["seeds"] > 1) != (names, seeds > 1):
            words = f"{', '.join(map(str, begun['recipes']))}{' with seeds' if begun['seeds'] > 1 else ''}"
            raise UserError(f"{output_dir} holds a study of {words}; name another folder")


def _report(runs: list[StudyRun], output_dir: Path) -> None:
    """Write the table, the figures and the first run's model, and print the table."""
    curves = [read_curve(run.run_dir) for run in runs]
    parts = [comparison_table(curves), *times_to_equal(curves)]
    seconds = [curve.records[-1]["trained_seconds"] for curve in curves]
    if max(seconds) > 1.01 * min(seconds):
        difference = max(seconds) / min(seconds) - 1
        parts.append(f"The clocks differ by {difference:.1%}: the runs do not compare at equal time.")
    table = "\n\n".join(parts)
    write_text(output_dir / "table.md", table + "\n")
    figures = output_dir / "figures"
    with only_describes(figures, output_dir):
        results = [name for name, result in draw_curves(curves, figures) if result]
        for name in results[:1]:
            shutil.copyfile(figures / f"{name}.png", output_dir / "accuracy.png")
    run_dir, model = runs[0].run_dir, output_dir / "model"
    with atomic_write(model) as partial:
        shutil.copytree(run_dir / "model", partial)
    # The cards include the baselines.
    for folder in (run_dir / "model", model):
        write_card(folder, run_dir, str(folder))
    print(f"\n{table}\n\nfigures: {output_dir}/accuracy.png, {figures}/*.png   model: {model}")
