"""The race: recipes that train side by side for the same time, and are compared."""

import dataclasses
import filecmp
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from flipscale.evaluation.reports.comparison import comparison_table, read_curve, record_baselines
from flipscale.files.aside import partial_path, refuse_unwritable, remove, write_text, written_aside
from flipscale.planning.calibration import shortened, stage_rates
from flipscale.studies.runs import StudyRun, train
from flipscale.training.recipe import Recipe, differences, parse_recipe, to_yaml
from flipscale.training.schedule import StageRecipe

if TYPE_CHECKING:
    from flipscale.data.pairs import PairDataset

CALIBRATION_STEPS = 100
# Tells a folder of a study from others'.
_MARK = "study.json"
# Beside the runs.
_RESERVED = ("model", "figures")


def race(recipe_names: list[str], minutes: float, output_dir: Path, with_baselines: bool) -> None:
    """Train every recipe for the same time and write a table, figures and the first recipe's model.

    Raises:
        ValueError: fewer cores than recipes, a recipe that cannot be run, or a folder that holds something else.
        OSError: a run failed.
    """
    # torch, and what draws with it, takes seconds to import, so it is where it is needed: `--help` waits for nothing.
    import torch

    from flipscale.evaluation.reports.figures import draw_loss, draw_masks, draw_patches, draw_result, result_figures

    names = [Path(recipe).stem for recipe in recipe_names]
    _refuse_folder(output_dir, recipe_names, names)
    if not torch.cuda.is_available() and (os.cpu_count() or 1) < len(recipe_names):
        raise ValueError(
            f"{len(recipe_names)} recipes need as many cores, there are {os.cpu_count()}; run fewer at once"
        )
    recipes = [parse_recipe(["--config", recipe]) for recipe in recipe_names]
    runs = _plan(names, recipes, minutes * 60, output_dir)
    train(runs, "training")
    if with_baselines:
        _record_baselines(runs)
    curves = [read_curve(run.run_dir) for run in runs]
    table = comparison_table(curves)
    figures = output_dir / "figures"
    figures.mkdir(exist_ok=True)
    draw_loss(curves, figures / "loss.png")
    for name, result in result_figures(curves).items():
        draw_result(curves, result, figures / f"{name}.png")
    masked, whole = _datasets(runs[0].recipe)
    draw_patches(masked, whole, figures / "patches.png")
    draw_masks(whole, figures / "masks.png")
    write_text(output_dir / "table.md", table + "\n")
    model = _take_model(runs[0].run_dir, output_dir / "model")
    print(f"\n{table}\n\nfigures: {figures}/*.png   model: {model}")


def _record_baselines(runs: list[StudyRun]) -> None:
    """Append to every run's results, and put on its page, what the nearest training image achieves at the first
    recipe's first zero-shot task."""
    from flipscale.evaluation.nearest_neighbour import run_baselines
    from flipscale.hub.loading import load_flip
    from flipscale.pages.report import offer_report

    recipe = runs[0].recipe
    for task in [task for task in recipe.eval.planned() if task.kind == "zero_shot"][:1]:
        baselines = run_baselines(recipe.data.shards, task)
        for run in runs:
            record_baselines(run.run_dir, baselines)
            offer_report(run.recipe, load_flip)


def _take_model(run_dir: Path, model: Path) -> Path:
    """Copy a run's model folder to `model` and return that; both get a card that has the baselines too.

    Raises:
        ValueError: there is another model.
    """
    from flipscale.hub.model_card import write_card

    if not model.exists():
        with written_aside(model) as partial:
            shutil.copytree(run_dir / "model", partial)
    weights = [file.name for file in (run_dir / "model").glob("*.safetensors")]
    if filecmp.cmpfiles(run_dir / "model", model, weights, shallow=False)[0] != weights:
        raise ValueError(f"{model} is not the model of {run_dir}; move it away, and the same command writes that there")
    for folder in (run_dir / "model", model):
        write_card(folder, run_dir, str(folder))
    return model


def _calibrate(names: list[str], recipes: list[Recipe], output_dir: Path) -> list[list[float]]:
    """Return the images a second of every stage of every recipe, measured with all recipes running at once."""
    folder = partial_path(output_dir / "calibration")
    remove(folder)
    runs = []
    for name, recipe in zip(names, recipes, strict=True):
        short = shortened(recipe, CALIBRATION_STEPS, folder / name)
        runs.append(StudyRun(name, short))
    train(runs, "calibrating")
    rates = [stage_rates(run.recipe) for run in runs]
    remove(folder)
    return rates


def _refuse_folder(output_dir: Path, recipes: list[str], names: list[str]) -> None:
    """Raise unless `output_dir` is this study's, or can become it.

    Raises:
        ValueError: two recipes have one name, or the folder holds something that no study wrote.
    """
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ValueError(
                f"{recipes[names.index(name)]} and {recipes[place]} have the same name, and each run's folder has its "
                "recipe's: rename one of the files"
            )
        if name in _RESERVED:
            raise ValueError(f"{recipes[place]} has the name of what the study itself writes; rename the file")
        if not name.isprintable():
            raise ValueError(f"{recipes[place]} has characters in its name that no run's may have; rename the file")
    refuse_unwritable(output_dir)
    if not output_dir.exists() or (output_dir / _MARK).exists():
        return
    there = [path for path in sorted(output_dir.iterdir()) if not path.name.startswith(".")]
    if there and not all(_is_plan(output_dir / f"{name}.yaml", output_dir / name) for name in names):
        raise ValueError(f"{output_dir} holds {there[0].name}, which no study wrote; name a new or an empty folder")


def _is_plan(file: Path, run_dir: Path) -> bool:
    """Return whether a file is the recipe of a study that was begun before studies had a mark."""
    return run_dir.is_dir() and file.is_file() and _load(file).output_dir == str(run_dir)


def _load(file: Path) -> Recipe:
    # Absolute: a name may begin with a dash.
    return parse_recipe(["--config", str(file.absolute())])


def _plan(names: list[str], recipes: list[Recipe], seconds: float, output_dir: Path) -> list[StudyRun]:
    """Return the recipes with their stages stretched to last `seconds`, also written to `output_dir/NAME.yaml`.

    A study that was interrupted keeps the lengths that it began with.

    Raises:
        ValueError: it began with other recipes.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / _MARK, json.dumps({"recipes": names, "minutes": seconds / 60}) + "\n")
    files = [output_dir / f"{name}.yaml" for name in names]
    if all(file.exists() for file in files):
        runs = [StudyRun(file.stem, _load(file)) for file in files]
        for run, recipe in zip(runs, recipes, strict=True):
            _refuse_change(run, recipe)
        return runs
    begun = [name for name in names if (output_dir / name / "recipe.yaml").exists()]
    if begun:
        raise ValueError(f"{output_dir} holds a study of {', '.join(begun)} and others; name another folder")
    for file, recipe, rates in zip(files, recipes, _calibrate(names, recipes, output_dir), strict=True):
        planned = sum(stage.samples / rate for stage, rate in zip(recipe.stages, rates, strict=True))
        stages = [_stretched(stage, seconds / planned, recipe.data.global_batch_size) for stage in recipe.stages]
        total = sum(stage.samples for stage in stages)
        scaled = dataclasses.replace(
            recipe,
            stages=stages,
            log=dataclasses.replace(recipe.log, every_samples=max(total // 60, 1)),
            eval=recipe.eval.every(max(total // 6, 1)),
            output_dir=str(output_dir / file.stem),
        )
        write_text(file, to_yaml(scaled))
        by_stage = ", ".join(f"{rate:,.0f}" for rate in rates)
        print(f"{file.stem}: {by_stage} pairs/s by stage, so {total:,} pairs in {seconds:.0f} s")
    return [StudyRun(file.stem, _load(file)) for file in files]


def _refuse_change(run: StudyRun, recipe: Recipe) -> None:
    """Raise if a run was planned from another recipe than it is now."""

    def without_lengths(recipe: Recipe) -> Recipe:
        stages = [dataclasses.replace(stage, samples=1, warmup_samples=0) for stage in recipe.stages]
        return dataclasses.replace(recipe, stages=stages)

    changed = differences(without_lengths(recipe), yaml.safe_load(to_yaml(without_lengths(run.recipe))))
    if changed:
        raise ValueError(
            f"{run.run_dir} was begun with another recipe of that name ({'; '.join(changed)}); name another output_dir"
        )


def _stretched(stage: StageRecipe, factor: float, batch_size: int) -> StageRecipe:
    """Return a stage of `factor` times the samples, a step's at least."""
    samples = max(round(stage.samples * factor), batch_size)
    return dataclasses.replace(
        stage, samples=samples, warmup_samples=min(round(stage.warmup_samples * factor), samples)
    )


def _datasets(recipe: Recipe) -> tuple["PairDataset", "PairDataset"]:
    """Return the training set as the first stage sees it, and the same samples without a mask."""
    from flipscale.data.pairs import InputShape, PairDataset
    from flipscale.data.sources.opening import open_source
    from flipscale.data.tokenizers import load_tokenizer

    config = recipe.model_config()
    source, shape = open_source(recipe.data), InputShape.of(config)
    tokenizer = load_tokenizer(recipe.data.tokenizer, shape.max_tokens)
    ratios = (recipe.stages[0].mask_ratio, 0.0)
    masked, whole = (
        PairDataset(source, tokenizer, recipe.data, shape, recipe.seed, ratio, recipe.mask) for ratio in ratios
    )
    return masked, whole
