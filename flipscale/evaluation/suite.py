"""The kinds of evaluation, the tasks that a recipe lists, and their run one after the other."""

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentError, ArgumentParser

from flipscale.data.decode import decode_box
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.captioning import Captioning, Likelihood
from flipscale.evaluation.kinds.image_caption_selection import ImageCaptionSelection
from flipscale.evaluation.kinds.languages import MultilingualRetrieval, MultilingualZeroShot
from flipscale.evaluation.kinds.probe import FewShot, Probe
from flipscale.evaluation.kinds.retrieval import Retrieval
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.kinds.vqa import Vqa
from flipscale.evaluation.kinds.worst_group import WorstGroup
from flipscale.evaluation.kinds.zero_shot import Classification, ZeroShot, ZeroShotMultilabel
from flipscale.evaluation.kinds.zero_shot_memory import ZeroShotMemory
from flipscale.evaluation.results import Result
from flipscale.evaluation.task_page import read_page
from flipscale.evaluation.test_set import TestSet
from flipscale.evaluation.whole_images import WholeImages
from flipscale.io.errors import UserError
from flipscale.io.options import check_ranges, parser_message
from flipscale.model.configuration_flip import patches_along
from flipscale.recipe.outputs import TASKS_DIR, EvalRecipe

KINDS: dict[str, type[Task]] = {
    "zero_shot": ZeroShot,
    "zero_shot_multilabel": ZeroShotMultilabel,
    "zero_shot_memory": ZeroShotMemory,
    "retrieval": Retrieval,
    "multilingual_retrieval": MultilingualRetrieval,
    "multilingual_zero_shot": MultilingualZeroShot,
    "image_caption_selection": ImageCaptionSelection,
    "worst_group": WorstGroup,
    "few_shot": FewShot,
    "probe": Probe,
    "captioning": Captioning,
    "likelihood": Likelihood,
    "vqa": Vqa,
    "classification": Classification,
}
# Seconds for the samples of each test set before a run. Small sets are tried whole, ImageNet to a thousand or two.
CHECK_SECONDS = 5.0


def build_task(content: dict[str, Any], where: str) -> Task:
    """Return the task that `{kind: ..., data: ..., ...}` describes."""
    for name in ("kind", "data", "name"):
        if not isinstance(content.get(name, ""), str):
            raise UserError(f"{where}: {name} is {content[name]!r:.60}; it must be a text")
    if content.get("kind") not in KINDS:
        raise UserError(f"{where}: kind is {content.get('kind')!r}; use one of {', '.join(KINDS)}")
    kind = KINDS[content["kind"]]
    known = [field.name for field in fields(kind)]
    for name in content:
        if name not in known:
            raise UserError(f"{where}: {content['kind']} has no field {name!r}; it has {', '.join(known)}")
    content = {**content, "name": content.get("name") or content["kind"]}
    if not content.get("data"):
        raise UserError(f"{where}: data is missing; name the folder of the test set")
    if not re.fullmatch(r"[\w.-]+", content["name"]):
        raise UserError(f"{where}: name is {content['name']!r}; use letters, digits, '.', '_' and '-'")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "task")
    try:
        task: Task = parser.instantiate(parser.parse_object({"task": content})).task
    except (ArgumentError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: {parser_message(error).removeprefix('task.')}") from None
    check_ranges(task, where)
    return task


def build_tasks(listed: Sequence[str | dict[str, Any]], tasks_dir: str | Path = TASKS_DIR) -> list[Task]:
    """Return the tasks that a recipe lists: names of pages, `{task: NAME, ...}` with fields unlike the page's,
    or `{kind: ..., data: ..., ...}`."""
    tasks = []
    for number, given in enumerate(listed):
        where, content = f"eval.tasks[{number}]", {"task": given} if isinstance(given, str) else given
        try:
            content = with_page(content, tasks_dir)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        tasks.append(build_task(content, where))
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{names.count(name)} of eval.tasks are named {name!r}; give each its own, as {name}_2")
    return tasks


def with_page(task: dict[str, Any], tasks_dir: str | Path) -> dict[str, Any]:
    """Return the fields of a task, and of its page if it names one. Raise UserError for an unknown page."""
    if not task.get("task"):
        return task
    page = read_page(str(task["task"]))
    return {**page.listed(Path(tasks_dir) / page.data), **task}


def listed_tasks(recipe: EvalRecipe) -> list[dict[str, Any]]:
    """Return the fields of a recipe's tasks. The short forms are among them."""
    listed = [dict(task) if isinstance(task, dict) else {"task": task} for task in recipe.tasks]
    for kind in ("zero_shot", "retrieval"):
        folder = getattr(recipe, kind)
        names = [task.get("name") or task.get("kind") for task in listed]
        if folder and kind in names:
            listed[names.index(kind)] = {**listed[names.index(kind)], "data": folder}
        elif folder:
            listed.append({"kind": kind, "data": folder})
    return listed


def planned_tasks(recipe: EvalRecipe) -> list[Task]:
    """Return the tasks of a recipe with their intervals, None for those at `every_share`."""
    tasks = build_tasks(listed_tasks(recipe), recipe.tasks_dir)
    if recipe.every_share:
        return tasks
    every = recipe.every_samples
    return [replace(task, every_samples=every) if task.every_samples is None else task for task in tasks]


def check_image_sizes(recipe: EvalRecipe, patch_size: int) -> None:
    """Raise UserError unless the patches divide each task's own image size."""
    for task in planned_tasks(recipe):
        try:
            patches_along(patch_size if task.image_size is None else task.image_size, patch_size)
        except ValueError as error:
            raise UserError(f"eval.tasks: {task.name}: {error}") from None


def evaluated(embedder: Embedder, tasks: Iterable[Task]) -> Iterator[tuple[Task, list[Result]]]:
    """Collective, to its end. Yield each task with its results, in order.

    Consecutive tasks with the same data and image size share one pass over the images. Each process keeps the features
    of its images for that long."""
    tasks = list(tasks)
    for task in tasks:
        task.check_model(embedder.gives, f"the model {embedder.name}".rstrip())
    for (data, image_size), group in groupby(tasks, lambda task: (task.data, task.image_size)):
        together, test_set, sized = list(group), TestSet.open(data), embedder.at(image_size)
        if len(together) > 1:
            sized = replace(sized, kept={})
        for task in together:
            embedder.alive()
            yield task, task.evaluate(sized, test_set)


def run_tasks(embedder: Embedder, tasks: Iterable[Task]) -> list[Result]:
    return [result for _, results in evaluated(embedder, tasks) for result in results]


def _square(size: int, encoded: bytes, _: int) -> dict[str, np.ndarray]:
    return {"image": decode_box(encoded, None, size, (1.0, 1.0))}


def check_decodable(tasks: Sequence[Task], image_size: int, rank: int, world: int) -> None:
    """Decode images and read answers of the test sets for a few seconds each, in a random order, so that a damaged set
    is refused before the training."""
    for task in tasks:
        for test_set in [TestSet.open(task.data), *task.other_sets()]:
            if not len(test_set):
                raise UserError(f"{task.name}: the test set {test_set.data} is empty; name another")
            size, truth = task.image_size or image_size, task.truth(test_set)
            images = WholeImages(test_set.source, partial(_square, size))
            end = time.monotonic() + CHECK_SECONDS
            for row in np.random.default_rng(0).permutation(np.arange(rank, len(images), world)):
                truth(*images.where[row])
                images.decoded(row)
                if time.monotonic() > end:
                    break
