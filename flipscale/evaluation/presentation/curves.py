"""The curves of runs, and runs side by side: their table, their means over seeds, and their times to equal results."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from flipscale.evaluation.intervals import Estimate, mean_of
from flipscale.evaluation.results import (
    NOTHING,
    THIS_MODEL,
    Measured,
    Result,
    append_results,
    latest,
    read_results,
    with_unit,
)
from flipscale.io.errors import UserError
from flipscale.io.json_lines import read_metrics
from flipscale.io.text_table import markdown_table
from flipscale.io.yaml_text import read_saved_recipe

# Sections of a recipe that decide what is learned. Stages and the seed do too.
_LEARNED = ("model", "data", "mask", "loss", "optim")


@dataclass(frozen=True)
class Curve:
    """One run, read from its files.

    Args:
        masks: mask ratio by stage name, in the order of stages.
        sizes: image size in pixels by stage name, for stages with a size of their own.
        learned: text of the recipe's learning fields, without the seed and the lengths of stages.
        along: field of the records that figures draw against, `trained_seconds` or `samples_seen`.
    """

    name: str
    records: list[dict[str, Any]]
    measured: list[Measured]
    masks: dict[str, float]
    sizes: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    learned: str = ""
    along: str = "trained_seconds"

    @property
    def mask_ratio(self) -> float:
        return next(iter(self.masks.values()))

    @property
    def tuned(self) -> bool:
        """Whether unmasked tuning follows the masked stages."""
        return list(self.masks.values())[-1] == 0 < self.mask_ratio

    @property
    def arm(self) -> str:
        return self.name.removesuffix(seed_suffix(self.seed))

    @property
    def label(self) -> str:
        """Name of the run in tables and figures: the recipe's name and its masks or image sizes."""
        if self.sizes:
            parts = []
            for name, ratio in self.masks.items():
                size = f"{self.sizes[name]} px" if name in self.sizes else "full size"
                parts.append(f"{size} {ratio:.0%} masked" if ratio else size)
            return f"{self.arm} ({', '.join(parts)})"
        if self.mask_ratio == 0:
            return f"{self.arm} (mask 0)"
        return f"{self.arm} ({self.mask_ratio:.0%} masked{', then tuned' if self.tuned else ''})"

    @property
    def results(self) -> list[Result]:
        """Last result of each task and metric, including baselines."""
        return latest(self.measured)

    def points(self, metric: str) -> tuple[list[float], list[float]]:
        """Return the training seconds, or `along`, and the values of every record with `metric`."""
        points = [(r[self.along], r[metric]) for r in self.records if r.get(metric) is not None]
        return [seconds for seconds, _ in points], [value for _, value in points]

    def by_stage(self, metric: str) -> dict[str, tuple[list[float], list[float]]]:
        """Return `points` by stage name, in the order of stages. Stages without a record are left out."""
        stages = dict.fromkeys(record["stage"] for record in self.records if record.get("stage"))
        parts = {
            stage: replace(self, records=[r for r in self.records if r.get("stage") == stage]).points(metric)
            for stage in stages
        }
        return {stage: points for stage, points in parts.items() if points[0]}

    def course(self, name: str) -> list[Measured]:
        """Return this model's results named `task/metric`, in the order of steps."""
        return [m for m in self.measured if m.result.name == name and m.result.who == THIS_MODEL]

    @property
    def images_per_s(self) -> float:
        return self.records[-1]["samples_seen"] / self.records[-1]["trained_seconds"]


def seed_suffix(seed: int) -> str:
    return f"-seed{seed}"


def read_curve(run_dir: Path, step: int | None = None) -> Curve:
    """Return the curve of a run directory."""
    records = read_metrics(run_dir)
    if not records:
        raise UserError(f"{run_dir} has no metrics.jsonl with a record; did the run start?")
    measured = read_results(run_dir)
    if step is not None:
        records = [record for record in records if record["step"] <= step]
        measured = [one for one in measured if one.step <= step]
    recipe = read_saved_recipe(run_dir / "recipe.yaml")
    named = {str(stage.get("name", number)): stage for number, stage in enumerate(recipe["stages"])}
    masks = {name: stage.get("mask_ratio") or 0.0 for name, stage in named.items()}
    sizes = {name: stage["image_size"] for name, stage in named.items() if stage.get("image_size")}
    stages = [{name: stage[name] for name in sorted(stage) if "samples" not in name} for stage in recipe["stages"]]
    learned = {**{name: recipe.get(name) for name in _LEARNED}, "stages": stages}
    return Curve(run_dir.resolve().name, records, measured, masks, sizes, recipe.get("seed", 0), repr(learned))


def by_recipe(curves: Sequence[Curve]) -> list[list[Curve]]:
    """Return groups of curves that differ only in their seeds. A group has each seed once."""
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
    """Append baselines to a run's results, unless they are already there."""
    known, last = latest(read_results(run_dir)), read_metrics(run_dir)[-1]
    new = [baseline for baseline in baselines if baseline not in known]
    append_results(run_dir, new, last["step"], last["samples_seen"], last["trained_seconds"])


def headlines(curves: Sequence[Curve]) -> dict[str, str]:
    """Return the labels of headline results, by their names `task/metric`."""
    shown = {r.name: r for curve in curves for r in curve.results if r.headline and r.who == THIS_MODEL}
    labels = [result.shown for result in shown.values()]
    return {n: r.shown if labels.count(r.shown) == 1 else f"{r.task} {r.shown}" for n, r in shown.items()}


def comparison_table(curves: Sequence[Curve]) -> str:
    """Return the runs, chance and the first run's baselines as a Markdown table with 95 % intervals. Runs that differ
    only in their seeds also have a row for their mean, with the interval over seeds."""
    columns = headlines(curves)
    rows = [["", "pairs seen", "pairs/s", "training", *columns.values()]]
    groups = by_recipe(curves)
    seeded = [curve for group in groups if len(group) > 1 for curve in group]
    for curve in curves:
        last, own = curve.records[-1], {r.name: r for r in curve.results if r.who == THIS_MODEL}
        speed = [f"{last['samples_seen']:,}", f"{curve.images_per_s:,.0f}", f"{last['trained_seconds']:.0f} s"]
        label = f"{curve.label}, seed {curve.seed}" if curve in seeded else curve.label
        rows.append([label, *speed, *(own[name].estimate_text if name in own else NOTHING for name in columns)])
    for group in (group for group in groups if len(group) > 1):
        finite = [r for curve in group for r in curve.results if r.who == THIS_MODEL and math.isfinite(r.value)]
        by_name = [[result for result in finite if result.name == name] for name in columns]
        means = [NOTHING if len(results) < 2 else estimate(results) for results in by_name]
        rows.append([f"{group[0].label}, mean and its interval over {len(group)} seeds", *3 * [NOTHING], *means])
    others: dict[str, dict[str, Result]] = {}
    for result in curves[0].results:
        if result.who != THIS_MODEL:
            others.setdefault(result.who, {})[result.name] = result
        elif result.chance is not None:
            chance = replace(result, value=result.chance, low=None, high=None)
            others.setdefault("chance", {})[result.name] = chance
    for who, own in others.items():
        rows.append([who, *3 * [NOTHING], *(own[n].estimate_text if n in own else NOTHING for n in columns)])
    return markdown_table(rows, 1)


def estimate(results: Sequence[Result]) -> str:
    """Return the mean of one result over seeds with its 95 % interval; a single value without; a dash for none."""
    if not results:
        return NOTHING
    if len(results) == 1:
        return results[0].value_text
    mean, low, high = mean_of([result.value for result in results], results[0].unit)
    return replace(results[0], value=mean, low=low, high=high).estimate_text


def over_seeds(group: Sequence[Curve], name: str, field: str = "trained_seconds") -> tuple[np.ndarray, list[Estimate]]:
    """Return where the result `task/metric` was measured, and its means over runs that differ only in their seeds.

    The places are the first run's; other runs' values are interpolated there. With one run, a mean is its own interval.
    """
    courses = [course for curve in group if (course := curve.course(name))]
    along = [[getattr(measured, field) for measured in course] for course in courses]
    heights = [[measured.result.value for measured in course] for course in courses]
    values = np.array([np.interp(along[0], at, own) for at, own in zip(along, heights, strict=True)])
    if len(courses) == 1:
        return np.array(along[0]), [Estimate(value, value, value) for value in values[0].tolist()]
    return np.array(along[0]), [mean_of(column, courses[0][0].result.unit) for column in values.T]


def seconds_to(curve: Curve, name: str, value: float) -> float | None:
    """Return the training seconds at which a result first reached `value`; None if it never did.

    Results between evaluations are interpolated, from chance at 0 seconds."""
    course = curve.course(name)
    if not course:
        return None
    sign = 1.0 if course[0].result.higher_is_better else -1.0
    points = [(m.trained_seconds, sign * m.result.value) for m in course]
    if course[0].result.chance is not None:
        points.insert(0, (0.0, sign * course[0].result.chance))
    before = points[0]
    for after in points:
        if after[1] >= sign * value:
            rise = after[1] - before[1]
            part = (sign * value - before[1]) / rise if rise > 0 else 1.0
            return before[0] + part * (after[0] - before[0])
        before = after
    return None


def times_to_equal(curves: Sequence[Curve]) -> list[str]:
    """Return a sentence for each pair of recipes: how much sooner the better one reaches the other's final result.

    The result is the first headline that all runs have. The interval is over seeds, of the logarithms of the ratios."""
    name = next((name for name in headlines(curves) if all(curve.course(name) for curve in curves)), None)
    sentences: list[str] = []
    for pair in combinations(by_recipe(curves), 2) if name else ():
        ends = [[curve.course(str(name))[-1] for curve in group] for group in pair]
        means = [float(np.mean([end.result.value for end in group])) for group in ends]
        is_second = (means[1] > means[0]) == ends[0][0].result.higher_is_better and means[0] != means[1]
        better, slower, last = pair[is_second], pair[not is_second], ends[not is_second]
        reached = zip(better, last, strict=False)
        times = [(end, seconds_to(curve, str(name), end.result.value)) for curve, end in reached]
        # A curve that begins at that result gives no ratio.
        ratios = [end.trained_seconds / seconds for end, seconds in times if seconds]
        value = with_unit(means[not is_second], last[0].result.unit)
        sentence = f"{better[0].arm} reaches the last {last[0].result.shown} of {slower[0].arm} ({value})"
        if len(ratios) < len(times):
            sentence += f" in {len(ratios)} of {len(times)} seeds only, so no ratio of times is given."
        elif len(ratios) == 1:
            sentence += f" {ratios[0]:.2f} times as fast; one seed, so no interval."
        else:
            ratio, low, high = (math.exp(end) for end in mean_of([math.log(ratio) for ratio in ratios]))
            interval = f"(95 % interval over {len(ratios)} seeds: {low:.2f} to {high:.2f})"
            sentence += f" {ratio:.2f} times as fast {interval}."
        sentences.append(sentence)
    return sentences
