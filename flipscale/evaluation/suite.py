"""The kinds of evaluation, and the evaluations of a recipe one after the other."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.retrieval import Retrieval
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.kinds.zero_shot import ZeroShot
from flipscale.evaluation.results import Result

KINDS: dict[str, type[Task]] = {
    "zero_shot": ZeroShot,
    "retrieval": Retrieval,
}


def build_tasks(listed: Sequence[dict[str, Any]]) -> list[Task]:
    """Return the tasks that a recipe lists as `{kind: ..., data: ..., ...}`.

    Raises:
        ValueError: an unknown kind, a field that its kind does not take, or two tasks of one name.
    """
    tasks = [_build_task(content, f"eval.tasks[{number}]") for number, content in enumerate(listed)]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{names.count(name)} of eval.tasks are called {name!r}; give each a name of its own, such as "
                f"name: {name}_2"
            )
    return tasks


def _build_task(content: dict[str, Any], where: str) -> Task:
    if content.get("kind") not in KINDS:
        raise ValueError(f"{where}: kind is {content.get('kind')!r}; use one of {', '.join(KINDS)}")
    kind = KINDS[content["kind"]]
    known = [field.name for field in fields(kind)]
    for name in content:
        if name not in known:
            raise ValueError(f"{where}: {content['kind']} has no field {name!r}; it has {', '.join(known)}")
    content = {**content, "name": content.get("name") or content["kind"]}
    if not content.get("data"):
        raise ValueError(f"{where}: data is missing; name the folder of the test set")
    if not re.fullmatch(r"[\w.-]+", content["name"]):
        raise ValueError(f"{where}: name is {content['name']!r}; use letters, digits, '.', '_' and '-'")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "task")
    try:
        return parser.instantiate(parser.parse_object({"task": content})).task
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None


def evaluate(embedder: Embedder, task: Task) -> list[Result]:
    """Collective. Return what the model of `embedder` achieves at a task.

    Raises:
        ValueError: the test set is not as the task needs it.
    """
    embedder.alive()
    return task.evaluate(embedder)


def evaluate_tasks(embedder: Embedder, tasks: Iterable[Task]) -> list[Result]:
    """Collective. Return the results of the tasks, one after the other.

    Raises:
        ValueError: a test set is not as its task needs it.
    """
    return [result for task in tasks for result in evaluate(embedder, task)]
