"""Train recipes side by side for the same time, one process each on its share of the cores, and compare them."""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from flipscale.data.pairs import InputShape, PairDataset
from flipscale.data.sources.opening import open_source
from flipscale.data.tokenizers import load_tokenizer
from flipscale.engines.device import bf16_is_faster
from flipscale.evaluation.nearest_neighbour import run_baselines
from flipscale.evaluation.recipe import EvalRecipe
from flipscale.evaluation.reports.comparison import comparison_table, read_curve, read_records, record_baselines
from flipscale.evaluation.reports.figures import draw_loss, draw_masks, draw_patches, draw_result, result_figures
from flipscale.files.command_line import number
from flipscale.files.ranges import MinutesAboveNone
from flipscale.hub.model_card import write_card
from flipscale.training.recipe import Recipe, parse_recipe, to_yaml
from flipscale.training.schedule import StageRecipe
from flipscale.training.tracking import LogRecipe

CALIBRATION_STEPS = 100
_POLL_SECONDS = 2.0
_REPORT_SECONDS = 30.0


@dataclass(frozen=True)
class StudyRun:
    """One recipe of the study and its run directory."""

    name: str
    recipe: Recipe

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.output_dir)

    def beside(self, extension: str) -> Path:
        """Return the path of a file beside the run directory, with the run's name."""
        return self.run_dir.parent / f"{self.name}.{extension}"

    @property
    def samples(self) -> int:
        return sum(stage.samples for stage in self.recipe.stages)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale study`."""
    parser.add_argument("recipes", nargs="+", help="Recipe files or names. The model of the first one is exported.")
    parser.add_argument(
        "--minutes",
        type=number(MinutesAboveNone),
        required=True,
        help="How long every recipe trains; all train at the same time.",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="The folder for runs, table, figures and model.")
    parser.add_argument(
        "--baselines", action="store_true", help="Compare with the nearest training image too, by pixels and by HOG."
    )


def run(args: argparse.Namespace) -> None:
    """Train every recipe for the same time and write a table, figures and the first recipe's model.

    Raises:
        ValueError: fewer cores than recipes, or a recipe that cannot be run.
        OSError: a run failed.
    """
    if not torch.cuda.is_available() and (os.cpu_count() or 1) < len(args.recipes):
        raise ValueError(
            f"{len(args.recipes)} recipes need as many cores, there are {os.cpu_count()}; run fewer at once"
        )
    recipes = [parse_recipe(["--config", recipe]) for recipe in args.recipes]
    names = [Path(recipe).stem for recipe in args.recipes]
    runs = _plan(names, recipes, args.minutes * 60, args.output_dir)
    _train(runs, "training")
    if args.baselines:
        _record_baselines(runs)
    curves = [read_curve(run.run_dir) for run in runs]
    table = comparison_table(curves)
    figures = args.output_dir / "figures"
    figures.mkdir(exist_ok=True)
    draw_loss(curves, figures / "loss.png")
    for name, result in result_figures(curves).items():
        draw_result(curves, result, figures / f"{name}.png")
    masked, whole = _datasets(runs[0].recipe)
    draw_patches(masked, whole, figures / "patches.png")
    draw_masks(whole, figures / "masks.png")
    (args.output_dir / "table.md").write_text(table + "\n")
    model = _take_model(runs[0].run_dir, args.output_dir / "model")
    print(f"\n{table}\n\nfigures: {figures}/*.png   model: {model}")


def _record_baselines(runs: list[StudyRun]) -> None:
    """Append to every run's results what the nearest training image achieves at the first recipe's first zero-shot
    task."""
    recipe = runs[0].recipe
    for task in [task for task in recipe.eval.planned() if task.kind == "zero_shot"][:1]:
        baselines = run_baselines(recipe.data.shards, task)
        for run in runs:
            record_baselines(run.run_dir, baselines)


def _take_model(run_dir: Path, model: Path) -> Path:
    """Copy a run's model folder to `model` and return that; both get a card that has the baselines too."""
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(run_dir / "model", model)
    for folder in (run_dir / "model", model):
        write_card(folder, run_dir, str(folder))
    return model


def _calibrate(names: list[str], recipes: list[Recipe], output_dir: Path) -> list[list[float]]:
    """Return the images a second of every stage of every recipe, measured with all recipes running at once."""
    folder = output_dir / "calibration"
    shutil.rmtree(folder, ignore_errors=True)
    runs = []
    for name, recipe in zip(names, recipes, strict=True):
        samples = CALIBRATION_STEPS * recipe.data.global_batch_size
        stages = [dataclasses.replace(stage, samples=samples, warmup_samples=0) for stage in recipe.stages]
        short = dataclasses.replace(
            recipe,
            stages=stages,
            log=LogRecipe(every_samples=samples // 4, report_to=[]),
            eval=EvalRecipe(),
            output_dir=str(folder / name),
        )
        runs.append(StudyRun(name, short))
    _train(runs, "calibrating")
    rates = []
    for run in runs:
        records = [record for record in read_records(run.run_dir) if "images_per_s" in record]
        # The last record of a stage: the first ones hold its start-up.
        rates.append([[r["images_per_s"] for r in records if r["stage"] == s.name][-1] for s in run.recipe.stages])
    shutil.rmtree(folder)
    return rates


def _plan(names: list[str], recipes: list[Recipe], seconds: float, output_dir: Path) -> list[StudyRun]:
    """Return the recipes with their stages stretched to last `seconds`, also written to `output_dir/NAME.yaml`.

    A study that was interrupted keeps the lengths that it began with.
    """
    files = [output_dir / f"{name}.yaml" for name in names]
    if not all(file.exists() for file in files):
        for file, recipe, rates in zip(files, recipes, _calibrate(names, recipes, output_dir), strict=True):
            planned = sum(stage.samples / rate for stage, rate in zip(recipe.stages, rates, strict=True))
            stages = [_stretched(stage, seconds / planned) for stage in recipe.stages]
            total = sum(stage.samples for stage in stages)
            scaled = dataclasses.replace(
                recipe,
                stages=stages,
                log=dataclasses.replace(recipe.log, every_samples=total // 60),
                eval=recipe.eval.every(total // 6),
                output_dir=str(output_dir / file.stem),
            )
            file.write_text(to_yaml(scaled))
            by_stage = ", ".join(f"{rate:,.0f}" for rate in rates)
            print(f"{file.stem}: {by_stage} pairs/s by stage, so {total:,} pairs in {seconds:.0f} s")
    return [StudyRun(file.stem, parse_recipe(["--config", str(file)])) for file in files]


def _stretched(stage: StageRecipe, factor: float) -> StageRecipe:
    return dataclasses.replace(
        stage, samples=round(stage.samples * factor), warmup_samples=round(stage.warmup_samples * factor)
    )


def _train(runs: list[StudyRun], doing: str) -> None:
    """Train all runs at the same time to their ends, with a progress bar (or a line now and then) for each.

    Raises:
        OSError: a run failed; its own last line is in the message.
    """
    # Once, before any run keeps the cores busy: all runs must train in the same precision.
    environment = _environment(len(runs))
    processes = []
    for run in runs:
        run.run_dir.parent.mkdir(parents=True, exist_ok=True)
        recipe_file = run.beside("yaml")
        recipe_file.write_text(to_yaml(run.recipe))
        command = [sys.executable, "-m", "flipscale.pretrain", "--config", str(recipe_file)]
        with open(run.beside("log"), "w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        _watch(runs, processes, doing)
    finally:
        for process in processes:
            process.terminate()
    for run, process in zip(runs, processes, strict=True):
        if process.wait() != 0:
            last = run.beside("log").read_text().strip().splitlines()[-1:]
            raise OSError(f"the run of {run.name} failed: {last[0] if last else 'no output'}")


def _environment(num_runs: int) -> dict[str, str]:
    """Return the environment of one run: its share of the cores, and bf16 where this CPU multiplies faster in it."""
    threads = max((os.cpu_count() or 1) // num_runs, 1)
    precision = "bf16" if torch.cuda.is_available() or bf16_is_faster() else "no"
    share = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return {"ACCELERATE_MIXED_PRECISION": precision, **share, **os.environ}


def _watch(runs: list[StudyRun], processes: list[subprocess.Popen], doing: str) -> None:
    bars = [
        tqdm(total=run.samples, desc=f"{doing} {run.name}", unit="pair", unit_scale=True, position=number, disable=None)
        for number, run in enumerate(runs)
    ]
    reported = time.monotonic()
    while any(process.poll() is None for process in processes):
        time.sleep(_POLL_SECONDS)
        for run, bar in zip(runs, bars, strict=True):
            records = read_records(run.run_dir)
            if records:
                bar.n = min(records[-1]["samples_seen"], run.samples)
                bar.refresh()
        if bars[0].disable and time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            print("; ".join(_line(run, doing) for run in runs), flush=True)
        if any(process.poll() not in (None, 0) for process in processes):
            break
    for bar in bars:
        bar.close()


def _line(run: StudyRun, doing: str) -> str:
    records = read_records(run.run_dir)
    losses = [record["loss"] for record in records if "loss" in record]
    seen = records[-1]["samples_seen"] if records else 0
    return f"{doing} {run.name}: {seen / run.samples:.0%}" + (f", loss {losses[-1]:.2f}" if losses else "")


def _datasets(recipe: Recipe) -> tuple[PairDataset, PairDataset]:
    """Return the training set as the first stage sees it, and the same samples without a mask."""
    config = recipe.model_config()
    source, shape = open_source(recipe.data), InputShape.of(config)
    tokenizer = load_tokenizer(recipe.data.tokenizer, shape.max_tokens)
    ratios = (recipe.stages[0].mask_ratio, 0.0)
    masked, whole = (
        PairDataset(source, tokenizer, recipe.data, shape, recipe.seed, ratio, recipe.mask) for ratio in ratios
    )
    return masked, whole
