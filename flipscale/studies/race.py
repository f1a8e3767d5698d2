"""The race: recipes that train side by side for the same time, and are compared."""

import dataclasses
import filecmp
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from flipscale.evaluation.reports.comparison import (
    Curve,
    comparison_table,
    read_curve,
    record_baselines,
    seed_suffix,
)
from flipscale.evaluation.reports.seeds import times_to_equal
from flipscale.io.atomic import atomic_write, write_text
from flipscale.io.errors import UserError
from flipscale.io.files import check_writable, read_text
from flipscale.io.options import usable_cores
from flipscale.studies.pool import train_missing
from flipscale.studies.runs import StudyRun, in_time, train
from flipscale.training.recipe import Recipe, differences, parse_recipe, to_yaml

if TYPE_CHECKING:
    from flipscale.data.pairs import PairDataset

# Tells a folder of a study from others'.
_MARK = "study.json"
# Beside the runs.
_RESERVED = ("model", "figures")
# Clocks that differ by more are no equal ones.
_MOST_UNEQUAL = 0.01


def race(recipe_names: list[str], minutes: float, seeds: int, output_dir: Path, with_baselines: bool) -> None:
    """Train every recipe for the same time, with each seed, and write a table, figures and the first recipe's model.

    The runs of one seed train side by side, the seeds one after the other. Where there are more recipes than cores, as
    many runs as cores do, and the next one begins when one ends.

    Raises:
        ValueError: a recipe that cannot be run, or a folder that holds something else.
        OSError: a run failed.
    """
    # torch takes seconds to import, so it is where it is needed: `--help` waits for nothing.
    import torch

    names = [Path(recipe).stem for recipe in recipe_names]
    _refuse_folder(output_dir, recipe_names, names, seeds)
    recipes = [parse_recipe(["--config", recipe]) for recipe in recipe_names]
    heats = _plan(names, recipes, minutes, seeds, output_dir)
    runs = [run for heat in heats for run in heat]
    if torch.cuda.is_available() or len(recipes) <= usable_cores():
        for heat in heats:
            train(heat, "training")
    else:
        train_missing(runs, usable_cores())
    if with_baselines:
        _record_baselines(runs)
    _report(runs, output_dir)


def _report(runs: list[StudyRun], output_dir: Path) -> None:
    """Write the table, the figures and the model of the first run, and print the table."""
    from flipscale.evaluation.reports.figures import draw_loss, draw_masks, draw_patches, draw_result, result_figures

    curves = [read_curve(run.run_dir) for run in runs]
    table = "\n\n".join([comparison_table(curves), *times_to_equal(curves), *_unequal_clocks(curves)])
    figures = output_dir / "figures"
    figures.mkdir(exist_ok=True)
    draw_loss(curves, figures / "loss.png")
    for number, (name, result) in enumerate(result_figures(curves).items()):
        draw_result(curves, result, figures / f"{name}.png")
        if number == 0:
            shutil.copyfile(figures / f"{name}.png", output_dir / "accuracy.png")
    masked, whole = _datasets(runs[0].recipe)
    draw_patches(masked, whole, figures / "patches.png")
    draw_masks(whole, figures / "masks.png")
    write_text(output_dir / "table.md", table + "\n")
    model = _take_model(runs[0].run_dir, output_dir / "model")
    print(f"\n{table}\n\nfigures: {output_dir}/accuracy.png, {figures}/*.png   model: {model}")


def _unequal_clocks(curves: list[Curve]) -> list[str]:
    """Return a line that says so where the runs trained for different times."""
    seconds = [curve.records[-1]["trained_seconds"] for curve in curves]
    if max(seconds) <= (1 + _MOST_UNEQUAL) * min(seconds):
        return []
    return [f"The clocks differ by {max(seconds) / min(seconds) - 1:.1%}: the runs do not compare at equal time."]


def _record_baselines(runs: list[StudyRun]) -> None:
    """Append to every run's results, and put on its page, what the nearest training image achieves at the first
    recipe's first zero-shot task."""
    from flipscale.evaluation.nearest_neighbour import run_baselines
    from flipscale.hub.loading import load_with_tokenizer
    from flipscale.pages.report import offer_report

    recipe = runs[0].recipe
    for task in [task for task in recipe.eval.planned() if task.kind == "zero_shot"][:1]:
        baselines = run_baselines(recipe.data.shards, task)
        for run in runs:
            record_baselines(run.run_dir, baselines)
            offer_report(run.recipe, load_with_tokenizer)


def _take_model(run_dir: Path, model: Path) -> Path:
    """Copy a run's model folder to `model` and return that; both get a card that has the baselines too.

    Raises:
        ValueError: there is another model.
    """
    from flipscale.hub.card import write_card

    if not model.exists():
        with atomic_write(model) as partial:
            shutil.copytree(run_dir / "model", partial)
    weights = [file.name for file in (run_dir / "model").glob("*.safetensors")]
    if filecmp.cmpfiles(run_dir / "model", model, weights, shallow=False)[0] != weights:
        raise UserError(f"{model} is not the model of {run_dir}; move it away, and the same command writes that there")
    for folder in (run_dir / "model", model):
        write_card(folder, run_dir, str(folder))
    return model


def _refuse_folder(output_dir: Path, recipes: list[str], names: list[str], seeds: int) -> None:
    """Raise unless `output_dir` is this study's, or can become it.

    Raises:
        ValueError: two recipes have one name, or the folder holds something that no study wrote, or another study.
    """
    for place, name in enumerate(names):
        if name in names[:place]:
            raise UserError(
                f"{recipes[names.index(name)]} and {recipes[place]} have the same name, and each run's folder has its "
                "recipe's: rename one of the files"
            )
        if name in _RESERVED:
            raise UserError(f"{recipes[place]} has the name of what the study itself writes; rename the file")
        if not name.isprintable():
            raise UserError(f"{recipes[place]} has characters in its name that no run's may have; rename the file")
    check_writable(output_dir, "output_dir")
    if not output_dir.exists():
        return
    mark = output_dir / _MARK
    if mark.exists():
        begun = _begun(mark)
        # More seeds, or fewer of them, are the same study.
        if begun and (begun["recipes"], begun["seeds"] > 1) != (names, seeds > 1):
            words = f"{', '.join(begun['recipes'])}{' with seeds' if begun['seeds'] > 1 else ''}"
            raise UserError(f"{output_dir} holds a study of {words}; name another folder")
        return
    there = [path for path in sorted(output_dir.iterdir()) if not path.name.startswith(".")]
    if there:
        raise UserError(f"{output_dir} holds {there[0].name}, which no study wrote; name a new or an empty folder")


def _begun(mark: Path) -> dict | None:
    """Return what a study says of itself; None where that is damaged: the recipes beside the runs say it too."""
    try:
        found = json.loads(read_text(mark))
        return {"recipes": [str(name) for name in found["recipes"]], "seeds": int(found.get("seeds", 1))}
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _plan(
    names: list[str], recipes: list[Recipe], minutes: float, seeds: int, output_dir: Path
) -> list[list[StudyRun]]:
    """Return the runs of each seed, with recipes that end by their clock, also written to `output_dir/RUN.yaml`.

    Raises:
        ValueError: a recipe cannot be run, or the study was begun with other recipes or another time.
    """
    heats, timed_ones = [], {name: _timed(name, recipe, minutes) for name, recipe in zip(names, recipes, strict=True)}
    for number in range(seeds):
        heat = []
        for name, recipe in timed_ones.items():
            seed = recipe.seed + number
            own = name if seeds == 1 else name + seed_suffix(seed)
            timed = dataclasses.replace(recipe, seed=seed, output_dir=str(output_dir / own))
            heat.append(StudyRun(own, timed))
        heats.append(heat)
    for run in (run for heat in heats for run in heat):
        _refuse_change(run)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / _MARK, json.dumps({"recipes": names, "minutes": minutes, "seeds": seeds}) + "\n")
    for run in (run for heat in heats for run in heat):
        write_text(run.beside("yaml"), to_yaml(run.recipe))
    return heats


def _timed(name: str, recipe: Recipe, minutes: float) -> Recipe:
    """Return a recipe as `in_time` has it.

    Raises:
        ValueError: as `in_time`; the message names the recipe.
    """
    try:
        return in_time(recipe, minutes)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def _refuse_change(run: StudyRun) -> None:
    """Raise if a run was begun with another recipe than it is now.

    Raises:
        ValueError: it was.
    """
    file = run.beside("yaml")
    if not file.exists():
        return
    changed = differences(run.recipe, yaml.safe_load(read_text(file)))
    if changed:
        raise UserError(
            f"{run.run_dir} was begun with another recipe of that name ({'; '.join(changed)}); name another output_dir"
        )


def _datasets(recipe: Recipe) -> tuple["PairDataset", "PairDataset"]:
    """Return the training set as the first stage sees it, and the same samples without a mask."""
    from flipscale.data.pairs import InputShape, PairDataset
    from flipscale.data.sources.opening import open_source
    from flipscale.data.tokenizers import load_tokenizer

    config = recipe.model_config()
    source, shape = open_source(recipe.data), InputShape.of(config).at(recipe.stages[0].image_size)
    tokenizer = load_tokenizer(recipe.data.tokenizer, shape.max_tokens)
    ratios = (recipe.stages[0].mask_ratio, 0.0)
    masked, whole = (
        PairDataset(source, tokenizer, recipe.data, shape, recipe.seed, ratio, recipe.mask) for ratio in ratios
    )
    return masked, whole
