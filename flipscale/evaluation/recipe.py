"""The recipe's section `eval`: the evaluations during and after the training."""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flipscale.data.prepared import TASKS_DIR
from flipscale.io.options import Count, SamplesOrZero, ShareBelowOne, Workers

if TYPE_CHECKING:
    from flipscale.evaluation.kinds.task import Task


@dataclass(frozen=True)
class EvalRecipe:
    """Evaluations during the training and at its end.

    Args:
        tasks: Evaluations. A task is a built-in name (`imagenet1k`), that name with changed fields (`{task: imagenet1k,
            ...}`), or a kind with your folder (`{kind: zero_shot, data: FOLDER}`). Fields of all tasks are `name`,
            `every_samples`, `image_size` and the options of the kind.
        every_samples: Training samples between two runs of a task without its own `every_samples`; 0 for the end only.
        every_share: Share of `budget_minutes` between two runs of such a task, in place of `every_samples`.
        zero_shot: Adds the task `{kind: zero_shot, data: FOLDER}`. If `tasks` names it, only its data changes.
        retrieval: Adds the task `{kind: retrieval, data: FOLDER}`, or changes the data of the listed task.
        tasks_dir: Folder in which `flipscale prepare tasks` put the data of built-in tasks.
        batch_size: Images that a process embeds at once.
        num_workers: Decoding processes of each training process, as `data.num_workers`.
    """

    tasks: list[str | dict[str, Any]] = field(default_factory=list)
    every_samples: SamplesOrZero = 0
    every_share: ShareBelowOne = 0.0
    zero_shot: str | None = None
    retrieval: str | None = None
    tasks_dir: str = TASKS_DIR
    batch_size: Count = 256
    num_workers: Workers | None = None

    def __post_init__(self) -> None:
        if self.tasks or self.zero_shot or self.retrieval:
            self.planned()

    def planned(self) -> list["Task"]:
        """Return the tasks with their intervals, None for those at `every_share`. The short forms are among them."""
        from flipscale.evaluation.suite import build_tasks  # imports torch, which `--help` must not

        listed = [dict(task) if isinstance(task, dict) else {"task": task} for task in self.tasks]
        for kind in ("zero_shot", "retrieval"):
            folder = getattr(self, kind)
            names = [task.get("name") or task.get("kind") for task in listed]
            if folder and kind in names:
                listed[names.index(kind)] = {**listed[names.index(kind)], "data": folder}
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
        """Return this recipe with all tasks at `every_share` `share`; tasks that run only at the end still do."""
        tasks = [
            {name: value for name, value in task.items() if name != "every_samples" or value == 0}
            if isinstance(task, dict)
            else task
            for task in self.tasks
        ]
        return dataclasses.replace(self, tasks=tasks, every_samples=0, every_share=share)
