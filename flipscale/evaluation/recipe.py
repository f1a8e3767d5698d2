"""What a recipe says of evaluations."""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flipscale.data.prepared import TASKS_DIR
from flipscale.io.options import Count, SamplesOrZero, ShareBelowOne, Workers

if TYPE_CHECKING:
    from flipscale.evaluation.kinds.task import Task


@dataclass(frozen=True)
class EvalRecipe:
    """What is evaluated while training, and at its end.

    Args:
        tasks: The evaluations, each the name of a page (`imagenet1k`, or `{task: imagenet1k, every_samples: ...}` to
            change a field) or `{kind: zero_shot, data: FOLDER}`, with a `name` where several are of one kind,
            `every_samples` where it has an interval of its own, `image_size` where its images are not of the model's
            size, and the options of its kind.
        every_samples: How many samples lie between two runs of a task that does not say so itself; at 0, it runs only
            at the end.
        every_share: In a run with a time budget, the share of it that lies between two runs of such a task, in place of
            `every_samples`.
        zero_shot: Short for a task `{kind: zero_shot, data: FOLDER}`; it replaces the data of the listed task of that
            name.
        retrieval: Short for a task `{kind: retrieval, data: FOLDER}`, likewise.
        tasks_dir: Where `flipscale prepare tasks` put the data of the tasks that have a page.
        batch_size: How many images a process embeds at a time.
        num_workers: How many processes decode the images of each training process; 0 decodes in the training process.
    """

    tasks: list[str | dict[str, Any]] = field(default_factory=list)
    every_samples: SamplesOrZero = 0
    every_share: ShareBelowOne = 0.0
    zero_shot: str | None = None
    retrieval: str | None = None
    tasks_dir: str = TASKS_DIR
    batch_size: Count = 256
    num_workers: Workers = 4

    def __post_init__(self) -> None:
        self.planned()

    def planned(self) -> list["Task"]:
        """Return the tasks, the short forms among them, each with its interval: None where that is `every_share`.

        Raises:
            ValueError: an unknown name, kind or field, or two tasks of one name.
        """
        from flipscale.evaluation.suite import build_tasks  # with torch, and --help needs none

        listed = [dict(task) if isinstance(task, dict) else {"task": task} for task in self.tasks]
        for kind in ("zero_shot", "retrieval"):
            folder = getattr(self, kind)
            named = [task.get("name") or task.get("kind") for task in listed]
            if folder and kind in named:
                listed[named.index(kind)] = {**listed[named.index(kind)], "data": folder}
            elif folder:
                listed.append({"kind": kind, "data": folder})
        tasks = build_tasks(listed, self.tasks_dir)
        if self.every_share:
            return tasks
        return [
            task if task.every_samples is not None else dataclasses.replace(task, every_samples=self.every_samples)
            for task in tasks
        ]

    def every(self, share: float) -> "EvalRecipe":
        """Return this recipe with its tasks at one interval, a share of the run's time; those that run only at the end
        still do."""
        tasks = [
            {name: value for name, value in task.items() if name != "every_samples" or value == 0}
            if isinstance(task, dict)
            else task
            for task in self.tasks
        ]
        return dataclasses.replace(self, tasks=tasks, every_samples=0, every_share=share)
