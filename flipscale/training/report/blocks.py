"""What a run says before its first step and after its last, a few lines each."""

from collections.abc import Sequence
from pathlib import Path

from flipscale.evaluation.results import CHANGES, Result, with_changes
from flipscale.training.recipe import Recipe
from flipscale.training.report.lines import duration
from flipscale.training.schedule import Stage
from flipscale.training.start import Plan, Start

# What measures models that were not taught to compare images with texts, by loss.kind.
OWN_TASKS = {"classify": "classification", "captioning": "captioning", "answer": "vqa"}


def first_block(
    recipe: Recipe, plan: Plan, start: Start, engine: str, num_parameters: int, device: str, precision: str
) -> str:
    """Return what is trained, on what and where to, in a few lines.

    Args:
        engine: the name of the engine.
        num_parameters: of the model.
        device: the name of what a process computes on.
        precision: of its products, in words.
    """
    batch = recipe.data.global_batch_size
    accelerator, run_dir = start.accelerator, recipe.output_dir
    processes, side = accelerator.num_processes, recipe.model_config().vision_config.image_size
    timed, last = recipe.budget_minutes is not None, plan.stages[-1].last
    stages = ", ".join(_stage_words(stage, timed) for stage in plan.stages)
    seen = "" if timed else f", each seen {_about(last * batch / len(plan.source))} times"
    length = f"of {batch:,} pairs for {recipe.budget_minutes:g} min" if timed else f"{last:,} of {batch:,} pairs"
    rows = [
        ("model", f"{_millions(num_parameters)} parameters, images of {side} x {side} pixels"),
        ("data", f"{len(plan.source):,} pairs of {_data_name(recipe)}{seen}"),
        ("steps", f"{length}: {stages}"),
        ("device", device),
        ("precision", precision),
        ("processes", f"{processes}, {engine}" if processes > 1 else "1"),
        ("evaluation", _evaluation_words(plan, recipe.eval.every_share)),
        ("run folder", f"{run_dir}; `flipscale status {run_dir} --watch` follows it"),
    ]
    head = f"training {run_dir}"
    if start.step:
        head = f"going on with {run_dir} from step {start.step:,}{'' if timed else f' of {last:,}'}"
    return _block(head, rows)


def last_block(recipe: Recipe, step: int, seconds: float, figures: Sequence[str], results: Sequence[Result]) -> str:
    """Return where a finished run's results are, what they changed, and what can be done with them.

    Args:
        step: how many steps it took.
        seconds: spent training.
        figures: the names of those that were drawn.
        results: the last of each task.
    """
    run_dir = Path(recipe.output_dir)
    model = run_dir / "model"
    own = OWN_TASKS.get(recipe.loss.kind)
    data = next((task.data for task in recipe.eval.planned() if task.kind == (own or "zero_shot")), "TEST_SET")
    undrawn = "none, as matplotlib is not installed: pip install 'flipscale[plots]'"
    changes = [one for one in with_changes(results) if one.headline and one.who in CHANGES]
    rows = [
        *((one.who, f"{one.task} {one.shown}, {one.estimate_text} against the model before") for one in changes),
        ("model", f"{model}, its card {model / 'README.md'}"),
        ("figures", f"{run_dir / 'figures'}: {', '.join(figures)}" if figures else undrawn),
        ("next", f"flipscale evaluate {model} {evaluation_flags(recipe.loss.kind, data)}"),
        *([] if own else [("", f"flipscale search {model} FOLDER 'what to look for'")]),
        ("", f"flipscale push {run_dir} ORG/NAME"),
    ]
    pairs = step * recipe.data.global_batch_size
    return _block(f"done: {step:,} steps, {pairs:,} pairs in {duration(seconds)} of training", rows)


def evaluation_flags(loss_kind: str, data: str) -> str:
    """Return the flags by which `flipscale evaluate` measures what a run of this loss has learned, on `data`."""
    own = OWN_TASKS.get(loss_kind)
    return f"--task '{{kind: {own}, data: {data}}}'" if own else f"--zero_shot {data}"


def _block(head: str, rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([head, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def _about(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"


def _data_name(recipe: Recipe) -> str:
    sources = [source.shards or source.dataset or "" for source in recipe.data.sources]
    return recipe.data.shards or ", ".join(sources)


def _stage_words(stage: Stage, timed: bool) -> str:
    seen = f"at {stage.mask_ratio:.0%} masked" if stage.mask_ratio else "unmasked"
    if stage.image_size is not None:
        seen += f" of {stage.image_size} x {stage.image_size} pixels"
    length = stage.last - stage.first
    words = f"{f'{length:.1%}' if timed else f'{length:,}'} {seen}"
    return words if stage.name in words.split() else f"{words} ({stage.name})"


def _evaluation_words(plan: Plan, every_share: float) -> str:
    if not plan.tasks:
        return "none; `eval` of the recipe names test sets"
    by_interval: dict[str, list[str]] = {}
    for task in plan.tasks:
        every = f" every {task.every_samples:,} pairs" if task.every_samples else ""
        if task.every_samples is None:
            every = f" every {every_share:.1%} of the time"
        by_interval.setdefault(every, []).append(task.name)
    parts = [f"{', '.join(names)}{every}" for every, names in by_interval.items()]
    return f"{'; '.join(parts)}{', and' * any(by_interval)} at the end"
