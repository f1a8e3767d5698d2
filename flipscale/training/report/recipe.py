"""The recipe's `log` section."""

from dataclasses import dataclass, field

from flipscale.io.options import CountOrZero, SamplesOrZero, Seconds, ShareBelowOne


@dataclass(frozen=True)
class LogRecipe:
    """What is reported.

    Args:
        every_samples: How many samples lie between two lines of training metrics; at 0, there is none.
        every_share: In a run with a time budget, the share of it that lies between two lines, in place of
            `every_samples`; at 0, samples are counted.
        report_to: Trackers of accelerate that get the metrics besides `metrics.jsonl`, such as tensorboard or wandb.
            They get the recipe as their configuration; wandb, trackio and comet_ml go on with the same run when the run
            is resumed.
        hang_seconds: A step that takes more seconds ends the run, after every rank has written what it was doing. Below
            the ten minutes after which NCCL ends it without a word.
        profile_steps: How many steps of each start are profiled, in `profile/` of the run directory; at 0, none.
    """

    every_samples: SamplesOrZero = 1_000_000
    every_share: ShareBelowOne = 0.0
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    hang_seconds: Seconds = 540.0
    profile_steps: CountOrZero = 0
