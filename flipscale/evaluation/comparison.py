"""Runs laid side by side: what they saw, how fast, and what they can do."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Curve:
    """One run as its `metrics.jsonl` tells it.

    Args:
        records: all records, in the order of steps.
        mask_ratio: of the first stage.
        tuned: whether unmasked tuning follows.
    """

    name: str
    records: list[dict[str, Any]]
    mask_ratio: float
    tuned: bool

    @property
    def label(self) -> str:
        """How people call it: CLIP without a mask, FLIP with its ratio."""
        if self.mask_ratio == 0:
            return "CLIP (mask 0)"
        return f"FLIP ({self.mask_ratio:.0%} masked{', then tuned' if self.tuned else ''})"

    def points(self, metric: str) -> tuple[list[float], list[float]]:
        """Training seconds and values of every record that has `metric`."""
        found = [(r["trained_seconds"], r[metric]) for r in self.records if metric in r]
        return [seconds for seconds, _ in found], [value for _, value in found]

    def last(self, metric: str) -> float:
        """The last value of `metric`, nan where it was never measured."""
        values = self.points(metric)[1]
        return values[-1] if values else float("nan")

    @property
    def images_per_s(self) -> float:
        """Pairs seen a second of training, over the whole run."""
        return self.records[-1]["samples_seen"] / self.records[-1]["trained_seconds"]


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run so far; a line that is still being written is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def read_curve(run_dir: Path) -> Curve:
    """The curve of a run directory.

    Raises:
        ValueError: no record there.
    """
    records = read_records(run_dir)
    if not records:
        raise ValueError(f"{run_dir} has no metrics.jsonl with a record; did the run start?")
    ratios = [stage["mask_ratio"] for stage in yaml.safe_load((run_dir / "recipe.yaml").read_text())["stages"]]
    return Curve(run_dir.name, records, ratios[0], tuned=len(ratios) > 1 and ratios[-1] == 0 < ratios[0])


def curve_of(run_dir: Path, step: int | None) -> Curve:
    """The curve of a run directory up to and with a step, or to its end."""
    curve = read_curve(run_dir)
    return curve if step is None else replace(curve, records=[r for r in curve.records if r["step"] <= step])


def record_baselines(run_dir: Path, baselines: dict[str, float]) -> None:
    """Appends the trivial baselines (top-1, percent; chance aside) to a run's records as `baseline/NAME`, once."""
    last = read_records(run_dir)[-1]
    named = {f"baseline/{name}": value for name, value in baselines.items() if name != "chance"}
    if named and not named.keys() <= last.keys():
        position = {name: last[name] for name in ("step", "samples_seen", "trained_seconds")}
        with open(run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps({**position, **named}) + "\n")


def comparison_table(curves: list[Curve], baselines: dict[str, float]) -> str:
    """The runs and the trivial baselines (top-1, percent) as a Markdown table."""
    lines = [
        "| | pairs seen | pairs/s | training | top-1 | top-5 | text to image R@1 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for curve in curves:
        seen, seconds = curve.records[-1]["samples_seen"], curve.records[-1]["trained_seconds"]
        figures = (curve.last(f"{m}") for m in ("zero_shot/top1", "zero_shot/top5", "retrieval/text_to_image_r1"))
        lines.append(
            f"| {curve.label} | {seen:,} | {curve.images_per_s:,.0f} | {seconds:.0f} s | "
            + " | ".join(f"{value:.1f} %" for value in figures)
            + " |"
        )
    lines += [f"| {name} | | | | {value:.{1 if value >= 1 else 2}f} % | | |" for name, value in baselines.items()]
    return "\n".join(lines)
