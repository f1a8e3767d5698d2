"""Runs side by side: what they saw, how fast they were, and what they achieve."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flipscale.evaluation.intervals import mean_of
from flipscale.evaluation.results import (
    NOTHING,
    THIS_MODEL,
    Measured,
    Result,
    append_results,
    latest,
    read_metrics,
    read_results,
)
from flipscale.io.errors import UserError
from flipscale.io.yaml_text import read_saved_recipe

# The sections of a recipe that decide what is learned, beside its stages and its seed.
_LEARNED = ("model", "data", "mask", "loss", "optim")


@dataclass(frozen=True)
class Curve:
    """One run as its files tell it.

    Args:
        name: of the run directory.
        records: all records of `metrics.jsonl`, in the order of steps.
        measured: all results of its evaluations, in the order of steps.
        masks: the mask ratio of each stage, by its name, in the order of stages.
        sizes: the image size in pixels of those stages that have another one than the model.
        seed: of the run.
        learned: what its recipe says of what is learned, but for the seed and the lengths of stages.
    """

    name: str
    records: list[dict[str, Any]]
    measured: list[Measured]
    masks: dict[str, float]
    sizes: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    learned: str = ""

    @property
    def mask_ratio(self) -> float:
        """Of the first stage."""
        return next(iter(self.masks.values()))

    @property
    def tuned(self) -> bool:
        """Whether unmasked tuning follows."""
        return list(self.masks.values())[-1] == 0 < self.mask_ratio

    @property
    def arm(self) -> str:
        """The name of its recipe: that of the run, without the seed that a study adds."""
        return self.name.removesuffix(seed_suffix(self.seed))

    @property
    def label(self) -> str:
        """What tables and figures call the run: its recipe's name, and what it sees of images."""
        if self.sizes:
            return f"{self.arm} ({', '.join(self._path())})"
        if self.mask_ratio == 0:
            return f"{self.arm} (mask 0)"
        return f"{self.arm} ({self.mask_ratio:.0%} masked{', then tuned' if self.tuned else ''})"

    def _path(self) -> list[str]:
        """Return what each stage sees, where stages have sizes of their own."""
        parts = []
        for name, ratio in self.masks.items():
            size = f"{self.sizes[name]} px" if name in self.sizes else "full size"
            parts.append(f"{size} {ratio:.0%} masked" if ratio else size)
        return parts

    @property
    def results(self) -> list[Result]:
        """The last result of each task and metric, baselines among them."""
        return latest(self.measured)

    def points(self, metric: str) -> tuple[list[float], list[float]]:
        """Return training seconds and values of every record that has `metric`."""
        found = [(r["trained_seconds"], r[metric]) for r in self.records if r.get(metric) is not None]
        return [seconds for seconds, _ in found], [value for _, value in found]

    def by_stage(self, metric: str) -> dict[str, tuple[list[float], list[float]]]:
        """Return the same of each stage by its name, in the order of stages; none of a stage without a record."""
        stages = dict.fromkeys(record["stage"] for record in self.records if record.get("stage"))
        parts = {
            stage: replace(self, records=[r for r in self.records if r.get("stage") == stage]).points(metric)
            for stage in stages
        }
        return {stage: points for stage, points in parts.items() if points[0]}

    def course(self, name: str) -> list[Measured]:
        """Return this model's results called `name`, `task/metric`, in the order of steps."""
        return [m for m in self.measured if m.result.name == name and m.result.who == THIS_MODEL]

    @property
    def images_per_s(self) -> float:
        """Pairs seen a second of training, over the whole run."""
        return self.records[-1]["samples_seen"] / self.records[-1]["trained_seconds"]


def seed_suffix(seed: int) -> str:
    """Return what the names of a study's runs end in where it has several seeds."""
    return f"-seed{seed}"


def read_curve(run_dir: Path) -> Curve:
    """Return the curve of a run directory.

    Raises:
        ValueError: it has no record.
    """
    records = read_metrics(run_dir)
    if not records:
        raise UserError(f"{run_dir} has no metrics.jsonl with a record; did the run start?")
    recipe = read_saved_recipe(run_dir / "recipe.yaml")
    masks = {str(stage.get("name", number)): stage["mask_ratio"] for number, stage in enumerate(recipe["stages"])}
    sizes = {
        str(stage.get("name", number)): stage["image_size"]
        for number, stage in enumerate(recipe["stages"])
        if stage.get("image_size")
    }
    stages = [{name: stage[name] for name in sorted(stage) if "samples" not in name} for stage in recipe["stages"]]
    learned = {**{name: recipe.get(name) for name in _LEARNED}, "stages": stages}
    return Curve(run_dir.name, records, read_results(run_dir), masks, sizes, recipe.get("seed", 0), repr(learned))


def curve_of(run_dir: Path, step: int | None) -> Curve:
    """Return the curve of a run directory up to and with a step, or to its end."""
    curve = read_curve(run_dir)
    if step is None:
        return curve
    return replace(
        curve,
        records=[record for record in curve.records if record["step"] <= step],
        measured=[measured for measured in curve.measured if measured.step <= step],
    )


def by_recipe(curves: Sequence[Curve]) -> list[list[Curve]]:
    """Return the curves in groups of those that differ in their seeds alone; a group has each seed once."""
    groups: list[list[Curve]] = []
    for curve in curves:
        for group in groups:
            if curve.learned == group[0].learned and curve.seed not in [other.seed for other in group]:
                group.append(curve)
                break
        else:
            groups.append([curve])
    return groups


def record_baselines(run_dir: Path, baselines: Sequence[Result]) -> None:
    """Append the baselines to a run's results, once."""
    known = {(measured.result.name, measured.result.who) for measured in read_results(run_dir)}
    last = read_metrics(run_dir)[-1]
    new = [baseline for baseline in baselines if (baseline.name, baseline.who) not in known]
    append_results(run_dir, new, last["step"], last["samples_seen"], last["trained_seconds"])


def headlines(curves: Sequence[Curve]) -> dict[str, str]:
    """Return the names of the results that short tables show, and what they call them."""
    shown = {r.name: r for curve in curves for r in curve.results if r.headline and r.who == THIS_MODEL}
    labels = [result.shown for result in shown.values()]
    return {n: r.shown if labels.count(r.shown) == 1 else f"{r.task} {r.shown}" for n, r in shown.items()}


def comparison_table(curves: Sequence[Curve]) -> str:
    """Return the runs, chance and the baselines of the first run as a Markdown table, with 95 % intervals; runs that
    differ in their seeds alone also as their mean, with the interval over seeds."""
    columns = headlines(curves)
    rows = [["", "pairs seen", "pairs/s", "training", *columns.values()], ["---", *["---:"] * (3 + len(columns))]]
    groups = by_recipe(curves)
    seeded = [curve for group in groups if len(group) > 1 for curve in group]
    for curve in curves:
        last, found = curve.records[-1], {r.name: r for r in curve.results if r.who == THIS_MODEL}
        speed = [f"{last['samples_seen']:,}", f"{curve.images_per_s:,.0f}", f"{last['trained_seconds']:.0f} s"]
        label = f"{curve.label}, seed {curve.seed}" if curve in seeded else curve.label
        rows.append([label, *speed, *(_cell(found.get(name)) for name in columns)])
    for group in (group for group in groups if len(group) > 1):
        means = [_mean_cell([r for curve in group for r in curve.results if r.name == name]) for name in columns]
        rows.append([f"{group[0].label}, mean and its interval over {len(group)} seeds", *3 * [NOTHING], *means])
    others: dict[str, dict[str, Result]] = {}
    for result in curves[0].results:
        if result.who != THIS_MODEL:
            others.setdefault(result.who, {})[result.name] = result
        elif result.chance is not None:
            chance = replace(result, value=result.chance, low=None, high=None)
            others.setdefault("chance", {})[result.name] = chance
    rows += [[who, *3 * [NOTHING], *(_cell(found.get(name)) for name in columns)] for who, found in others.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mean_cell(results: Sequence[Result]) -> str:
    """Return the mean of the same result of several seeds, and its 95 % interval over them."""
    values = [result.value for result in results if result.who == THIS_MODEL and math.isfinite(result.value)]
    if len(values) < 2:
        return NOTHING
    mean, low, high = mean_of(values, results[0].unit)
    return replace(results[0], value=mean, low=low, high=high).estimate_text


def _cell(result: Result | None) -> str:
    return NOTHING if result is None else result.estimate_text
