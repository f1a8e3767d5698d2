"""The end of a run: its figures, its mark, and the lines that say where its results are."""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from flipscale.evaluation.presentation.curves import read_curve
from flipscale.evaluation.presentation.figures import can_draw, draw_run
from flipscale.evaluation.results import CHANGES, LOST, Result, latest, read_results, with_changes
from flipscale.evaluation.suite import planned_tasks
from flipscale.io.atomic import sync
from flipscale.io.paths import quoted
from flipscale.io.text_table import duration, headed_rows
from flipscale.process.console import only_describes
from flipscale.recipe.recipe import Recipe

_log = logging.getLogger(__name__)

# Tasks of models that do not compare images with texts, by loss.kind.
OWN_TASKS = {"classify": "classification", "captioning": "captioning", "answer": "vqa"}


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
    data = {task.kind: task.data for task in reversed(planned_tasks(recipe.eval))}
    kind = own or ("retrieval" if "retrieval" in data and "zero_shot" not in data else "zero_shot")
    undrawn = "none, as matplotlib is not installed: pip install 'flipscale[plots]'"
    if can_draw():
        undrawn = "none; they need two records of the loss"
    changes = [one for one in with_changes(results) if one.headline and one.who in CHANGES]
    mixed = f"--interpolate {quoted(recipe.model.init_from or '')} --out models/{quoted(run_dir.name)}"
    lost = recipe.model.init_from and not own and any(one.who == LOST for one in changes)
    rows = [
        *((one.who, f"{one.task} {one.shown}, {one.estimate_text} against the model before") for one in changes),
        *([("to keep it", f"flipscale export {quoted(run_dir)} {mixed} --alpha 0.25 0.5 0.75")] if lost else []),
        ("model", f"{model}, its card {model / 'README.md'}"),
        ("figures", f"{run_dir / 'figures'}: {', '.join(figures)}" if figures else undrawn),
        ("next", f"flipscale evaluate {quoted(model)} {evaluation_flags(kind, data.get(kind, 'TEST_SET'))}"),
        *([] if own else [("", f"flipscale search {quoted(model)} FOLDER 'what to look for'")]),
        ("", f"flipscale push {quoted(run_dir)} ORG/NAME"),
    ]
    pairs = step * recipe.data.global_batch_size
    return headed_rows(f"done: {step:,} steps, {pairs:,} pairs in {duration(seconds)} of training", rows)


def evaluation_flags(kind: str, data: str) -> str:
    """Return the flags of `flipscale evaluate` for a task of this kind on `data`."""
    if kind in ("zero_shot", "retrieval"):
        return f"--{kind} {quoted(data)}"
    fields = yaml.safe_dump({"kind": kind, "data": data}, default_flow_style=True, sort_keys=False, width=1 << 20)
    return f"--task {shlex.quote(fields.strip())}"
