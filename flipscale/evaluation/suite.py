"""The evaluations that a recipe lists, and how they are done one after the other."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from flipscale.data.prepared import TASKS_DIR
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.kinds import build_task
from flipscale.evaluation.kinds.task import StreamedTask, Task, evaluate_together
from flipscale.evaluation.results import Result
from flipscale.evaluation.task_page import read_page
from flipscale.io.errors import UserError


def build_tasks(listed: Sequence[str | dict[str, Any]], tasks_dir: str | Path = TASKS_DIR) -> list[Task]:
    """Return the tasks that a recipe lists: by the names of their pages, as `{task: NAME, ...}` with fields that differ
    from the page's, or as `{kind: ..., data: ..., ...}`.

    Args:
        tasks_dir: where `flipscale prepare tasks` put the data of those that have a page.

    Raises:
        ValueError: an unknown name or kind, a field that its kind does not take, or two tasks of one name.
    """
    tasks = [
        build_task(_in_full(content, Path(tasks_dir), f"eval.tasks[{number}]"), f"eval.tasks[{number}]")
        for number, content in enumerate(listed)
    ]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{names.count(name)} of eval.tasks are called {name!r}; give each a name of its own, such as "
                f"name: {name}_2"
            )
    return tasks


def _in_full(content: str | dict[str, Any], tasks_dir: Path, where: str) -> dict[str, Any]:
    """Return what a recipe says of a task, and what the page says if it names one."""
    given = {"task": content} if isinstance(content, str) else content
    if not given.get("task"):
        return given
    try:
        page = read_page(str(given["task"]))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return {**page.listed(tasks_dir / page.data), **given}


def evaluated(embedder: Embedder, tasks: Iterable[Task]) -> Iterator[tuple[Task, list[Result]]]:
    """Collective, to its end. Yield each task with its results, in their order. Streamed tasks of the same data and
    image size that follow each other share one pass over its images.

    Raises:
        ValueError: a test set is not as its task needs it.
        OSError: a shard cannot be read, or a worker died.
    """
    tasks = list(tasks)
    for task in tasks:
        task.check_model(embedder.gives, f"the model {embedder.name}".rstrip())
    for _, group in groupby(enumerate(tasks), lambda numbered: _shared_data(*numbered)):
        together = [task for _, task in group]
        streamed = [task for task in together if isinstance(task, StreamedTask)]
        embedder.alive()
        if streamed:
            yield from zip(together, evaluate_together(embedder.at(together[0].image_size), streamed), strict=True)
        else:
            yield from ((task, task.evaluate(embedder.at(task.image_size))) for task in together)


def _shared_data(number: int, task: Task) -> tuple[str | int, int | None]:
    """Return the data of a streamed task and its image size; of another, which shares a pass with none, its number."""
    return (task.data if isinstance(task, StreamedTask) else number), task.image_size


def evaluate_tasks(embedder: Embedder, tasks: Iterable[Task]) -> list[Result]:
    """Collective. Return the results of the tasks in their order, as `evaluated` has them.

    Raises:
        ValueError: a test set is not as its task needs it.
        OSError: a shard cannot be read, or a worker died.
    """
    return [result for _, results in evaluated(embedder, tasks) for result in results]
