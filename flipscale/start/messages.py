"""The first lines that a start of a run logs, and the line of a stop."""

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flipscale.engines.device import attention_kernel
from flipscale.engines.launch import PRECISION, faster_precision, launched_precision, precision_in_words
from flipscale.io.paths import quoted
from flipscale.io.surroundings import known
from flipscale.io.text_table import headed_rows
from flipscale.io.urls import without_secrets
from flipscale.loop.between_steps import Evaluation
from flipscale.loop.inputs import Session, TrainingSetup
from flipscale.recipe.schedule import Schedule, Stage, Step
from flipscale.records.run_directory import device_name, typed_command, write_run_files
from flipscale.records.run_summary import RunSummary
from flipscale.start.processes import watched

_log = logging.getLogger(__name__)


def begin_run(
    setup: TrainingSetup, session: Session, engine: str, evaluations: Sequence[Evaluation], **facts: Any
) -> None:
    """Write the first files of a run, and log its model, data, length and hardware, on the main process only. `facts`
    are further fields of the record in `starts.jsonl`."""
    recipe, accelerator, step = setup.recipe, session.accelerator, session.step
    if not accelerator.is_main_process:
        return
    with watched(recipe, "the first records"):
        run_dir, num_pairs = recipe.output_dir, len(setup.source)
        drawn = {weights.name: weights.composition for weights in setup.source.all_weights}
        if drawn:
            facts["composition"] = {name: asdict(composition) for name, composition in drawn.items()}
        facts["set_aside"] = session.quarantined
        before = (known(lambda: RunSummary(Path(run_dir)).environment) or {}).get("mixed_precision")
        now = launched_precision(os.environ)
        num_parameters = write_run_files(recipe, engine, accelerator.num_processes, session.state, num_pairs, **facts)

        batch, vision, lora = recipe.data.global_batch_size, setup.config.vision_config, recipe.optim.lora
        is_timed, last = recipe.budget_minutes is not None, setup.schedule.stages[-1].last
        size = f"{num_parameters / 1e6:,.1f} M" if num_parameters >= 1e5 else f"{num_parameters:,}"
        rows = [("model", f"{size} parameters, images of {vision.image_size} x {vision.image_size} pixels")]
        if lora.rank is not None:
            towers = ", ".join(lora.towers)
            rows.append(("trained", f"LoRA of rank {lora.rank} on {', '.join(lora.modules)} of {towers}"))
        if recipe.model.frozen:
            rows.append(("frozen", ", ".join(recipe.model.frozen)))
        data = recipe.data.shards or ", ".join(source.shards or source.dataset or "" for source in recipe.data.sources)
        times = last * batch / setup.source.num_drawn
        seen = "" if is_timed else f", each seen {f'{times:,.0f}' if times >= 10 else f'{times:.2g}'} times"
        rows.append(("data", f"{num_pairs:,} pairs of {without_secrets(data)}{seen}"))
        rows += [(name.removeprefix("data."), str(composition)) for name, composition in drawn.items()]
        length = f"of {batch:,} pairs for {recipe.budget_minutes:g} min" if is_timed else f"{last:,} of {batch:,} pairs"
        rows.append(("steps", f"{length}: {', '.join(_stage_words(one, is_timed) for one in setup.schedule.stages)}"))
        rows += [("device", device_name()), ("precision", precision_in_words(os.environ))]
        if accelerator.device.type == "cuda":
            head_dim = vision.hidden_size // vision.num_attention_heads
            rows.append(("attention", attention_kernel(accelerator.device, now == "bf16", head_dim)))
        if not step and (faster := faster_precision(os.environ)):
            rows.append(("faster", typed_command(faster[PRECISION]) or "mixed_precision bf16 in the launch file"))
        rows += [
            ("processes", f"{accelerator.num_processes}, {engine}" if accelerator.num_processes > 1 else "1"),
            ("evaluation", _evaluation_words(evaluations, recipe.eval.every_share)),
            ("run folder", f"{run_dir}; `flipscale status {quoted(run_dir)} --watch` follows it"),
        ]
        to_go = "" if is_timed else f" of {last:,}"
        head = f"resuming {run_dir} from step {step:,}{to_go}" if step else f"training {run_dir}"
        _log.info("%s", headed_rows(head, rows))
        if step and before in ("no", "bf16") and before != now:
            named, keeps = {"no": "fp32", "bf16": "bf16"}, typed_command(before)
            fix = f"to keep {named[before]}: {keeps}" if keeps else f"set mixed_precision {before} in the launch file"
            _log.warning("the precision is %s, and was %s before; %s", named[now], named[before], fix)


def log_stop(schedule: Schedule, step: Step) -> None:
    """Log that the run has saved before `step` and stops, and how to resume it."""
    place, command = schedule.words(step.number, step.position), typed_command()
    how = f"resume with: {command}" if command else "the same command resumes the run"
    _log.info("stopped and saved at %s; %s", place, how)


def _stage_words(stage: Stage, is_timed: bool) -> str:
    seen = f"at {stage.mask_ratio:.0%} masked" if stage.mask_ratio else "unmasked"
    if stage.image_size is not None:
        seen += f" of {stage.image_size} x {stage.image_size} pixels"
    if stage.frozen:
        seen += f" with {' and '.join(stage.frozen)} frozen"
    length = stage.last - stage.first
    words = f"{f'{length:.1%}' if is_timed else f'{length:,}'} {seen}"
    return words if stage.name in words.split() else f"{words} ({stage.name})"


def _evaluation_words(evaluations: Sequence[Evaluation], every_share: float) -> str:
    if not evaluations:
        return "none; `eval` of the recipe names test sets"
    by_interval: dict[str, list[str]] = {}
    for task in evaluations:
        every = f" every {task.every_samples:,} pairs" if task.every_samples else ""
        if task.every_samples is None:
            every = f" every {every_share:.1%} of the time"
        by_interval.setdefault(every, []).append(task.name)
    parts = [f"{', '.join(names)}{every}" for every, names in by_interval.items()]
    return f"{'; '.join(parts)}{', and' * any(by_interval)} at the end"
