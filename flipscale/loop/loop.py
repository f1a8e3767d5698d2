"""The training loop."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flipscale.data.loader import PackedBatch, on_device, restartable_batches
from flipscale.loop.between_steps import BetweenSteps, Evaluations, Evaluator, Saver
from flipscale.loop.step import forward_backward, seed_dropout
from flipscale.loop.sync import StepSync
from flipscale.recipe.schedule import Clock, Step, is_due
from flipscale.records.tracking import Tracker

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flipscale.data.samples import Fault
    from flipscale.engines.engine import Engine
    from flipscale.loop.inputs import Session, TrainingSetup
    from flipscale.process.preemption import StopRequest
    from flipscale.process.slow_steps import StepWatch

_log = logging.getLogger(__name__)


def train(
    setup: TrainingSetup,
    session: Session,
    engine: Engine,
    watch: StepWatch,
    request: StopRequest,
    evaluator: Evaluator,
    flops: Mapping[str, Mapping[str, int]],
    on_checkpoint: Callable[[int], None],
) -> tuple[Step, bool]:
    """Collective. Take the remaining steps; evaluate and save between them. Return the next step, and
    whether a request stopped the run before its end.

    Args:
        flops: operations by stage name of a `pair` and, if captions are packed, of the text tower for a `row`; on the
            main process.
        on_checkpoint: called with the step of each checkpoint that is on disk.

    Raises:
        FloatingPointError: the loss stayed non-finite.
        OSError: a checkpoint could not be written, or the data cannot be read.
    """
    recipe, schedule, accelerator = setup.recipe, setup.schedule, session.accelerator
    run_dir, clock = Path(recipe.output_dir), Clock(schedule, session.state)
    tracker = Tracker(
        *(recipe, schedule, accelerator, watch, flops.get("pair", {}), flops.get("row")),
        chance_loss=setup.objective.chance_loss(setup.batch_size),
    )
    saver = Saver(setup, session, engine, tracker, on_checkpoint)
    evaluations = Evaluations(evaluator, setup, engine, tracker)
    between = BetweenSteps(accelerator, run_dir, recipe.log, watch)
    budget, before = schedule.budget_seconds, session.trained_seconds
    sync = StepSync(accelerator, saver.writer, watch, request, session.step, budget, before)
    tracker.start(session.state, setup.source.faults)
    stops, has_dropout = False, setup.has_dropout

    with tracker, between:
        if not session.step:
            evaluations.run([one for one in evaluator.evaluations if one.is_before], 0)
        left = session.state.get("evaluations_left", [])
        evaluations.run([one for one in evaluator.evaluations if one.name in left], session.step)
        for step, micro_batches, faults in watch.timed(step_batches(setup, clock, accelerator), session.step):
            # A step: learn from the batch, agree with the other processes, and move the weights or leave them.
            if step.resets_optimizer:
                engine.reset_optimizer(step.stage.frozen)
            engine.recompute(recipe.recomputes(step.stage))
            tracker.look(micro_batches)
            if has_dropout:
                seed_dropout(recipe.seed, step.number)
            loss = forward_backward(engine, micro_batches, setup.objective)
            should_step = sync.start(step, loss, engine.gradient_norm(), faults)
            engine.step(step.learning_rate, should_step)

            # Results of the steps before, and of this one if the run pauses: write them, commit the open checkpoint.
            upcoming = clock.advance(sync.progress)
            session.check_lock()
            due = evaluations.due(upcoming)
            saves = upcoming.is_over or is_due(upcoming.number, setup.batch_size, recipe.save.every_samples)
            outcomes = sync.drain(wait=saves or bool(due))
            failure = tracker.write(outcomes.results, upcoming) or outcomes.failure
            if failure is not None:
                # All processes have it at this step, so they first finish the open checkpoint, whose weights are good.
                try:
                    with watch.paused("a save"):
                        saver.commit()
                except OSError as error:
                    if accelerator.is_main_process:
                        _log.warning("%s", error)
                raise failure
            if outcomes.written:
                saver.commit()
            between.after_step(upcoming.number)

            # Work between two steps: evaluate, save, stop. A stop leaves the evaluations to the next start.
            stops = outcomes.stop or evaluations.run(due, upcoming.number, sync.stops)
            if saves or outcomes.save or stops:
                saver.save(upcoming, due if stops else ())
            if stops:
                break

        step = clock.step
        with watch.paused("a save"):
            saver.commit()
        if not stops:
            stops = evaluations.run(evaluator.evaluations, step.number, sync.stops)
        tracker.record_energy(step.number)
    return step, stops


class StepBatch(NamedTuple):
    """One process's part of a step's batch.

    Args:
        micro_batches: micro-batches of one size on the device, at the stage's image size. The list holds the
            only references, so clearing it frees the batch.
        faults: unusable samples, each of which was replaced.
    """

    step: Step
    micro_batches: list[PackedBatch]
    faults: list[Fault]


def step_batches(setup: TrainingSetup, clock: Clock, accelerator: Accelerator) -> Iterator[StepBatch]:
    """Yield this process's batches to the end of the run. The caller advances the clock after each.

    Raises:
        UserError: the data cannot be used.
        OSError: a shard cannot be read, or workers keep dying.
    """
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    while not clock.step.is_over:
        stage = clock.step.stage
        end = int(stage.last) if setup.schedule.budget_seconds is None else sys.maxsize
        batches = restartable_batches(setup.datasets[stage], clock.step.number, end, rank, world_size)
        with closing(on_device(batches, device)) as ready:
            for micro_batches in ready:
                for micro_batch in micro_batches:
                    micro_batch.with_image_size(stage.image_size)
                faults = [fault for micro_batch in micro_batches for fault in micro_batch.faults]
                yield StepBatch(clock.step, micro_batches, faults)
                # A time budget may end the stage while prefetched batches are left.
                if clock.step.is_over or clock.step.stage is not stage:
                    break
