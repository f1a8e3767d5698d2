"""Checkpoints of a run while it trains: when one is due, and what it says of the run."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from flipscale.data.sources.source import shard_sizes_digest
from flipscale.engines.checkpoint import CheckpointWriter, checkpoint_of
from flipscale.training.bad_samples import BadSamples
from flipscale.training.budget.progress import Progress
from flipscale.training.recipe import Recipe, to_yaml
from flipscale.training.schedule import is_due
from flipscale.training.start import Plan, Start

if TYPE_CHECKING:
    from flipscale.engines.engine import Engine


_log = logging.getLogger(__name__)


class Saver:
    """Begins and commits the checkpoints of a run. Training goes on while one is written."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        start: Start,
        engine: "Engine",
        writer: CheckpointWriter,
        bad: BadSamples,
        progress: Progress,
    ):
        self._recipe = recipe
        self._plan = plan
        self._start = start
        self._engine = engine
        self._writer = writer
        self._bad_samples = bad
        self._progress = progress
        self._batch_size = recipe.data.global_batch_size

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint follows this many steps: the recipe wants one, or the run is over."""
        return self._progress.is_over or is_due(step, self._batch_size, self._recipe.save.every_samples)

    def save(self, step: int, trained_seconds: float) -> int | None:
        """Collective. Commit the checkpoint before and begin that of `step`, unless they are the same one.

        Returns:
            The step of the checkpoint that was committed, None if there was none.

        Raises:
            OSError: the disk is full or not writable, or another run has taken the run directory.
        """
        committed = self.commit()
        self._bad_samples.flush()
        state = {
            "step": step,
            "samples_seen": step * self._batch_size,
            "optimizer_steps": self._engine.optimizer_steps(),
            "trained_seconds": trained_seconds,
            **self._progress.state(),
            "data_samples": len(self._plan.source),
            "data_fingerprint": shard_sizes_digest(self._plan.source),
            "num_processes": self._writer.accelerator.num_processes,
        }
        self._writer.save(self._engine.pieces(), self._engine.layout.shapes(), state, to_yaml(self._recipe))
        return committed

    def commit(self) -> int | None:
        """Collective. Wait for the checkpoint that was begun, give it its name and return its step, None if none was.

        Raises:
            OSError: the disk is full or not writable, or another run has taken the run directory.
        """
        self._start.check_lock(at_once=True)
        step = self._writer.commit()
        if step is not None:
            _log.info("step %s: saved %s", f"{step:,}", checkpoint_of(Path(self._recipe.output_dir), step))
        return step
