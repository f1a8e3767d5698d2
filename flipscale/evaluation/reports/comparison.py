"""Runs side by side: what they saw, how fast they were, and what they achieve."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flipscale.evaluation.results import (
    THIS_MODEL,
    Measured,
    Result,
    append_results,
    latest,
    read_metrics,
    read_results,
)
from flipscale.files.yaml_text import read_saved


@dataclass(frozen=True)
class Curve:
    """One run as its files tell it.

    Args:
        name: of the run directory.
        records: all records of `metrics.jsonl`, in the order of steps.
        measured: all results of its evaluations, in the order of steps.
        masks: the mask ratio of each stage, by its name, in the order of stages.
    """

    name: str
    records: list[dict[str, Any]]
    measured: list[Measured]
    masks: dict[str, float]

    @property
    def mask_ratio(self) -> float:
        """Of the first stage."""
        return next(iter(self.masks.values()))

    @property
    def tuned(self) -> bool:
        """Whether unmasked tuning follows."""
        return list(self.masks.values())[-1] == 0 < self.mask_ratio

    @property
    def label(self) -> str:
        """What people call the run: CLIP without a mask, FLIP with its ratio."""
        if self.mask_ratio == 0:
            return "CLIP (mask 0)"
        return f"FLIP ({self.mask_ratio:.0%} masked{', then tuned' if self.tuned else ''})"

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


def read_curve(run_dir: Path) -> Curve:
    """Return the curve of a run directory.

    Raises:
        ValueError: it has no record.
    """
    records = read_metrics(run_dir)
    if not records:
        raise ValueError(f"{run_dir} has no metrics.jsonl with a record; did the run start?")
    stages = read_saved(run_dir / "recipe.yaml")["stages"]
    masks = {stage["name"]: stage["mask_ratio"] for stage in stages}
    return Curve(run_dir.name, records, read_results(run_dir), masks)


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
    """Return the runs, chance and the baselines of the first run as a Markdown table, with 95 % intervals."""
    columns = headlines(curves)
    rows = [["", "pairs seen", "pairs/s", "training", *columns.values()], ["---", *["---:"] * (3 + len(columns))]]
    for curve in curves:
        last, found = curve.records[-1], {r.name: r for r in curve.results if r.who == THIS_MODEL}
        speed = [f"{last['samples_seen']:,}", f"{curve.images_per_s:,.0f}", f"{last['trained_seconds']:.0f} s"]
        rows.append([curve.label, *speed, *(_cell(found.get(name)) for name in columns)])
    others: dict[str, dict[str, Result]] = {}
    for result in curves[0].results:
        if result.who != THIS_MODEL:
            others.setdefault(result.who, {})[result.name] = result
        elif result.chance is not None:
            chance = replace(result, value=result.chance, low=None, high=None)
            others.setdefault("chance", {})[result.name] = chance
    rows += [[who, "", "", "", *(_cell(found.get(name)) for name in columns)] for who, found in others.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    return result.estimate_text
