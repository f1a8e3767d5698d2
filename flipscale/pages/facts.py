"""What a run's files say of it, in words: what was trained, on what, for how long, and what it cost."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flipscale.evaluation.reports.curves import Curve
from flipscale.evaluation.reports.record import data_name
from flipscale.evaluation.results import THIS_MODEL
from flipscale.io.errors import UserError
from flipscale.io.text_table import rounded
from flipscale.io.yaml_text import read_saved_recipe
from flipscale.pages.page import listed, shortened
from flipscale.training.cost import CostRecipe, Energy, occupied_device_hours, read_energy, training_device_hours
from flipscale.training.recipe import deciding_part
from flipscale.training.report import duration
from flipscale.training.run_summary import read_starts

_MOST_RECIPE = 20_000


@dataclass(frozen=True)
class Facts:
    """The files of a run.

    Args:
        recipe, environment, config: what `recipe.yaml`, `environment.json` and the model's `config.json` hold.
        starts: those whose steps were kept.
        energy: that was measured.
        occupied: of `occupied_device_hours`.
    """

    recipe: dict[str, Any]
    environment: dict[str, Any]
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    energy: Energy = field(default_factory=Energy)
    occupied: float | None = None

    @classmethod
    def of(cls, run_dir: Path) -> "Facts":
        """Return the facts of a run directory.

        Raises:
            ValueError: a file is damaged.
            OSError: one is missing.
        """
        recipe = read_saved_recipe(run_dir / "recipe.yaml")
        try:
            environment = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
            config = json.loads((run_dir / "model/config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"environment.json or the model of {run_dir} is damaged ({error})") from error
        files = (read_starts(run_dir), read_energy(run_dir), occupied_device_hours(run_dir))
        return cls(recipe, environment, config, *files)

    @property
    def _samples(self) -> str:
        """What a run learned from: a classifier has labels for words."""
        return "pictures" if self.config.get("architectures") == ["FlipForImageClassification"] else "pairs"

    def sentence(self, curve: Curve) -> str:
        """Return what the run is."""
        last, vision = curve.records[-1], self.config["vision_config"]
        parameters = self.environment.get("num_parameters") or 0
        count = f"{parameters:,}" if parameters < 1e6 else f"{parameters / 1e6:,.1f} million"
        size = f" of {count} parameters" if parameters else ""
        what = "pictures and words"
        if self._samples == "pictures":
            what = f"pictures{size} that knows {len(self.config['id2label']):,} classes"
            size = ""
        return (
            f"A model of {what}{size}. It learned from {last['samples_seen']:,} {self._samples}{self._data()} in "
            f"{duration(last['trained_seconds'])} of training, {self._masks()}; its pictures have "
            f"{vision['image_size']} x {vision['image_size']} pixels{self._other_sizes()}."
        )

    def tiles(self, curve: Curve) -> list[tuple[str, str]]:
        """Return the figures that stand large at the top, each with its name."""
        last = curve.records[-1]
        main = [r for r in curve.results if r.headline and r.who == THIS_MODEL][:2]
        return [
            *((result.value_text, result.shown) for result in main),
            (f"{last['samples_seen']:,}", f"{self._samples} seen"),
            (duration(last["trained_seconds"]), "of training"),
            *([(f"{curve.images_per_s:,.0f}", f"{self._samples} a second")] if last["trained_seconds"] else []),
        ]

    def rows(self, curve: Curve) -> list[tuple[str, str]]:
        """Return the machine, the time and the cost, as far as they are known."""
        return [(name, text) for name, text in self._all_rows(curve) if text]

    def recipe_text(self) -> str:
        """Return the recipe as far as it decides what is learned, without paths of this machine."""
        text = yaml.safe_dump(deciding_part(self.recipe, name_of=data_name), sort_keys=False, allow_unicode=True)
        return text if len(text) <= _MOST_RECIPE else f"{text[:_MOST_RECIPE]}\n# ... the rest is in recipe.yaml"

    def _all_rows(self, curve: Curve) -> Iterator[tuple[str, str]]:
        last, environment, cost = curve.records[-1], self.environment, CostRecipe(**self.recipe.get("cost", {}))
        hours = self.occupied
        if hours is None:
            hours = training_device_hours(self.starts, last["trained_seconds"])
        co2, dollars = cost.co2_kg(self.energy.kwh if self.energy.is_whole else None), cost.dollars(hours)
        steps = [record for record in curve.records if "images_per_s" in record]
        used = dict.fromkeys(f"{start['num_processes']} x {start['device']}" for start in self.starts)
        yield "machine", listed(list(used))
        yield "processes", listed(list(dict.fromkeys(_processes(start) for start in self.starts)))
        yield "precision", {"no": "fp32"}.get(*[str(environment.get("mixed_precision", ""))] * 2)
        yield "training", duration(last["trained_seconds"]) + ", evaluations and saves left out"
        yield "device hours", "" if hours is None else rounded(hours)
        kwh = self.energy.kwh
        yield "energy", "" if kwh is None else f"{rounded(kwh)} kWh, {self.energy.words}"
        yield "emissions", f"{rounded(co2)} kg of CO2 at {cost.kwh_co2_grams:g} g a kWh" if co2 else ""
        yield "cost", f"{rounded(dollars)} dollars at {cost.device_hour_dollars:g} an hour" if dollars else ""
        waited = steps[-1].get("data_wait_share") if steps else None
        yield "waiting for data", "" if waited is None else f"{100 * waited:.1f} % of the last interval"
        peak = max((r["peak_memory_bytes"] for r in steps if r.get("peak_memory_bytes")), default=0)
        yield "memory", f"{peak / 2**30:.1f} GiB at most, of the main process" if peak else ""
        bad, skipped = (sum(record.get(name, 0) for record in steps) for name in ("num_replaced", "num_skipped"))
        yield "bad samples", f"{bad:,} replaced" if bad else "none"
        yield "skipped steps", f"{skipped:,}, not finite" if skipped else "none"
        versions = [f"{name} {environment[name]}" for name in ("flipscale", "torch", "python") if environment.get(name)]
        yield "versions", ", ".join(versions)

    def _data(self) -> str:
        data = self.recipe["data"]
        sources = [source.get("dataset") or source.get("shards") or "" for source in data.get("sources") or []]
        names = [data_name(place) for place in (sources or [data.get("shards") or ""]) if place]
        count = self.environment.get("data_samples")
        of = f" of {shortened(listed(names), 80)}" if names else ""
        return of + (f" (which holds {count:,})" if count else "")

    def _other_sizes(self) -> str:
        sizes = {stage["name"]: stage["image_size"] for stage in self.recipe["stages"] if stage.get("image_size")}
        parts = [f"{size} x {size} in the stage {name}" for name, size in sizes.items()]
        return f", {listed(parts)}" if parts else ""

    def _masks(self) -> str:
        ratios = [stage.get("mask_ratio") or 0.0 for stage in self.recipe["stages"]]
        most = max(ratios)
        name = f" ({'FLIP' if most else 'CLIP'})" if self._samples == "pairs" else ""
        if not most:
            return f"with every picture whole{name}"
        if ratios[-1] == 0 < ratios[0]:
            return f"first with {_percent(ratios[0])} of each picture left out, at the end with whole pictures{name}"
        return f"with {_percent(most)} of each picture left out{name}"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:g} %"


def _processes(start: dict[str, Any]) -> str:
    count = start["num_processes"]
    return f"{count} process{'es' * (count != 1)}" + (f" under {start['engine']}" if start.get("engine") else "")
