"""Work between two steps: evaluations, checkpoints, a profile, and garbage collection."""

import dataclasses
import gc
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flipscale.engines.checkpoint import CheckpointWriter, checkpoint_of
from flipscale.engines.slow_steps import StepWatch
from flipscale.evaluation.embedding import ClassifierEmbedder, Embedder
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.results import BEFORE
from flipscale.evaluation.suite import evaluate_tasks
from flipscale.io.cores import decoding_workers
from flipscale.recipe.recipe import to_yaml
from flipscale.training.plan import Plan
from flipscale.training.run_directory import typed_command
from flipscale.training.schedule import Step
from flipscale.training.start import Start
from flipscale.training.tracking import Tracker

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flipscale.engines.engine import Engine

_log = logging.getLogger(__name__)

# The first steps of a start allocate memory and choose kernels, so a profile leaves them out.
_UNPROFILED_STEPS = 3
# Number of the newest allocations and frees in the memory snapshot.
_MEMORY_EVENTS = 1_000_000
_COLLECT_EVERY_STEPS = 1_000


class Evaluation:
    """Evaluates the weights in training, or their averages if the recipe asks for averages."""

    def __init__(self, plan: Plan, engine: "Engine", accelerator: "Accelerator", tracker: Tracker):
        self._engine, self._watch, self._tracker = engine, tracker.watch, tracker
        kind, recipe = Embedder if plan.objective.takes_text else ClassifierEmbedder, plan.recipe.eval
        sizes = (recipe.batch_size, decoding_workers(recipe.num_workers))
        self._embedder = kind(engine.model, plan.tokenizer, accelerator, *sizes, self._watch.alive)

    def run(self, tasks: list[Task], num_steps: int) -> None:
        """Collective. Run the tasks and write their results. Those after 0 steps are of the untrained model."""
        if not tasks:
            return
        with self._watch.paused("an evaluation"):
            self._engine.model.eval()
            # Without compilation, because compiled blocks would be compiled again for the last batch's size.
            with self._engine.averaged(), torch.compiler.set_stance("force_eager"):
                results = evaluate_tasks(self._embedder, tasks)
            self._engine.model.train()
            if not num_steps:
                results = [dataclasses.replace(result, who=BEFORE) for result in results]
            self._tracker.write_results(num_steps, results)


class Saver:
    """Begins and commits the checkpoints of a run. Training goes on while one is written."""

    def __init__(self, plan: Plan, start: Start, engine: "Engine", tracker: Tracker):
        run_dir, recipe = Path(plan.recipe.output_dir), plan.recipe.save
        self.writer = CheckpointWriter(start.accelerator, run_dir, recipe, start.state.get("step"))
        self._plan, self._start, self._engine, self._tracker = plan, start, engine, tracker

    def save(self, step: Step) -> int | None:
        """Collective. Commit the open checkpoint, and begin the one before `step`, unless they are the same.

        Returns:
            Step of the committed checkpoint; None if none was open.

        Raises:
            OSError: the disk is full or not writable, or another run has taken the run directory.
        """
        with self._tracker.watch.paused("a save"):
            committed = self.commit()
            self._tracker.bad_samples.flush()
            state = {
                "step": step.number,
                "samples_seen": step.number * self._plan.batch_size,
                "optimizer_steps": self._engine.layout.optimizer_steps(),
                "trained_seconds": self._tracker.watch.trained_seconds,
                **self._plan.schedule.state(step),
                "data_samples": len(self._plan.source),
                "data_fingerprint": self._plan.fingerprint,
                "num_processes": self.writer.accelerator.num_processes,
            }
            self.writer.save(self._engine.pieces(), self._engine.layout.shapes(), state, to_yaml(self._plan.recipe))
            return committed

    def commit(self) -> int | None:
        """Collective. Wait until the open checkpoint is on disk, and rename it; returns and raises as `save`."""
        self._start.check_lock(at_once=True)
        step = self.writer.commit()
        if step is not None:
            _log.info("step %s: saved %s", f"{step:,}", checkpoint_of(self.writer.run_dir, step))
        return step

    def log_stop(self, step: Step) -> None:
        """Log that the run has saved before `step` and stops, and how to resume it."""
        place, command = self._plan.schedule.words(step.number, step.position), typed_command()
        how = f"to go on: {command}" if command else "the same command goes on"
        _log.info("stopped and saved at %s; %s", place, how)


class BetweenSteps:
    """Writes a trace of some steps, and on CUDA a memory snapshot, of every rank to `profile/`.

    In a `with` block, Python's garbage is collected between steps only. All ranks collect it at the same steps, so no
    rank makes the others wait at another time.
    """

    def __init__(self, accelerator: "Accelerator", run_dir: Path, num_steps: int, watch: StepWatch):
        self._watch = watch
        self._cuda, self._rank = accelerator.device.type == "cuda", accelerator.process_index
        self._is_one_of_several = accelerator.num_processes > 1
        self._folder = run_dir / "profile"
        self._num_steps, self._steps = num_steps, 0
        self._profile: torch.profiler.profile | None = None

    def __enter__(self) -> "BetweenSteps":
        gc.collect()
        gc.freeze()  # the objects of the set-up live as long as the run
        gc.disable()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        gc.enable()
        gc.unfreeze()
        # A run that ends early keeps the profile of its steps. After an error on several GPUs there is none, because
        # waiting for the device may mean waiting for other processes.
        if error is None or not (self._cuda and self._is_one_of_several):
            self._stop()

    def after_step(self, num_steps: int) -> None:
        """Begin or write the profile, and collect garbage, after `num_steps` steps of the run so far."""
        self._steps += 1
        if self._num_steps and self._steps == _UNPROFILED_STEPS:
            if self._cuda:
                # Python's stacks only: with those of C++, the snapshot takes minutes to write.
                torch.cuda.memory._record_memory_history(stacks="python", max_entries=_MEMORY_EVENTS)
            self._profile = torch.profiler.profile(record_shapes=True)
            self._profile.start()
        if self._steps == _UNPROFILED_STEPS + self._num_steps:
            self._stop()
        if num_steps % _COLLECT_EVERY_STEPS == 0:
            gc.collect()

    def _stop(self) -> None:
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        viewers = "open its rank-*.trace.json.gz at https://ui.perfetto.dev"
        with self._watch.paused("the profile"):
            profile.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(self._folder / f"rank-{self._rank:05d}.trace.json.gz"))
            if self._cuda:
                torch.cuda.memory._dump_snapshot(str(self._folder / f"rank-{self._rank:05d}.memory.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
                viewers += " and its rank-*.memory.pickle at https://docs.pytorch.org/memory_viz"
        _log.info("the profile of the steps is in %s: %s", self._folder, viewers)
