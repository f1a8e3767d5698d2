"""Pre-training by masking: `accelerate launch -m flipscale.pretrain --config RECIPE`, `torchrun`, or plain python."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # The imports below take seconds, in which Ctrl-C would print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from flipscale.engines.checkpoint import CheckpointReader, CheckpointWriter, checkpoint_of, list_checkpoints
from flipscale.engines.checkpoint_integrity import begin_reading
from flipscale.engines.device import best_attention
from flipscale.engines.launch import launch_of, precision_in_words
from flipscale.engines.start import build_engine, close_process_group, exit_now
from flipscale.evaluation.class_names import keep_class_names
from flipscale.evaluation.results import latest, read_results
from flipscale.hub.card import check_audit
from flipscale.hub.push import BackgroundPush, card_name, open_target, push_finished
from flipscale.training.bad_samples import BadSamples
from flipscale.training.console import report_user_errors, start_logging
from flipscale.training.evaluating import Evaluation
from flipscale.training.health import StepGuard
from flipscale.training.preemption import StopRequest
from flipscale.training.recipe import Recipe, as_fields, parse_recipe
from flipscale.training.report import first_block, last_block
from flipscale.training.run_directory import (
    device_name,
    how_to_go_on,
    is_done,
    mark_done,
    open_run_directory,
    told_of_the_disk,
    write_run_files,
)
from flipscale.training.saving import Saver
from flipscale.training.start import Plan, Start, check, check_output_dir, join
from flipscale.training.step import consume_batch
from flipscale.training.step_time import GarbageCollection, StepProfiler
from flipscale.training.tracking import Tracker, draw_figures, open_trackers
from flipscale.training.watch import HangWatch, StepWatch

if TYPE_CHECKING:
    from flipscale.engines.engine import Engine
    from flipscale.model import FlipPreTrainedModel

_log = logging.getLogger("flipscale.pretrain")  # also under `python -m`, where it is called __main__


def pretrain(recipe: Recipe) -> Path:
    """Collective. Train as the recipe says and return the run directory, of a run that is done or can be resumed.

    Raises:
        ValueError: a recipe that cannot be run as it stands.
        FloatingPointError: the loss stayed non-finite.
        OSError: a checkpoint could not be written.
    """
    check_output_dir(recipe.output_dir)
    run_dir = Path(recipe.output_dir)
    if is_done(recipe):
        gone = "" if (run_dir / "model").exists() else ", but its model is gone"
        if gone and list_checkpoints(run_dir):
            gone += f": `flipscale export {run_dir}` writes it again"
        remedy = "remove it, or choose another output_dir, to train again, or add a stage to train on"
        _log.info("%s is done%s; %s", run_dir, gone, remedy)
        return run_dir
    # Every process checks what it can before it waits for others.
    checkpoint = open_run_directory(recipe)
    ahead = begin_reading(checkpoint)
    plan = check(recipe)
    check_audit(recipe.hub.audit)
    open_target(recipe.hub, resumes=checkpoint is not None)
    watch = HangWatch(run_dir, recipe.log.hang_seconds, int(os.environ.get("RANK", "0")))
    with watch, watch.doing("the start of the processes"):
        start = join(recipe, plan, ahead)
    try:
        watch = HangWatch(run_dir, recipe.log.hang_seconds, start.accelerator.process_index)
        with watch, watch.doing("the building of the model"):
            engine = resume(recipe, plan, start)
            if start.accelerator.is_main_process:
                begin_run(recipe, plan, start, engine.name)
        from flipscale.planning.flops import pair_flops  # runs a model, see `resume`

        train(recipe, plan, start, engine, pair_flops(recipe))
    finally:
        start.release_lock()
    return run_dir


def resume(recipe: Recipe, plan: Plan, start: Start) -> "Engine":
    """Collective. Build the engine, as the checkpoint has it or afresh, ready to train."""
    # Imported here, as transformers' models take seconds: a mistake in a recipe is told without them.
    from flipscale.engines.first_weights import compile_blocks, freeze, initial_weights, no_weights

    config, model_class = recipe.model_config(), recipe.objective().model_class
    reader = None if start.checkpoint is None else CheckpointReader(start.checkpoint)
    fill = no_weights if reader else initial_weights(recipe.model.init_from, config, recipe.seed, model_class)

    def configure(model: "FlipPreTrainedModel") -> None:
        freeze(model, recipe.model.frozen)
        model.set_attn_implementation(best_attention(start.accelerator.device))
        if recipe.model.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if recipe.model.compile:
            compile_blocks(model)

    engine = build_engine(start.accelerator, launch_of(os.environ), recipe.optim, recipe.data.global_batch_size)
    # 1. Build the model block by block, each moved to its device or sharded as soon as it has weights.
    engine.build(config, configure, fill, model_class)
    # 2. Load the checkpoint's weights, before the model is wrapped: a wrapper may copy them.
    if reader:
        engine.load_weights(reader)
    # 3. Wrap the model and make its optimisers, which have no moments yet.
    engine.prepare()
    # 4. Load the moments, unless the optimisers start afresh at this step.
    if reader and not start.progress(recipe, plan.stages).starts_afresh:
        engine.load_moments(reader, start.state["optimizer_steps"])
    # 5. Start the averages: the checkpoint's, or the weights as they now are.
    engine.start_averages(reader)
    return engine


def train(recipe: Recipe, plan: Plan, start: Start, engine: "Engine", pair_flops: dict[str, int]) -> None:
    """Collective. Take the steps that are left, and do what is due between them and at the end."""
    accelerator, run_dir, is_main = start.accelerator, Path(recipe.output_dir), start.accelerator.is_main_process
    step, batch_size = start.step, recipe.data.global_batch_size
    bad_samples = BadSamples(run_dir, is_main, recipe.data.max_bad_fraction)
    writer = CheckpointWriter(accelerator, run_dir, recipe.save, start.state.get("step"))
    progress = start.progress(recipe, plan.stages)
    saver = Saver(recipe, plan, start, engine, writer, bad_samples, progress)
    push = BackgroundPush(recipe, progress.total_steps, is_main)
    watch = StepWatch(accelerator, run_dir, recipe.log.hang_seconds, start.trained_seconds)
    tracker = Tracker(accelerator, run_dir, recipe.log, watch, batch_size, progress, pair_flops)
    evaluation = Evaluation(recipe, plan, engine, accelerator, watch, progress, tracker)
    profiler = StepProfiler(accelerator, run_dir, recipe.log.profile_steps)
    request = StopRequest(watches_file=is_main)
    guard = StepGuard(accelerator, request, writer, watch)
    open_trackers(accelerator, run_dir, as_fields(recipe))
    tracker.start(step)
    bad_samples.start(step * batch_size, plan.source.faults)

    with request, watch, tracker, profiler, GarbageCollection() as garbage:
        evaluation.run(evaluation.before())
        for _, micro_batches, faults in watch.timed(plan.batches(progress, accelerator), step):
            # A step: learn from the batch, agree with the other processes, and move the weights or leave them.
            if progress.starts_afresh:
                engine.forget_moments()
            found = consume_batch(engine, micro_batches, plan.objective)
            taken = guard.agree(progress, found, engine.gradient_norm(), faults)
            engine.step(progress.learning_rate, taken)
            step = progress.advance()
            start.check_lock()
            # What is known by now, of the step before: count it, track it, commit the checkpoint that is written.
            tasks = evaluation.due(step)
            for verdict in guard.verdicts(settle=bool(tasks) or saver.is_due(step)):
                bad_samples.count(verdict.faults, verdict.num_replaced, batch_size)
                if tracker.count_step(verdict):
                    tracker.write_interval(verdict, bad_samples.take_counts())
                if verdict.written:
                    push.offer(saver.commit())
            profiler.after_step()
            garbage.after_step(step)

            # What is due after this step, when all is known: evaluate, save, stop.
            evaluation.run(tasks)
            if guard.stop or guard.save or saver.is_due(step):
                with watch.paused("a save"):
                    push.offer(saver.save(step, watch.trained_seconds))
            if guard.stop:
                break

        with watch.paused("a save"):
            push.offer(saver.commit())
            push.close()
        if not guard.stop:
            evaluation.run(plan.tasks)
        tracker.energy.update(step)
        if not guard.stop:
            with watch.paused("the export"):
                finish(recipe, start, step, watch.trained_seconds)
    if guard.stop:
        _log.info("stopped and saved at %s; %s", progress.place(), how_to_go_on())


def begin_run(recipe: Recipe, plan: Plan, start: Start, engine: str) -> None:
    """Write the files that a run begins with, and say what is trained. The main process calls this."""
    num_processes, num_pairs = start.accelerator.num_processes, len(plan.source)
    num_parameters = write_run_files(recipe, engine, num_processes, start.state, num_pairs, start.set_aside)
    if plan.class_names:
        keep_class_names(Path(recipe.output_dir), plan.class_names)
    precision = precision_in_words(os.environ)
    _log.info("%s", first_block(recipe, plan, start, engine, num_parameters, device_name(), precision))


def finish(recipe: Recipe, start: Start, step: int, trained_seconds: float) -> None:
    """Collective. Export the model of the last checkpoint, with its card and the run's figures, and mark the run done:
    the main process does, and the others wait."""
    if start.accelerator.is_main_process:
        start.check_lock(at_once=True)
        from flipscale.hub.card import write_card
        from flipscale.hub.export import export_checkpoint

        run_dir = Path(recipe.output_dir)
        export_checkpoint(checkpoint_of(run_dir, step), run_dir / "model")
        write_card(run_dir / "model", run_dir, card_name(recipe))
        figures = draw_figures(run_dir)
        mark_done(run_dir)
        results = latest(read_results(run_dir))
        _log.info("%s", last_block(recipe, step, trained_seconds, list(figures), results))
    start.accelerator.wait_for_everyone()


def report(recipe: Recipe) -> None:
    """Write the page of a finished run that has none: the first process does, after the others have gone."""
    run_dir = Path(recipe.output_dir)
    if os.environ.get("RANK", "0") != "0" or not (run_dir / "DONE").exists() or (run_dir / "report.html").exists():
        return
    from flipscale.hub.loading import load_with_tokenizer
    from flipscale.pages.report import offer_report

    offer_report(recipe, load_with_tokenizer)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse a recipe and run it, or plan it with `--dry_run`; a user's mistake ends in one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with report_user_errors() as error_report:
        start_logging()
        if "--dry_run" in arguments:
            from flipscale.planning.dry_run import dry_run

            return dry_run(arguments)
        recipe = parse_recipe(arguments)
        error_report.run_dir = Path(recipe.output_dir)
        with told_of_the_disk(Path(recipe.output_dir)):
            pretrain(recipe)
        close_process_group()
        report(recipe)
        push_finished(recipe)
    exit_now()


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
