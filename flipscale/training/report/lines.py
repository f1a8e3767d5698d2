"""The lines of a run: what it begins with, how it goes, and how it ends."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flipscale.training.report.command import how_to_go_on
from flipscale.training.schedule import stage_of

if TYPE_CHECKING:
    from flipscale.evaluation.results import Result
    from flipscale.training.recipe import Recipe
    from flipscale.training.schedule import Stage
    from flipscale.training.start import Plan, Start


def first_block(
    recipe: "Recipe", plan: "Plan", start: "Start", engine: str, num_parameters: int, device: str, precision: str
) -> str:
    """Return what is trained, on what and where to, in a few lines.

    Args:
        engine: the name of the engine.
        num_parameters: of the model.
        device: the name of what a process computes on.
        precision: of its products, in words.
    """
    batch, total = recipe.data.global_batch_size, plan.stages[-1].last_step
    accelerator, run_dir = start.accelerator, recipe.output_dir
    processes, side = accelerator.num_processes, recipe.model_config().vision_config.image_size
    epochs = total * batch / len(plan.source)
    rows = {
        "model": f"{_millions(num_parameters)} parameters, images of {side} x {side} pixels",
        "data": f"{len(plan.source):,} pairs of {_data_name(recipe)}, each seen {_about(epochs)} times",
        "steps": f"{total:,} of {batch:,} pairs: {', '.join(map(_stage_words, plan.stages))}",
        "device": device,
        "precision": precision,
        "processes": f"{processes}, {engine}" if processes > 1 else "1",
        "evaluation": _evaluation_words(plan),
        "run folder": f"{run_dir}; `flipscale status {run_dir} --watch` follows it",
    }
    head = f"training {run_dir}"
    if start.step:
        head = f"going on with {run_dir} from step {start.step:,} of {total:,}"
    return _block(head, rows)


def last_block(recipe: "Recipe", step: int, seconds: float, figures: Sequence[str]) -> str:
    """Return where a finished run's results are, and what can be done with them.

    Args:
        step: how many steps it took.
        seconds: spent training.
        figures: the names of those that were drawn.
    """
    run_dir = Path(recipe.output_dir)
    tested = next((task.data for task in recipe.eval.planned() if task.kind == "zero_shot"), "TEST_SET")
    none = "none, as matplotlib is not installed: pip install 'flipscale[plots]'"
    rows = {
        "model": f"{run_dir / 'model'}, its card {run_dir / 'model/README.md'}",
        "figures": f"{run_dir / 'figures'}: {', '.join(figures)}" if figures else none,
        "next": f"flipscale evaluate {run_dir / 'model'} --zero_shot {tested}",
        "": f"flipscale push {run_dir} ORG/NAME",
    }
    pairs = step * recipe.data.global_batch_size
    return _block(f"done: {step:,} steps, {pairs:,} pairs in {duration(seconds)} of training", rows)


def stopped_line(step: int, total: int) -> str:
    """Return that a run has saved and ends, and how it goes on."""
    return f"stopped and saved at step {step:,} of {total:,}; {how_to_go_on()}"


def saved_line(step: int, checkpoint: Path) -> str:
    """Return that a checkpoint is on disk."""
    return f"step {step:,}: saved {checkpoint}"


def interval_line(step: int, total: int, record: Mapping[str, Any], left: float) -> str:
    """Return how a run goes.

    Args:
        step: how many steps are done.
        total: how many it has.
        record: of the interval, as `metrics.jsonl` has it.
        left: the seconds that it still takes.
    """
    loss = f"{record['loss']:.3f}" if math.isfinite(record["loss"]) else "not finite"
    parts = [
        f"step {step:,} of {total:,} ({step / total:.0%}), {record['stage']}: loss {loss}",
        f"learning rate {record['lr']:.2g}",
        f"{record['images_per_s']:,.0f} images/s",
        f"{record['data_wait_share']:.0%} waiting for data",
    ]
    for name, words in (("num_replaced", "bad samples replaced"), ("num_skipped", "steps skipped as not finite")):
        if record[name]:
            parts.append(f"{record[name]:,} {words}")
    return ", ".join([*parts, f"{duration(left)} left"] if step < total else parts)


def results_line(step: int, results: Sequence["Result"]) -> str:
    """Return what evaluations found: the headlines with their 95 % intervals."""
    shown = [result for result in results if result.headline] or results
    return f"step {step:,}: " + ", ".join(f"{one.task} {one.shown} {one.estimate_text}" for one in shown)


def expected_line(seconds: float, step_seconds: float) -> str:
    """Return how long a run takes from now on."""
    return f"about {duration(seconds)} to go at {step_seconds:.2g} s a step, evaluations and saves left out"


def seconds_left(stages: Sequence["Stage"], pair_flops: Mapping[str, int], step: int, step_seconds: float) -> float:
    """Return how long the steps from `step` on take, those of other stages by their operations.

    Args:
        pair_flops: the operations of a pair in each stage, by its name.
        step_seconds: of the step before.
    """
    measured = pair_flops[stage_of(stages, step - 1).name]
    left = ((one.name, one.last_step - max(one.first_step, step)) for one in stages)
    return sum(step_seconds * pair_flops[name] / measured * steps for name, steps in left if steps > 0)


def duration(seconds: float) -> str:
    """Return a time span in its two largest units: `3 d 4 h`, `12 min 5 s`, `8 s`."""
    left = round(seconds)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def _block(head: str, rows: Mapping[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join([head, *(f"  {name:<{width}}  {value}" for name, value in rows.items() if value)])


def _about(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"


def _data_name(recipe: "Recipe") -> str:
    sources = [source.shards or source.dataset or "" for source in recipe.data.sources]
    return recipe.data.shards or ", ".join(sources)


def _stage_words(stage: "Stage") -> str:
    masked = f"at {stage.mask_ratio:.0%} masked" if stage.mask_ratio else "unmasked"
    words = f"{stage.last_step - stage.first_step:,} {masked}"
    return words if stage.name in words.split() else f"{words} ({stage.name})"


def _evaluation_words(plan: "Plan") -> str:
    tasks = [
        f"{task.name} every {task.every_samples:,} pairs" if task.every_samples else task.name for task in plan.tasks
    ]
    return f"{', '.join(tasks)} and at the end" if tasks else "none; `eval` of the recipe names test sets"
