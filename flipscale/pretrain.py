"""Pre-training by masking: `accelerate launch -m flipscale.pretrain --config RECIPE`, `torchrun`, or plain python."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from flipscale.process import state

if __name__ == "__main__":
    state.begin_imports()

from flipscale.checks.start import check_recipe
from flipscale.engines.checkpoint import from_main_process
from flipscale.engines.launch import launch_of
from flipscale.evaluation.presentation.last_lines import end_run
from flipscale.evaluation.test_set import keep_class_names
from flipscale.hub.push import BackgroundPush, open_target, push_finished
from flipscale.io.paths import check_writable
from flipscale.loop.inputs import Session
from flipscale.loop.loop import train
from flipscale.planning.budget import with_time_shares
from flipscale.process.console import only_describes, report_user_errors, start_logging
from flipscale.process.preemption import Stopped, StopRequest
from flipscale.process.slow_steps import StepWatch
from flipscale.process.watchdog import close_process_group, exit_now
from flipscale.recipe.recipe import Recipe
from flipscale.records.run_summary import RunSummary
from flipscale.start.complete_recipe import parse_recipe
from flipscale.start.evaluations import RunEvaluator, check_tasks, test_set_digests
from flipscale.start.messages import begin_run, log_stop
from flipscale.start.pretrained_fields import with_vocabulary
from flipscale.start.processes import choose_checkpoint, compare_processes, locked, resume, start_processes, watched
from flipscale.start.run_files import is_done, open_run_directory
from flipscale.start.setup import open_setup
from flipscale.start.timings import StartTimings

# The server of workers imports them once, because every worker needs the trainer's main module and its loaders.
_WORKER_MODULES = ("flipscale.pretrain", "flipscale.data.loader", "flipscale.evaluation.embedding")


def pretrain(recipe: Recipe, of_process: bool = False) -> Path:
    """Collective. Train a recipe, and return the run directory. With `of_process`, its start began with the process.

    Raises:
        Stopped: a signal or the stop file asked for an end; the run has saved and can be resumed.
        UserError: the recipe cannot be run as it stands.
        FloatingPointError: the loss stayed non-finite.
        OSError: a checkpoint could not be written.
    """
    timings, run_dir = StartTimings(of_process), Path(recipe.output_dir)

    # 1. The recipe gets the fields that its start weights, tokenizer and time budget decide.
    recipe = with_time_shares(with_vocabulary(recipe, fetches=True))

    # 2. The run directory gives the newest checkpoint. A finished run needs no start.
    checkpoint = open_run_directory(recipe)
    if is_done(recipe, checkpoint):
        return run_dir
    check_writable(run_dir / "checkpoints", "the folder of checkpoints")

    # 3. The fields fit each other and the launch.
    check_recipe(recipe, launch_of(os.environ))
    timings.end("imports")

    # 4. Each process opens the training data and the test sets. The main process opens the Hub's repository.
    tasks, class_names = check_tasks(recipe)
    setup = open_setup(recipe, is_fresh=checkpoint is None)
    timings.end("data")
    state.freeze_imports()
    open_target(recipe.hub, checkpoint is not None)
    test_sets = test_set_digests(tasks)

    # 5. The processes meet, and 6. agree on recipe, launch and data. 7. One run has the run directory until its end.
    accelerator = start_processes(recipe, _WORKER_MODULES)
    compare_processes(accelerator, setup, test_sets)
    is_main = accelerator.is_main_process
    with locked(accelerator, recipe) as lock:
        timings.end("processes")

        # 8. They choose the newest whole checkpoint, and 9. build the engine with its weights, or with new ones.
        session = choose_checkpoint(accelerator, setup, lock)
        if setup.precomputed or setup.teachers:
            from flipscale.preparation.feature_writer import check_stored  # imports the models

            with watched(recipe, "the check of stored features"):
                from_main_process(accelerator, lambda: check_stored(recipe, setup.source))
        engine = resume(recipe, setup.schedule, session, setup.text_rows)
        timings.end("checkpoint")

        # 10. The main process writes the first records, and the steps begin.
        flops = count_flops(recipe) if is_main else {}
        watch = StepWatch(accelerator, run_dir, recipe.log.hang_seconds, session.trained_seconds, engine.phases)
        evaluator = RunEvaluator(tasks, setup, session, engine, watch)
        begin_run(setup, session, engine.name, evaluator.evaluations, flops=flops, seconds=timings)
        if class_names and is_main:
            keep_class_names(run_dir, class_names)
        push = BackgroundPush(recipe, setup.schedule.total_steps, is_main)
        with StopRequest(watches_file=is_main) as request, watch:
            step, is_stopped = train(setup, session, engine, watch, request, evaluator, flops, push.offer)
            with watch.paused("the export"):
                push.close()
                if not is_stopped:
                    finish(recipe, session, step.number, watch.trained_seconds)
    if is_stopped:
        log_stop(setup.schedule, step)
        raise Stopped
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


def finish(recipe: Recipe, session: Session, num_steps: int, trained_seconds: float) -> None:
    """Collective. Export the last checkpoint's model with its card on the main process, and mark the run as done."""
    if session.accelerator.is_main_process:
        session.check_lock(at_once=True)
        from flipscale.engines.checkpoint import checkpoint_of
        from flipscale.hub.card import write_card
        from flipscale.hub.export import export_checkpoint
        from flipscale.hub.push import card_name

        run_dir = Path(recipe.output_dir)
        export_checkpoint(checkpoint_of(run_dir, num_steps), run_dir / "model")
        with only_describes(run_dir / "model/README.md", run_dir, ("flipscale", "push", str(run_dir), "ORG/NAME")):
            write_card(run_dir / "model", run_dir, card_name(recipe))
        end_run(recipe, num_steps, trained_seconds)
    session.accelerator.wait_for_everyone()


def write_page(recipe: Recipe) -> None:
    """Write the page of a finished run without a page, on rank 0, after the other processes have gone."""
    run_dir = Path(recipe.output_dir)
    if os.environ.get("RANK", "0") != "0" or not (run_dir / "DONE").exists() or (run_dir / "report.html").exists():
        return
    from flipscale.hub.loading import load_with_tokenizer
    from flipscale.pages.run_page import offer_page

    offer_page(recipe, load_with_tokenizer)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse a recipe and run it, or plan it with `--dry_run`; a user's mistake ends in one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with report_user_errors() as error_report:
        start_logging()
        if "--dry_run" in arguments:
            from flipscale.planning.dry_run import dry_run

            state.turn_collector_on()
            return dry_run(arguments, check_recipe)
        with state.without_collector():
            recipe = parse_recipe(arguments)
            error_report.run_dir = Path(recipe.output_dir)
            with suppress(Stopped):
                pretrain(recipe, of_process=True)
            close_process_group()
            write_page(recipe)
            push_finished(recipe)
    exit_now()


if __name__ == "__main__":
    state.end_imports()
    main()
