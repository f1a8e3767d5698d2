"""The lines that a run logs: its first and last block, its intervals and its results."""

import logging
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from flipscale.engines.device import attention_kernel
from flipscale.engines.launch import PRECISION, faster_precision, launched_precision, precision_in_words
from flipscale.evaluation.presentation.curves import read_curve
from flipscale.evaluation.presentation.figures import can_draw, draw_run
from flipscale.evaluation.results import CHANGES, Result, latest, read_results, with_changes
from flipscale.evaluation.suite import planned_tasks
from flipscale.evaluation.test_set import keep_class_names
from flipscale.io.atomic import sync
from flipscale.io.files import quoted
from flipscale.io.surroundings import known
from flipscale.io.text_table import duration
from flipscale.objectives.build import build_config
from flipscale.recipe.recipe import Recipe
from flipscale.training.console import only_describes
from flipscale.training.plan import Plan
from flipscale.training.run_directory import device_name, typed_command, write_run_files
from flipscale.training.run_summary import RunSummary
from flipscale.training.schedule import Stage
from flipscale.training.start import Start, watched

_log = logging.getLogger(__name__)

# Tasks of models that do not compare images with texts, by loss.kind.
OWN_TASKS = {"classify": "classification", "captioning": "captioning", "answer": "vqa"}


def begin_run(recipe: Recipe, plan: Plan, start: Start, engine: str, **facts: Any) -> None:
    """Write the first files of a run, and log its model, data, length and hardware; nothing except on the main process.
    `facts` are further fields of the record in `starts.jsonl`."""
    if not start.accelerator.is_main_process:
        return
    with watched(recipe, 0, "the building of the model"):
        num_processes, num_pairs, run_dir = start.accelerator.num_processes, len(plan.source), recipe.output_dir
        drawn = {weights.name: weights.composition for weights in plan.source.all_weights}
        if drawn:
            facts["composition"] = {name: asdict(composition) for name, composition in drawn.items()}
        facts["set_aside"] = start.set_aside
        before = (known(lambda: RunSummary(Path(run_dir)).environment) or {}).get("mixed_precision")
        now = launched_precision(os.environ)
        num_parameters = write_run_files(recipe, engine, num_processes, start.state, num_pairs, **facts)
        if plan.class_names:
            keep_class_names(Path(run_dir), plan.class_names)
        batch, vision = recipe.data.global_batch_size, build_config(recipe).vision_config
        is_timed, last = recipe.budget_minutes is not None, plan.schedule.stages[-1].last
        stages = ", ".join(_stage_words(stage, is_timed) for stage in plan.schedule.stages)
        times = last * batch / plan.source.num_drawn
        seen = "" if is_timed else f", each seen {f'{times:,.0f}' if times >= 10 else f'{times:.2g}'} times"
        size = f"{num_parameters / 1e6:,.1f} M" if num_parameters >= 1e5 else f"{num_parameters:,}"
        length = f"of {batch:,} pairs for {recipe.budget_minutes:g} min" if is_timed else f"{last:,} of {batch:,} pairs"
        data = recipe.data.shards or ", ".join(source.shards or source.dataset or "" for source in recipe.data.sources)
        rows = [
            ("model", f"{size} parameters, images of {vision.image_size} x {vision.image_size} pixels"),
            ("data", f"{num_pairs:,} pairs of {data}{seen}"),
            ("steps", f"{length}: {stages}"),
            ("device", device_name()),
            ("precision", precision_in_words(os.environ)),
            ("processes", f"{num_processes}, {engine}" if num_processes > 1 else "1"),
            ("evaluation", _evaluation_words(plan, recipe.eval.every_share)),
            ("run folder", f"{run_dir}; `flipscale status {quoted(run_dir)} --watch` follows it"),
        ]
        if (device := start.accelerator.device).type == "cuda":
            head_dim = vision.hidden_size // vision.num_attention_heads
            rows.insert(5, ("attention", attention_kernel(device, now == "bf16", head_dim)))
        if not start.step and (faster := faster_precision(os.environ)):
            rows.insert(5, ("faster", typed_command(faster[PRECISION]) or "mixed_precision bf16 in the launch file"))
        rows[2:2] = [(name.removeprefix("data."), str(composition)) for name, composition in drawn.items()]
        if recipe.model.frozen:
            rows.insert(1, ("frozen", ", ".join(recipe.model.frozen)))
        if (lora := recipe.optim.lora).rank is not None:
            words = f"LoRA of rank {lora.rank} on {', '.join(lora.modules)} of {', '.join(lora.towers)}"
            rows.insert(1, ("trained", words))
        head = f"training {run_dir}"
        if start.step:
            head = f"going on with {run_dir} from step {start.step:,}{'' if is_timed else f' of {last:,}'}"
        _log.info("%s", _block(head, rows))
        if start.step and before in ("no", "bf16") and before != now:
            named, keeps = {"no": "fp32", "bf16": "bf16"}, typed_command(before)
            fix = f"to keep {named[before]}: {keeps}" if keeps else f"set mixed_precision {before} in the launch file"
            _log.warning("the precision is %s, and was %s before; %s", named[now], named[before], fix)


def end_run(recipe: Recipe, num_steps: int, trained_seconds: float) -> None:
    """Main process only. Draw the figures of an exported run, mark it as done, and log where its results are."""
    run_dir = Path(recipe.output_dir)
    figures = draw_figures(run_dir)
    sync(run_dir)  # the model's name is on disk before the mark
    (run_dir / "DONE").touch()
    sync(run_dir)
    with only_describes("the last lines", run_dir):
        _log.info("%s", last_block(recipe, num_steps, trained_seconds, list(figures), latest(read_results(run_dir))))


def draw_figures(run_dir: Path) -> dict[str, str]:
    """Draw the figures of a run into `figures/`, and return their captions by name; empty if they cannot be drawn."""
    with only_describes(run_dir / "figures", run_dir):
        return draw_run(read_curve(run_dir), run_dir / "figures") if can_draw() else {}
    return {}


def last_block(recipe: Recipe, step: int, seconds: float, figures: Sequence[str], results: Sequence[Result]) -> str:
    """Return where the results of a finished run of `step` steps are, what they changed, and the next commands.
    `seconds` are of training; `results` has the last one of each task."""
    run_dir = Path(recipe.output_dir)
    model, own = run_dir / "model", OWN_TASKS.get(recipe.loss.kind)
    data = next((task.data for task in planned_tasks(recipe.eval) if task.kind == (own or "zero_shot")), "TEST_SET")
    undrawn = "none, as matplotlib is not installed: pip install 'flipscale[plots]'"
    changes = [one for one in with_changes(results) if one.headline and one.who in CHANGES]
    rows = [
        *((one.who, f"{one.task} {one.shown}, {one.estimate_text} against the model before") for one in changes),
        ("model", f"{model}, its card {model / 'README.md'}"),
        ("figures", f"{run_dir / 'figures'}: {', '.join(figures)}" if figures else undrawn),
        ("next", f"flipscale evaluate {quoted(model)} {evaluation_flags(recipe.loss.kind, data)}"),
        *([] if own else [("", f"flipscale search {quoted(model)} FOLDER 'what to look for'")]),
        ("", f"flipscale push {quoted(run_dir)} ORG/NAME"),
    ]
    pairs = step * recipe.data.global_batch_size
    return _block(f"done: {step:,} steps, {pairs:,} pairs in {duration(seconds)} of training", rows)


def evaluation_flags(loss_kind: str, data: str) -> str:
    """Return the flags of `flipscale evaluate` for a model of this loss on `data`."""
    if own := OWN_TASKS.get(loss_kind):
        fields = yaml.safe_dump({"kind": own, "data": data}, default_flow_style=True, sort_keys=False, width=1 << 20)
        return f"--task {shlex.quote(fields.strip())}"
    return f"--zero_shot {quoted(data)}"


def interval_line(place: str, record: Mapping[str, Any], seconds_left: float | None) -> str:
    """Return the loss, rate and speed of an interval by its record in `metrics.jsonl`.

    Args:
        place: position in the run, see `Schedule.words`.
        seconds_left: expected time to the end of the run; None at the end.
    """
    loss = f"{record['loss']:.3f}" if math.isfinite(record["loss"]) else "not finite"
    parts = [
        f"{place}, {record['stage']}: loss {loss}",
        f"learning rate {record['lr']:.2g}",
        f"{record['images_per_s']:,.0f} images/s",
        f"{record['data_wait_share']:.0%} waiting for data",
    ]
    replaced, skipped = record["num_replaced"], record["num_skipped"]
    if replaced:
        parts.append(f"{replaced:,} bad sample{'s' * (replaced != 1)} replaced")
    if skipped:
        parts.append(f"{skipped:,} step{'s' * (skipped != 1)} skipped as not finite")
    return ", ".join(parts if seconds_left is None else [*parts, f"{duration(seconds_left)} left"])


def results_line(step: int, results: Sequence[Result]) -> str:
    """Return the headline results of evaluations with their 95 % intervals."""
    shown = [result for result in results if result.headline] or results
    return f"step {step:,}: " + ", ".join(
        f"{one.task} {one.shown}{', group_by_caption' * bool(one.made_by.get('group_by_caption'))} {one.estimate_text}"
        for one in shown
    )


def _block(head: str, rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([head, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def _stage_words(stage: Stage, is_timed: bool) -> str:
    seen = f"at {stage.mask_ratio:.0%} masked" if stage.mask_ratio else "unmasked"
    if stage.image_size is not None:
        seen += f" of {stage.image_size} x {stage.image_size} pixels"
    if stage.frozen:
        seen += f" with {' and '.join(stage.frozen)} frozen"
    length = stage.last - stage.first
    words = f"{f'{length:.1%}' if is_timed else f'{length:,}'} {seen}"
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
