"""The kinds of evaluation, and the evaluations of a recipe one after the other."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.retrieval import Retrieval
from flipscale.evaluation.kinds.task import StreamedTask, Task, evaluate_together
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


def evaluated(embedder: Embedder, tasks: Iterable[Task]) -> Iterator[tuple[Task, list[Result]]]:
    """Collective, to its end. Yield each task with its results, in their order. Streamed tasks of the same data that
    follow each other share one pass over its images.

    Raises:
        ValueError: a test set is not as its task needs it.
        OSError: a shard cannot be read, or a worker died.
    """
    for _, group in groupby(enumerate(tasks), lambda numbered: _shared_data(*numbered)):
        together = [task for _, task in group]
        streamed = [task for task in together if isinstance(task, StreamedTask)]
        embedder.alive()
        if streamed:
            yield from zip(together, evaluate_together(embedder, streamed), strict=True)
        else:
            yield from ((task, task.evaluate(embedder)) for task in together)


def _shared_data(number: int, task: Task) -> str | int:
    """Return the data of a streamed task; of another, which shares a pass with none, its number."""
    return task.data if isinstance(task, StreamedTask) else number


def evaluate_tasks(embedder: Embedder, tasks: Iterable[Task]) -> list[Result]:
    """Collective. Return the results of the tasks in their order, as `evaluated` has them.

    Raises:
        ValueError: a test set is not as its task needs it.
        OSError: a shard cannot be read, or a worker died.
    """
    return [result for _, results in evaluated(embedder, tasks) for result in results]
