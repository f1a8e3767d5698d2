"""The checkpoints of a run, with their state."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from flipscale.data.samples import shard_sizes_digest
from flipscale.engines.checkpoint import CheckpointWriter, SaveRecipe, checkpoint_of
from flipscale.training.bad_samples import BadSamples
from flipscale.training.plan import Plan
from flipscale.training.run_directory import how_to_go_on
from flipscale.training.schedule import Step
from flipscale.training.start import Start
from flipscale.training.watch import StepWatch

if TYPE_CHECKING:
    from flipscale.engines.engine import Engine


_log = logging.getLogger(__name__)


class Saver:
    """Begins and commits the checkpoints of a run. Training goes on while one is written."""

    def __init__(
        self,
        plan: Plan,
        start: Start,
        engine: "Engine",
        recipe: SaveRecipe,
        run_dir: Path,
        bad_samples: BadSamples,
        watch: StepWatch,
    ):
        self.writer = CheckpointWriter(start.accelerator, run_dir, recipe, start.state.get("step"))
        self._plan = plan
        self._start = start
        self._engine = engine
        self._bad_samples = bad_samples
        self._watch = watch

    def save(self, step: Step) -> int | None:
        """Collective. Commit the open checkpoint, and begin the one before `step`, unless they are the same.

        Returns:
            Step of the committed checkpoint; None if none was open.

        Raises:
            OSError: the disk is full or not writable, or another run has taken the run directory.
        """
        with self._watch.paused("a save"):
            committed = self.commit()
            self._bad_samples.flush()
            state = {
                "step": step.number,
                "samples_seen": step.number * self._plan.batch_size,
                "optimizer_steps": self._engine.layout.optimizer_steps(),
                "trained_seconds": self._watch.trained_seconds,
                **self._plan.schedule.state(step),
                "data_samples": len(self._plan.source),
                "data_fingerprint": shard_sizes_digest(self._plan.source),
                "num_processes": self.writer.accelerator.num_processes,
            }
            self.writer.save(self._engine.pieces(), self._engine.layout.shapes(), state, self._plan.recipe_yaml)
            return committed

    def log_stop(self, step: Step) -> None:
        """Log that the run has saved before `step` and stops, and how to resume it."""
        place = self._plan.schedule.words(step.number, step.position)
        _log.info("stopped and saved at %s; %s", place, how_to_go_on())

    def commit(self) -> int | None:
        """Collective. Wait until the open checkpoint is on disk, and rename it.

        Returns:
            Step of the checkpoint; None if none was open.

        Raises:
            OSError: the disk is full or not writable, or another run has taken the run directory.
        """
        self._start.check_lock(at_once=True)
        step = self.writer.commit()
        if step is not None:
            _log.info("step %s: saved %s", f"{step:,}", checkpoint_of(self.writer.run_dir, step))
        return step
