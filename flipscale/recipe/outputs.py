"""The recipe's sections that do not decide what is learned: `log`, `save`, `eval`, `hub` and `cost`."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from flipscale.io import options

TASKS_DIR = "data/tasks"  # default folder of `flipscale prepare tasks`

# The name of a checkpoint's folder.
CHECKPOINT = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")


@dataclass(frozen=True)
class LogRecipe:
    """The log.

    Args:
        every_samples: Samples between two records of training metrics; 0 for none before the end. By default, a record
            ends each hundredth of the run, and each half minute without one.
        every_share: Share of a time budget between two records, in place of `every_samples`; 0 keeps `every_samples`.
        report_to: Trackers of accelerate that get the metrics besides `metrics.jsonl`, such as tensorboard or wandb.
            They receive the recipe as their configuration. wandb, trackio and comet_ml continue a run after a resume.
        hang_seconds: The run ends after this time without progress. Ranks write their stacks at half of it, or
            earlier. NCCL would end the run silently after ten minutes.
        profile_steps: Steps of each start to trace in `profile/` of the run directory; 0 for none. Ranks 0, 1 and the
            last write.
        memory_steps: Steps whose allocations on GPUs these ranks record there, after the traced steps; 0 for none.
    """

    every_samples: options.SamplesOrZero | None = None
    every_share: options.ShareBelowOne = 0.0
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    hang_seconds: options.Seconds = 540.0
    profile_steps: options.CountOrZero = 0
    memory_steps: options.CountOrZero = 0


@dataclass(frozen=True)
class SaveRecipe:
    """When checkpoints are written. Training continues during the write.

    Args:
        every_samples: Samples between two checkpoints; 0 for none by samples.
        every_minutes: Also save every so many minutes; 0 turns this off. Null is 30 without `every_samples`, else 0.
            A run also saves at its end and on a stop signal.
        total_limit: Number of newest checkpoints to keep.
    """

    every_samples: options.SamplesOrZero = 0
    every_minutes: options.Minutes | None = None
    total_limit: options.Count = 2

    @property
    def clock_minutes(self) -> float:
        """Minutes between two saves by the clock; 0 for none."""
        return self.every_minutes if self.every_minutes is not None else 0.0 if self.every_samples else 30.0


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
    every_samples: options.SamplesOrZero = 0
    every_share: options.ShareBelowOne = 0.0
    zero_shot: str | None = None
    retrieval: str | None = None
    tasks_dir: str = TASKS_DIR
    batch_size: options.Count = 256
    num_workers: options.Workers | None = None

    def every(self, share: float) -> "EvalRecipe":
        """Return this recipe with all tasks at `every_share` `share`; tasks that run only at the end still do."""
        tasks = [
            {name: value for name, value in task.items() if name != "every_samples" or value == 0}
            if isinstance(task, dict)
            else task
            for task in self.tasks
        ]
        return dataclasses.replace(self, tasks=tasks, every_samples=0, every_share=share)


@dataclass(frozen=True)
class HubRecipe:
    """Pushes to the Hub, and facts for the model card.

    Args:
        push_to_hub: Push every save, in the background, and the finished model.
        hub_model_id: The name of the model on the Hub, ORG/NAME. The repository is created if it does not exist.
        hub_private_repo: Whether a new repository is private; null for the organisation's default.
        hub_revision: The branch to push to, created if it does not exist; null for main.
        license: The licence of the weights for the model card, as the Hub writes it (`apache-2.0`).
        audit: The `audit.json` of the training data, written by `flipscale prepare audit`, for the model card.
    """

    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None
    hub_revision: str | None = None
    license: str | None = None
    audit: str | None = None


@dataclass(frozen=True)
class CostRecipe:
    """The section `cost`: prices for the model card, the page and `flipscale plan`. Null leaves out a cost.

    Args:
        device_hour_dollars: The price of a device for an hour, in dollars.
        kwh_co2_grams: The grid's CO2 emissions in grams per kWh.
        pue: Power usage effectiveness: total power of the data centre divided by its machines'. 1 leaves out cooling.
    """

    device_hour_dollars: options.NonNegative | None = None
    kwh_co2_grams: options.NonNegative | None = None
    pue: options.Overhead = 1.0

    def dollars(self, device_hours: float | None) -> float | None:
        """Return the price of device hours, or None if the hours or the price are unknown."""
        if device_hours is None or self.device_hour_dollars is None:
            return None
        return device_hours * self.device_hour_dollars

    def co2_kg(self, kwh: float | None) -> float | None:
        """Return the grid's emissions for the machines' kWh, or None if either is unknown.

        The emissions of making the machines are left out.
        """
        return None if kwh is None or self.kwh_co2_grams is None else kwh * self.pue * self.kwh_co2_grams / 1000
