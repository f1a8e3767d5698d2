"""The evaluations of a run while it trains and at its end."""

import dataclasses
from typing import TYPE_CHECKING

import torch

from flipscale.evaluation.embedding import ClassifierEmbedder, Embedder
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.recipe import EvalRecipe
from flipscale.evaluation.results import BEFORE
from flipscale.evaluation.suite import evaluate_tasks
from flipscale.training.plan import Plan
from flipscale.training.tracking import Tracker
from flipscale.training.watch import StepWatch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flipscale.engines.engine import Engine


class Evaluation:
    """Evaluates the weights in training, or their averages if the recipe asks for averages."""

    def __init__(
        self,
        recipe: EvalRecipe,
        plan: Plan,
        engine: "Engine",
        accelerator: "Accelerator",
        watch: StepWatch,
        tracker: Tracker,
    ):
        self._engine, self._watch, self._tracker = engine, watch, tracker
        kind = Embedder if plan.objective.takes_text else ClassifierEmbedder
        self._embedder = kind(
            *(engine.model, plan.tokenizer, accelerator, recipe.batch_size, recipe.num_workers, watch.alive)
        )

    def run(self, tasks: list[Task], num_steps: int) -> None:
        """Collective. Run the tasks and write their results.

        Args:
            num_steps: number of steps taken; at 0, the results are those of the model before the training.
        """
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
