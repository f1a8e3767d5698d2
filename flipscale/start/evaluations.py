"""The evaluations of a run: their checks before it, and their results in the training."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flipscale.evaluation.embedding import ClassifierEmbedder, Embedder, parts_of
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.presentation.last_lines import draw_figures
from flipscale.evaluation.results import BEFORE, Result, append_results, as_metrics, drop_results_after
from flipscale.evaluation.suite import check_decodable, check_image_sizes, evaluated, planned_tasks
from flipscale.evaluation.test_set import TestSet, read_class_names, refuse_other_class_names, training_class_names
from flipscale.io.cores import decoding_workers
from flipscale.io.errors import UserError
from flipscale.loop.between_steps import Evaluation
from flipscale.loop.inputs import Session, TrainingSetup
from flipscale.objectives.build_objective import build_config, build_objective
from flipscale.process.slow_steps import StepWatch
from flipscale.process.world import place_in_world
from flipscale.recipe.recipe import Recipe

if TYPE_CHECKING:
    from flipscale.engines.engine import Engine
    from flipscale.objectives.objective import Objective

# Drawing takes a second or two, so an evaluation redraws only older figures.
_FRESH_SECONDS = 300.0


def tasks_of(recipe: Recipe, objective: "Objective", config: Any) -> list[Task]:
    """Return the tasks of a recipe. Raise UserError if its model lacks a part that a task needs, or in training changes
    what a task keeps."""
    tasks = planned_tasks(recipe.eval)
    check_image_sizes(recipe.eval, config.vision_config.patch_size)
    parts = parts_of(config) if objective.takes_text else ("features", "head")
    for task in tasks:
        task.check_model(parts, f"the model of loss.kind {recipe.loss.kind!r}")
        if task.kind == "zero_shot_memory":
            raise UserError(
                f"eval.tasks has {task.name!r} of kind {task.kind!r}, whose memory is of one model's weights, and "
                "training changes them; leave it out, and use `flipscale evaluate --memory` on the finished model"
            )
    return tasks


def check_tasks(recipe: Recipe) -> tuple[list[Task], list[str]]:
    """Return the tasks of a recipe, checked with their data, and the names of a classifier's classes; empty for other
    models. Every process checks them by itself. Raise UserError as `tasks_of`, or if the data of a task cannot be used,
    or the classes are not those of the task or of the run's earlier starts."""
    objective, config = build_objective(recipe), build_config(recipe)
    tasks, names = tasks_of(recipe, objective, config), list[str]()
    for task in tasks:
        task.check()
    if objective.num_labels is not None:
        names = training_class_names(recipe.data, objective.num_labels)
        for task in tasks:
            if task.needs in ("head", "answers") and read_class_names(task.data) != names:
                raise UserError(f"{task.data} has other class names, or in another order, than the training shards")
        refuse_other_class_names(Path(recipe.output_dir), names)
    check_decodable(tasks, config.vision_config.image_size, *place_in_world())
    return tasks, names


def test_set_digests(tasks: Sequence[Task]) -> dict[str, list[str]]:
    """Return the digests of the test sets of each task, which nodes with own copies may have in different states."""
    sets = {task.name: [TestSet.open(task.data), *task.other_sets()] for task in tasks}
    return {name: [one.source.contents_digest(in_order=True) for one in each] for name, each in sets.items()}


class RunEvaluator:
    """Evaluates the weights in training, and writes `results.jsonl`. An `Evaluator` of the loop.

    Before the first step, tasks measure what the training may lose. A new head or decoder has nothing to lose.
    """

    def __init__(
        self, tasks: Sequence[Task], setup: TrainingSetup, session: Session, engine: "Engine", watch: StepWatch
    ):
        recipe, kind = setup.recipe.eval, Embedder if setup.objective.takes_text else ClassifierEmbedder
        sizes = (recipe.batch_size, decoding_workers(recipe.num_workers))
        self._embedder = kind(engine.model, setup.tokenizer, session.accelerator, *sizes, watch.alive)
        if tasks:
            from flipscale.evaluation.foreign_models import with_embedded_towers  # imports the models

            self._embedder = with_embedded_towers(self._embedder)
        self._run_dir, self._step_samples = Path(setup.recipe.output_dir), setup.batch_size
        self._tasks = {task.name: task for task in tasks}
        starts = setup.recipe.model.init_from is not None
        self.evaluations = [
            Evaluation(task.name, task.every_samples, starts and task.needs in ("texts", "features")) for task in tasks
        ]
        self._contents: dict[str, str] = {}  # digests by place, of sets that several tasks may have
        self._drawn = time.monotonic()
        if session.accelerator.is_main_process:
            drop_results_after(self._run_dir, setup.schedule.last_evaluated(session.state))

    def __call__(
        self, evaluations: Sequence[Evaluation], num_steps: int, trained_seconds: float, stops: Callable[[], bool]
    ) -> tuple[dict[str, float], str] | None:
        """Collective. Return the numbers of evaluations, or None if `stops` ended them. Those after 0 steps are of the
        untrained model."""
        results: list[Result] = []
        for task, of_task in evaluated(self._embedder, [self._tasks[one.name] for one in evaluations]):
            test_set = TestSet.open(task.data)
            self._contents[task.data] = self._contents.get(task.data) or test_set.digest(self._embedder)
            test = task.digest(test_set, self._contents[task.data])
            results += [dataclasses.replace(result, test=test) for result in of_task]
            if stops():
                return None
        if not num_steps:
            results = [dataclasses.replace(result, who=BEFORE) for result in results]
        if self._embedder.accelerator.is_main_process:
            append_results(self._run_dir, results, num_steps, num_steps * self._step_samples, trained_seconds)
            if time.monotonic() - self._drawn > _FRESH_SECONDS:
                draw_figures(self._run_dir)
                self._drawn = time.monotonic()
        return as_metrics(results), results_line(num_steps, results)


def results_line(step: int, results: Sequence[Result]) -> str:
    """Return the headline results of evaluations with their 95 % intervals."""
    shown = [result for result in results if result.headline] or results
    return f"step {step:,}: " + ", ".join(
        f"{one.task} {one.shown}{', group_by_caption' * bool(one.made_by.get('group_by_caption'))} {one.estimate_text}"
        for one in shown
    )
