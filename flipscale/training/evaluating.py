"""The evaluations of a run while it trains and at its end."""

import dataclasses
from typing import TYPE_CHECKING

import torch

from flipscale.evaluation.embedders.classifier import ClassifierEmbedder
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.results import BEFORE
from flipscale.evaluation.suite import evaluate_tasks
from flipscale.training.budget.progress import Progress
from flipscale.training.recipe import Recipe
from flipscale.training.schedule import has_passed, is_due
from flipscale.training.start import Plan
from flipscale.training.tracking import Tracker
from flipscale.training.watch import StepWatch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flipscale.engines.engine import Engine


class Evaluation:
    """Evaluates the weights that are trained, or their averages where the recipe asks for them."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        engine: "Engine",
        accelerator: "Accelerator",
        watch: StepWatch,
        progress: Progress,
        tracker: Tracker,
    ):
        self._plan, self._watch, self._tracker = plan, watch, tracker
        self._engine = engine
        kind = Embedder if plan.objective.takes_text else ClassifierEmbedder
        self._embedder = kind(
            engine.model,
            plan.tokenizer,
            accelerator,
            recipe.eval.batch_size,
            recipe.eval.num_workers,
            watch.alive,
        )
        self._batch_size = recipe.data.global_batch_size
        self._progress = progress
        self._every_share = recipe.eval.every_share
        self._last = progress.position
        self._has_weights = recipe.model.init_from is not None

    def before(self) -> list[Task]:
        """Return the tasks to do before the first step, of a run that was given weights: all that these can lose, and a
        head or a decoder is new."""
        if not self._has_weights or self._progress.step:
            return []
        return [task for task in self._plan.tasks if task.needs in ("texts", "features")]

    def due(self, step: int) -> list[Task]:
        """Return the tasks that are due after this many steps; none after the last, which all of them follow."""
        before, self._last = self._last, self._progress.position
        if self._progress.is_over:
            return []
        share_is_due = has_passed(before, self._last, self._every_share)
        return [
            task
            for task in self._plan.tasks
            if is_due(step, self._batch_size, task.every_samples or 0) or (share_is_due and task.every_samples is None)
        ]

    def run(self, tasks: list[Task]) -> None:
        """Collective. Do these tasks and write down what they give; before the first step that is another model's."""
        if not tasks:
            return
        with self._watch.paused("an evaluation"):
            self._engine.model.eval()
            # Compiled blocks would be compiled anew for the shapes of an evaluation, of which the last batch has its
            # own.
            with self._engine.averaged(), torch.compiler.set_stance("force_eager"):
                results = evaluate_tasks(self._embedder, tasks)
            self._engine.model.train()
            if not self._progress.step:
                results = [dataclasses.replace(result, who=BEFORE) for result in results]
            self._tracker.write_results(self._progress.step, results)
