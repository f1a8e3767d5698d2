"""The race: recipes that train side by side for the same time, then a table, figures and the first recipe's model."""

import dataclasses
import filecmp
import json
import shutil
import textwrap
from pathlib import Path

import numpy as np
import torch
import yaml

from flipscale.data.masks import IMAGE_MASKS, keyed_patches
from flipscale.data.pairs import InputShape, PairDataset
from flipscale.data.sources.opening import open_source
from flipscale.data.tokenizers import load_tokenizer
from flipscale.evaluation.baselines import run_baselines
from flipscale.evaluation.reports.curves import (
    comparison_table,
    read_curve,
    record_baselines,
    seed_suffix,
    times_to_equal,
)
from flipscale.evaluation.reports.figures import draw_loss, draw_result, drawing_pyplot, result_figures, save_figure
from flipscale.hub.card import write_card
from flipscale.hub.loading import load_with_tokenizer
from flipscale.io.atomic import atomic_write, write_text
from flipscale.io.errors import UserError
from flipscale.io.files import check_writable, read_text
from flipscale.io.options import usable_cores
from flipscale.pages.report import offer_report
from flipscale.studies.design import refuse_foreign
from flipscale.studies.runs import StudyRun, in_time, train_missing, train_together
from flipscale.training.recipe import Recipe, differences, parse_recipe, to_yaml

# Marks a folder as a race's.
_MARK = "study.json"


def race(recipe_names: list[str], minutes: float, seeds: int, output_dir: Path, with_baselines: bool) -> None:
    """Train every recipe for the same time with each seed, and write a table, figures and the first recipe's model.

    The runs of one seed train side by side, one seed after the other. With more recipes than cores, as many runs as
    cores train at a time.

    Raises:
        UserError: a recipe cannot be run, or the folder holds something else.
        OSError: a run failed.
    """
    names = [Path(recipe).stem for recipe in recipe_names]
    _check_folder(output_dir, recipe_names, names, seeds)
    recipes = [parse_recipe(["--config", recipe]) for recipe in recipe_names]
    heats = _plan(names, recipes, minutes, seeds, output_dir)
    runs = [run for heat in heats for run in heat]
    if torch.cuda.is_available() or len(recipes) <= usable_cores():
        for heat in heats:
            train_together(heat)
    else:
        train_missing(runs, usable_cores())
    if with_baselines:
        # The nearest training image, at the first recipe's first zero-shot task, joins every run's results and page.
        first = runs[0].recipe
        for task in [task for task in first.eval.planned() if task.kind == "zero_shot"][:1]:
            baselines = run_baselines(first.data.shards, task)
            for run in runs:
                record_baselines(run.run_dir, baselines)
                offer_report(run.recipe, load_with_tokenizer)
    _report(runs, output_dir)


def _check_folder(output_dir: Path, recipes: list[str], names: list[str], seeds: int) -> None:
    """Raise unless `output_dir` is this race's or can become it, and the recipes' names can name runs."""
    for place, name in enumerate(names):
        if name in names[:place]:
            raise UserError(
                f"{recipes[names.index(name)]} and {recipes[place]} have the same name, and a run's folder has its "
                "recipe's name: rename one of the files"
            )
        if name in ("model", "figures"):
            raise UserError(f"{recipes[place]} is called like a part of the study's folder; rename the file")
        if not name.isprintable():
            raise UserError(f"{recipes[place]} has unprintable characters in its name; rename the file")
    check_writable(output_dir, "output_dir")
    refuse_foreign(output_dir, _MARK, "study")
    if (output_dir / _MARK).exists():
        begun = json.loads(read_text(output_dir / _MARK))
        # The number of seeds may change. Only a single seed has run names without the seed.
        if (begun["recipes"], begun["seeds"] > 1) != (names, seeds > 1):
            words = f"{', '.join(begun['recipes'])}{' with seeds' if begun['seeds'] > 1 else ''}"
            raise UserError(f"{output_dir} holds a study of {words}; name another folder")


def _plan(
    names: list[str], recipes: list[Recipe], minutes: float, seeds: int, output_dir: Path
) -> list[list[StudyRun]]:
    """Write the recipes of all runs to `output_dir/RUN.yaml`, to end by their clock. Return the runs of each seed."""
    timed = {}
    for name, recipe in zip(names, recipes, strict=True):
        try:
            timed[name] = in_time(recipe, minutes)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
    heats: list[list[StudyRun]] = [[] for _ in range(seeds)]
    for number, heat in enumerate(heats):
        for name, recipe in timed.items():
            seed = recipe.seed + number
            own = name if seeds == 1 else name + seed_suffix(seed)
            heat.append(StudyRun(own, dataclasses.replace(recipe, seed=seed, output_dir=str(output_dir / own))))
    runs = [run for heat in heats for run in heat]
    for run in runs:
        saved = run.beside("yaml")
        if changed := differences(run.recipe, yaml.safe_load(read_text(saved))) if saved.exists() else []:
            raise UserError(
                f"{run.run_dir} began with another recipe of that name ({'; '.join(changed)}); name another output_dir"
            )
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / _MARK, json.dumps({"recipes": names, "minutes": minutes, "seeds": seeds}) + "\n")
    for run in runs:
        write_text(run.beside("yaml"), to_yaml(run.recipe))
    return heats


def _report(runs: list[StudyRun], output_dir: Path) -> None:
    """Write the table, the figures and the first run's model, and print the table."""
    curves = [read_curve(run.run_dir) for run in runs]
    parts = [comparison_table(curves), *times_to_equal(curves)]
    seconds = [curve.records[-1]["trained_seconds"] for curve in curves]
    if max(seconds) > 1.01 * min(seconds):
        difference = max(seconds) / min(seconds) - 1
        parts.append(f"The clocks differ by {difference:.1%}: the runs do not compare at equal time.")
    table = "\n\n".join(parts)
    figures = output_dir / "figures"
    figures.mkdir(exist_ok=True)
    draw_loss(curves, figures / "loss.png")
    for number, (name, result) in enumerate(result_figures(curves).items()):
        draw_result(curves, result, figures / f"{name}.png")
        if number == 0:
            shutil.copyfile(figures / f"{name}.png", output_dir / "accuracy.png")
    # The training set under the first stage's mask, and the same samples without a mask.
    recipe = runs[0].recipe
    source, shape = open_source(recipe.data), InputShape.of(recipe.model_config()).at(recipe.stages[0].image_size)
    tokenizer = load_tokenizer(recipe.data.tokenizer, shape.max_tokens)
    masked, whole = (
        PairDataset(source, tokenizer, recipe.data, shape, recipe.seed, ratio, recipe.mask)
        for ratio in (recipe.stages[0].mask_ratio, 0.0)
    )
    _draw_patches(masked, whole, figures / "patches.png")
    _draw_masks(whole, figures / "masks.png")
    write_text(output_dir / "table.md", table + "\n")
    run_dir, model = runs[0].run_dir, output_dir / "model"
    if not model.exists():
        with atomic_write(model) as partial:
            shutil.copytree(run_dir / "model", partial)
    weights = [file.name for file in (run_dir / "model").glob("*.safetensors")]
    if filecmp.cmpfiles(run_dir / "model", model, weights, shallow=False)[0] != weights:
        raise UserError(f"{model} is not the model of {run_dir}; move it away, and run the same command again")
    # The cards include the baselines.
    for folder in (run_dir / "model", model):
        write_card(folder, run_dir, str(folder))
    print(f"\n{table}\n\nfigures: {output_dir}/accuracy.png, {figures}/*.png   model: {model}")


def _paste(patches: np.ndarray, index: np.ndarray, patch_size: int, side: int) -> np.ndarray:
    """Return a grey image with the patches at their places: uint8 `(side * patch_size, side * patch_size, 3)`."""
    image = np.full((side, side, 3, patch_size, patch_size), 190, np.uint8)
    rows, columns = np.divmod(index.astype(int), side)
    image[rows, columns] = patches.reshape(-1, 3, patch_size, patch_size)
    return image.transpose(0, 3, 1, 4, 2).reshape(side * patch_size, side * patch_size, 3)


def _draw_patches(masked: PairDataset, whole: PairDataset, path: Path) -> None:
    """Draw the first eight training samples: the crops, and the patches that the image encoder sees."""
    assert masked.tokenizer is not None
    pyplot, count = drawing_pyplot(), 8
    positions = list(range(count))
    seen, full = masked.__getitems__(positions), whole.__getitems__(positions)
    side, patch_size = masked.shape.image_size // masked.shape.patch_size, masked.shape.patch_size
    everything = np.arange(side * side)
    index = seen["patch_index"].numpy() if "patch_index" in seen else np.tile(everything, (count, 1))
    figure, axes = pyplot.subplots(2, count, figsize=(1.5 * count, 3.6), constrained_layout=True)
    for column in range(count):
        axes[0, column].imshow(_paste(full["patches"][column].numpy(), everything, patch_size, side))
        axes[1, column].imshow(_paste(seen["patches"][column].numpy(), index[column], patch_size, side))
        caption = str(masked.tokenizer.decode(full["input_ids"][column], skip_special_tokens=True)).strip()
        axes[0, column].set_title("\n".join(textwrap.wrap(caption, 24, max_lines=2, placeholder=" …")), fontsize=7)
    for axis in axes.flat:
        axis.set_axis_off()
    kept = masked.kept / masked.shape.num_patches
    figure.suptitle(f"Above: the crop. Below: the {kept:.0%} of its patches that the image encoder sees.", fontsize=9)
    save_figure(figure, path)


def _draw_masks(whole: PairDataset, path: Path) -> None:
    """Draw training samples under each kind of mask, and as two views without a common patch."""
    pyplot, samples = drawing_pyplot(), (4, 1, 9)
    positions, side, patch_size = np.asarray(samples), whole.shape.side, whole.shape.patch_size
    full = whole.__getitems__(positions.tolist())["patches"].numpy()
    shown = {"the crop": np.tile(np.arange(side * side), (len(samples), 1))}
    for kind in IMAGE_MASKS:
        shown[f"{kind}, 75%"] = keyed_patches(whole.seed, positions, side, 0.75, kind)[:, 0]
    views = keyed_patches(whole.seed, positions, side, 0.5, views=2)
    shown |= {"1st view of 50%": views[:, 0], "2nd view of 50%": views[:, 1]}
    size = (1.35 * len(shown), 1.35 * len(samples) + 0.3)
    figure, axes = pyplot.subplots(len(samples), len(shown), figsize=size, squeeze=False, constrained_layout=True)
    for column, (title, index) in enumerate(shown.items()):
        axes[0, column].set_title(title, fontsize=9)
        for row in range(len(samples)):
            axes[row, column].imshow(_paste(full[row, index[row]], index[row], patch_size, side))
            axes[row, column].set_axis_off()
    save_figure(figure, path)
