"""Work between two steps: evaluations, checkpoints, a profile, and garbage collection."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from flipscale.engines.checkpoint import CheckpointWriter, checkpoint_of
from flipscale.process import state
from flipscale.recipe.recipe import to_yaml
from flipscale.recipe.schedule import Step, has_passed, is_due

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flipscale.engines.engine import Engine
    from flipscale.loop.inputs import Session, TrainingSetup
    from flipscale.process.slow_steps import StepWatch
    from flipscale.recipe.outputs import LogRecipe
    from flipscale.records.tracking import Tracker

_log = logging.getLogger(__name__)

# The first steps of a start allocate memory and choose kernels, so a profile leaves them out.
_UNPROFILED_STEPS = 3
# Number of the newest allocations and frees in the memory snapshot.
_MEMORY_EVENTS = 1_000_000
_COLLECT_EVERY_STEPS = 1_000


class Evaluation(NamedTuple):
    """An evaluation of the model in training.

    Args:
        every_samples: samples between two; 0 for the end only; None for each `eval.every_share` of a time budget.
        is_before: whether it also runs before the first step.
    """

    name: str
    every_samples: int | None
    is_before: bool = False


class Evaluator(Protocol):
    """Evaluates the weights in training."""

    @property
    def evaluations(self) -> Sequence[Evaluation]:
        """Evaluations of the run. All of them run at its end."""

    def __call__(
        self, evaluations: Sequence[Evaluation], num_steps: int, trained_seconds: float, stops: Callable[[], bool]
    ) -> tuple[dict[str, float], str] | None:
        """Collective. Run some of the evaluations, and keep their results. Return their numbers for `metrics.jsonl`,
        and their line of the log; None if `stops`, called after each, ended them. Then no result is kept."""


class Evaluations:
    """Evaluates the weights in training, or their averages if the recipe asks for averages."""

    def __init__(self, evaluator: Evaluator, setup: TrainingSetup, engine: Engine, tracker: Tracker):
        self._evaluator, self._setup, self._engine, self._tracker = evaluator, setup, engine, tracker

    def due(self, step: Step) -> list[Evaluation]:
        """Return the evaluations before a step. Those at the end of the run are left out."""
        if step.is_over:
            return []
        recipe = self._setup.recipe
        share_is_due = has_passed(step.before, step.position, recipe.eval.every_share)
        return [
            one
            for one in self._evaluator.evaluations
            if is_due(step.number, recipe.data.global_batch_size, one.every_samples or 0)
            or (share_is_due and one.every_samples is None)
        ]

    def run(self, due: Sequence[Evaluation], num_steps: int, stops: Callable[[], bool] = lambda: False) -> bool:
        """Collective. Run evaluations after `num_steps` steps, and write their numbers. Return whether `stops`, called
        after each, ended them."""
        if not due:
            return False
        watch = self._tracker.watch
        with watch.paused("an evaluation"):
            self._engine.model.eval()
            # Without compilation, because compiled blocks would be compiled again for the last batch's size.
            with self._engine.averaged(), torch.compiler.set_stance("force_eager"):
                measurements = self._evaluator(due, num_steps, watch.trained_seconds, stops)
            self._engine.model.train()
            if measurements is not None:
                self._tracker.write_measurements(num_steps, *measurements)
        return measurements is None


class Saver:
    """Begins and commits the checkpoints of a run. Training continues while one is written.

    Args:
        on_checkpoint: called with the step of each checkpoint that is on disk.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        session: Session,
        engine: Engine,
        tracker: Tracker,
        on_checkpoint: Callable[[int], None],
    ):
        run_dir, recipe = Path(setup.recipe.output_dir), setup.recipe.save
        self.writer = CheckpointWriter(session.accelerator, run_dir, recipe, session.state.get("step"))
        self._setup, self._session, self._engine, self._tracker = setup, session, engine, tracker
        self._on_checkpoint = on_checkpoint

    def save(self, step: Step, evaluations_left: Sequence[Evaluation] = ()) -> None:
        """Collective. Commit the open checkpoint, and begin the one before `step`, unless they are the same.

        The start that resumes it first runs `evaluations_left`. Raise OSError if the disk is full or not writable, or
        another run has taken the run directory."""
        with self._tracker.watch.paused("a save"):
            self.commit()
            state = {
                "step": step.number,
                "samples_seen": step.number * self._setup.batch_size,
                "optimizer_steps": self._engine.layout.optimizer_steps(),
                "trained_seconds": self._tracker.watch.trained_seconds,
                "evaluations_left": [one.name for one in evaluations_left],
                "interval": self._tracker.interval(),
                **self._setup.schedule.state(step),
                "data_samples": len(self._setup.source),
                "data_lengths": self._setup.lengths_digest,
                "data_fingerprint": self._setup.fingerprint,
                "num_processes": self.writer.accelerator.num_processes,
            }
            self.writer.save(
                self._engine.tensor_chunks(), self._engine.layout.shapes(), state, to_yaml(self._setup.recipe, True)
            )

    def commit(self) -> None:
        """Collective. Wait until the open checkpoint is on disk, and rename it; raises as `save`."""
        self._session.check_lock(at_once=True)
        step = self.writer.commit()
        if step is not None:
            _log.info("step %s: saved %s", f"{step:,}", checkpoint_of(self.writer.run_dir, step))
            self._on_checkpoint(step)


class BetweenSteps:
    """Writes a trace of some steps, then the memory history of others on CUDA, to `profile/`.

    Ranks 0, 1 and the last write: two of a node and one of another. Recording the history would distort the trace.
    Under `nsys profile --capture-range=cudaProfilerApi`, nsys records the steps in place of torch's profiler.

    In a `with` block, Python's garbage is collected between steps only. All ranks collect it at the same steps, so no
    rank makes the others wait at another time.
    """

    def __init__(self, accelerator: Accelerator, run_dir: Path, log: LogRecipe, watch: StepWatch):
        self._watch = watch
        self._cuda, self._rank = accelerator.device.type == "cuda", accelerator.process_index
        self._is_one_of_several = accelerator.num_processes > 1
        self._folder = run_dir / "profile"
        writes = self._rank in (0, 1, accelerator.num_processes - 1)
        self._num_steps = log.profile_steps if writes else 0
        # nsys sets this variable.
        self._is_under_nsys = self._cuda and self._num_steps > 0 and "NSYS_PROFILING_SESSION_ID" in os.environ
        self._memory_steps = log.memory_steps if writes and self._cuda else 0
        self._steps = 0
        self._profile: torch.profiler.profile | None = None
        self._records = False

    def __enter__(self) -> BetweenSteps:
        state.begin_steps()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        state.turn_collector_on()
        # A run that ends early keeps the profile of its steps. After an error on several GPUs there is none, because
        # waiting for the device may mean waiting for other processes.
        if error is None or not (self._cuda and self._is_one_of_several):
            self._stop_trace()
            self._stop_history()

    def after_step(self, num_steps: int) -> None:
        """Begin or write the profile, and collect garbage, after `num_steps` steps of the run so far."""
        self._steps += 1
        traced = _UNPROFILED_STEPS + self._num_steps
        if self._num_steps and self._steps == _UNPROFILED_STEPS:
            self._profile = None if self._is_under_nsys else torch.profiler.profile(record_shapes=True)
            (self._profile or torch.cuda.profiler).start()
        if self._steps == traced:
            self._stop_trace()
        if self._memory_steps and self._steps == traced:
            self._records = True
            # Python's stacks only: with those of C++, the snapshot takes minutes to write.
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=_MEMORY_EVENTS)
        if self._steps == traced + self._memory_steps:
            self._stop_history()
        if num_steps % _COLLECT_EVERY_STEPS == 0:
            state.collect_garbage()

    def _stop_trace(self) -> None:
        if self._is_under_nsys:
            torch.cuda.profiler.stop()
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        with self._watch.paused("the profile"):
            profile.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(self._folder / f"rank-{self._rank:05d}.trace.json.gz"))
        _log.info(
            "the profile of the steps is in %s: open its rank-*.trace.json.gz at https://ui.perfetto.dev", self._folder
        )

    def _stop_history(self) -> None:
        if not self._records:
            return
        self._records = False
        with self._watch.paused("the memory history"):
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self._folder / f"rank-{self._rank:05d}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        viewer = "https://docs.pytorch.org/memory_viz"
        _log.info("the memory history is in %s: open its rank-*.memory.pickle at %s", self._folder, viewer)
