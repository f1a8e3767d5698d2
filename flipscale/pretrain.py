"""Pre-training by masking: `accelerate launch -m flipscale.pretrain --config RECIPE`, `torchrun`, or plain python."""

import gc
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from flipscale.io.streams import use_utf8

if __name__ == "__main__":
    use_utf8()  # before the imports, which take seconds
    gc.disable()  # until the first step, see `main`
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # The imports below take seconds, in which Ctrl-C would print a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

from flipscale.engines.slow_steps import StepWatch
from flipscale.engines.watchdog import close_process_group, exit_now
from flipscale.hub.push import BackgroundPush, open_target, push_finished
from flipscale.planning.budget import in_shares
from flipscale.recipe.recipe import Recipe
from flipscale.training.between_steps import BetweenSteps, Evaluation, Saver
from flipscale.training.complete_recipe import parse_recipe
from flipscale.training.console import only_describes, report_user_errors, start_logging
from flipscale.training.plan import Plan
from flipscale.training.preemption import Stopped
from flipscale.training.pretrained_fields import with_vocabulary
from flipscale.training.report import begin_run, end_run
from flipscale.training.run_summary import RunSummary
from flipscale.training.schedule import Clock
from flipscale.training.start import Laps, Start, join, prepare, resume
from flipscale.training.step import consume_batch
from flipscale.training.sync import StepSync
from flipscale.training.tracking import Tracker

if TYPE_CHECKING:
    from flipscale.engines.engine import Engine


def pretrain(recipe: Recipe) -> Path:
    """Collective. Train a recipe, and return the run directory.

    Raises:
        Stopped: a signal or the stop file asked for an end; the run has saved and can be resumed.
        UserError: the recipe cannot be run as it stands.
        FloatingPointError: the loss stayed non-finite.
        OSError: a checkpoint could not be written.
    """
    run_dir = Path(recipe.output_dir)
    recipe = in_shares(with_vocabulary(recipe, fetches=True))
    prepared = prepare(recipe, laps := Laps())
    if prepared is None:
        return run_dir
    plan, resumes = prepared
    gc.freeze()  # the imports, so that the collection before the first step is short
    open_target(recipe.hub, resumes)
    start = join(recipe, plan, laps)
    try:
        engine = resume(recipe, plan.schedule, start, plan.text_rows)
        laps.end("checkpoint")
        flops = count_flops(recipe) if start.accelerator.is_main_process else {}
        begin_run(recipe, plan, start, engine.name, flops=flops, seconds=laps)
        train(recipe, plan, start, engine, flops)
    finally:
        start.release_lock()
    return run_dir


def count_flops(recipe: Recipe) -> dict[str, dict[str, int]]:
    """Return the operations of a `pair` by stage name, and of the text tower for a `row` if captions are packed.

    Counting takes seconds, so a restart reads what the start before it has counted.
    """
    kinds = ("pair", "row") if recipe.data.pack_captions else ("pair",)
    names, starts = {stage.name for stage in recipe.stages}, RunSummary(Path(recipe.output_dir)).starts
    with suppress(AttributeError, IndexError, TypeError):  # none before, or a damaged record
        if {kind: {*of} for kind, of in starts[-1].get("flops", {}).items()} == dict.fromkeys(kinds, names):
            return starts[-1]["flops"]
    from flipscale.planning.flops import pair_flops, row_flops  # imports the models, as `resume` does

    return {kind: {"pair": pair_flops, "row": row_flops}[kind](recipe) for kind in kinds}


def train(recipe: Recipe, plan: Plan, start: Start, engine: "Engine", flops: dict[str, dict[str, int]]) -> None:
    """Collective. Take the remaining steps, evaluate and save between them, and export the model at the end. `flops` is
    the result of `count_flops` on the main process; empty on others. Raise Stopped after the save that a signal asked
    for."""
    accelerator, run_dir, is_main = start.accelerator, Path(recipe.output_dir), start.accelerator.is_main_process
    schedule, clock = plan.schedule, Clock(plan.schedule, start.state)
    watch = StepWatch(accelerator, run_dir, recipe.log.hang_seconds, start.trained_seconds, engine.phases)
    tracker = Tracker(plan, accelerator, watch, flops.get("pair", {}), flops.get("row"))
    saver = Saver(plan, start, engine, tracker)
    push = BackgroundPush(recipe, schedule.total_steps, is_main)
    evaluation = Evaluation(plan, engine, accelerator, tracker)
    between = BetweenSteps(accelerator, run_dir, recipe.log.profile_steps, watch)
    sync = StepSync(accelerator, saver.writer, watch, start.step, schedule.budget_seconds)
    tracker.start(start.step)
    stops = False

    with sync.request, watch, tracker, between:
        evaluation.run(plan.tasks_before(clock.step), start.step)
        for step, micro_batches, faults in watch.timed(plan.batches(clock, accelerator), start.step):
            # A step: learn from the batch, agree with the other processes, and move the weights or leave them.
            if step.starts_afresh:
                engine.restart(step.stage.frozen)
            engine.recompute(recipe.recomputes(step.stage))
            tracker.look(micro_batches)
            loss = consume_batch(engine, micro_batches, plan.objective)
            taken = sync.start(step, loss, engine.gradient_norm(), faults)
            engine.step(step.learning_rate, taken)

            # Results of the steps before, and of this one if the run pauses: write them, commit the open checkpoint.
            upcoming = clock.advance(sync.pace)
            start.check_lock()
            tasks, saves = plan.due(upcoming)
            settled = sync.settle(wait=saves or bool(tasks))
            tracker.write(settled.results, upcoming)
            if settled.failure is not None:
                raise settled.failure
            if settled.written:
                push.offer(saver.commit())
            between.after_step(upcoming.number)

            # Work between two steps: evaluate, save, stop.
            evaluation.run(tasks, upcoming.number)
            stops = settled.stop
            if saves or settled.save or stops:
                push.offer(saver.save(upcoming))
            if stops:
                break

        step = clock.step
        with watch.paused("a save"):
            push.offer(saver.commit())
            push.close()
        if not stops:
            evaluation.run(plan.tasks, step.number)
        tracker.settle_energy(step.number)
        if not stops:
            with watch.paused("the export"):
                finish(recipe, start, step.number, watch.trained_seconds)
    if stops:
        saver.log_stop(step)
        raise Stopped


def finish(recipe: Recipe, start: Start, num_steps: int, trained_seconds: float) -> None:
    """Collective. Export the last checkpoint's model with its card on the main process, and mark the run as done."""
    if start.accelerator.is_main_process:
        start.check_lock(at_once=True)
        from flipscale.engines.checkpoint import checkpoint_of
        from flipscale.hub.card import write_card
        from flipscale.hub.export import export_checkpoint
        from flipscale.hub.push import card_name

        run_dir = Path(recipe.output_dir)
        export_checkpoint(checkpoint_of(run_dir, num_steps), run_dir / "model")
        with only_describes(run_dir / "model/README.md", run_dir, ("flipscale", "push", str(run_dir), "ORG/NAME")):
            write_card(run_dir / "model", run_dir, card_name(recipe))
        end_run(recipe, num_steps, trained_seconds)
    start.accelerator.wait_for_everyone()


def write_page(recipe: Recipe) -> None:
    """Write the page of a finished run without a page, on rank 0, after the other processes have gone."""
    run_dir = Path(recipe.output_dir)
    if os.environ.get("RANK", "0") != "0" or not (run_dir / "DONE").exists() or (run_dir / "report.html").exists():
        return
    from flipscale.hub.loading import load_with_tokenizer
    from flipscale.pages.run_page import offer_report

    offer_report(recipe, load_with_tokenizer)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse a recipe and run it, or plan it with `--dry_run`; a user's mistake ends in one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with report_user_errors() as error_report:
        start_logging()
        if "--dry_run" in arguments:
            from flipscale.planning.dry_run import dry_run

            gc.enable()
            return dry_run(arguments)
        # The collector would go through the objects of all imports again and again, for a fifth of the start's time.
        gc.disable()
        try:
            recipe = parse_recipe(arguments)
            error_report.run_dir = Path(recipe.output_dir)
            with suppress(Stopped):
                pretrain(recipe)
            close_process_group()
            write_page(recipe)
            push_finished(recipe)
        finally:
            gc.enable()
    exit_now()


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
