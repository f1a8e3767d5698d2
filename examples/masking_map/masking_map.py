"""Draw where masking pays: over data and training time, how much sooner a masked run reaches the unmasked run's end.

    python examples/masking_map/masking_map.py runs/masking_map

The study's runs must end by their clock, and its axes may change only `data.fraction`, `budget_minutes` and the stages'
masks. The script writes `masking_map.md` and `masking_map.png` into the study's folder, for all finished runs.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import spearmanr

from flipscale.evaluation.presentation.curves import Curve, headlines, seconds_to
from flipscale.evaluation.presentation.figures import drawing_pyplot, save_figure
from flipscale.evaluation.results import NOTHING
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.io.text_table import markdown_table
from flipscale.planning.flops import stage_flops
from flipscale.process.console import report_user_errors
from flipscale.recipe.recipe import Recipe
from flipscale.studies.study_results import read_study_results
from flipscale.studies.transfer import Effect

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Fewest cells for a rank correlation.
_LEAST_CELLS = 5
# Training times that differ by more are reported as unequal.
_MOST_UNEQUAL = 0.01
# Ends of the colours, in powers of two.
_DEEPEST = 2.0


@dataclass(frozen=True, order=True)
class Place:
    """A place on the map.

    Args:
        fraction: part of the data.
        minutes: training time.
        mask: part of the patches that is removed, before any tuning.
    """

    fraction: float
    minutes: float
    mask: float

    @property
    def data(self) -> str:
        """The part of the data as text: `1/32`, `all`."""
        return "all" if self.fraction == 1.0 else str(Fraction(self.fraction).limit_denominator(4096))


@dataclass(frozen=True)
class MapRun:
    """A finished run on the map.

    Args:
        place: its place.
        pairs: number of different pairs in its data.
        tower_flops: operations of the image tower per pair in the first stage.
        curve: its curve.
    """

    place: Place
    pairs: float
    tower_flops: float
    curve: Curve


@dataclass(frozen=True)
class Cell:
    """The gain of a mask against mask 0 at an amount of data and a training time, as means over `seeds` seeds.

    Args:
        place: place on the map.
        seeds: number of seeds that both have.
        ratio: ratio of times to equal results, with its interval; None if it is undefined.
        gain: final result less that of mask 0, in points.
        end, whole_end: final result, and that of mask 0.
        epochs, whole_epochs: number of epochs, and that of mask 0.
        speed: pairs per second while masked, relative to mask 0.
        left: share of the image tower's operations that remain under the mask.
        tuned: whether unmasked tuning follows.
        off: largest relative difference of the training times.
    """

    place: Place
    seeds: int
    ratio: Effect | None
    gain: Effect
    end: float
    whole_end: float
    epochs: float
    whole_epochs: float
    speed: float
    left: float
    tuned: bool
    off: float

    @property
    def tower(self) -> float:
        """Share of the image tower in a step at mask 0, from the speed of a step with `left` of its operations."""
        return (1 - 1 / self.speed) / (1 - self.left)

    @property
    def ratio_text(self) -> str:
        """The ratio as text: `1.42x (1.21 to 1.66)`."""
        if self.ratio is None:
            return NOTHING
        between = "" if self.ratio.low is None else f" ({self.ratio.low:.2f} to {self.ratio.high:.2f})"
        return f"{self.ratio.mean:.2f}x{between}"


def place_of(recipe: Recipe) -> Place:
    """Return the place of a run on the map."""
    return Place(recipe.data.fraction, recipe.budget_minutes or 0.0, recipe.stages[0].mask_ratio)


def draw_study(output_dir: Path) -> None:
    """Write the map of a planned study's finished runs into its folder, and print the table.

    Raises:
        UserError: the study is not a map, or no run of its base is finished and evaluated.
    """
    study, planned, results = read_study_results(output_dir)
    changed = {str(path) for levels in study.axes.values() for level in levels.values() for path in level}
    places = {place_of(run.recipe) for run in planned}
    if (
        not all(path in ("data.fraction", "budget_minutes") or path.startswith("stages") for path in changed)
        or not all(place.minutes for place in places)
        or len(places) != len(study.combinations())
        or len({place.mask > 0.0 for place in places}) < 2
    ):
        raise UserError(
            f"{output_dir} is no map: its axes must change data.fraction, budget_minutes and the stages' masks only, "
            "with mask 0 among them"
        )
    names = headlines([one.curve for one in results])
    if not names:
        raise UserError(f"no run of {output_dir} has a result; set eval.tasks in the base recipe")
    name, words = next(iter(names.items()))
    runs = []
    for one in results:
        flops = stage_flops(one.recipe)[one.recipe.stages[0].name].modules["vision_model"]
        runs.append(MapRun(place_of(one.recipe), one.spent["pairs"], float(flops), one.curve))
    cells = cells_of(runs, name)
    text = map_text(cells, places, words)
    write_text(output_dir / "masking_map.md", text + "\n")
    draw_map(cells, places, words, output_dir / "masking_map.png")
    print(f"{text}\n\n{output_dir}: masking_map.md, masking_map.png")


def cells_of(runs: Sequence[MapRun], name: str) -> list[Cell]:
    """Return a cell for each mask and place with a finished run of the mask and of mask 0 with the same seed.

    The ratio is the end of mask 0 over the time at which the masked run is as good, interpolated between evaluations.
    If the masked run never is as good, the ratio is the time at which mask 0 is as good as the masked run's end, over
    that end. Then it is below 1.

    Args:
        name: name of the result, `task/metric`.
    """
    by_place: dict[Place, dict[int, MapRun]] = {}
    for run in runs:
        if run.curve.course(name):
            by_place.setdefault(run.place, {})[run.curve.seed] = run
    cells = []
    for place, masked in sorted(by_place.items()):
        whole = by_place.get(Place(place.fraction, place.minutes, 0.0), {})
        pairs = [(masked[seed], whole[seed]) for seed in sorted(masked.keys() & whole.keys())]
        if place.mask > 0.0 and pairs:
            cells.append(_cell(place, pairs, name))
    return cells


def _cell(place: Place, pairs: Sequence[tuple[MapRun, MapRun]], name: str) -> Cell:
    ratios = [ratio for one, other in pairs if (ratio := _ratio(one.curve, other.curve, name)) is not None]
    ends = [[run.curve.course(name)[-1].result for run in pair] for pair in pairs]
    sign = 1.0 if ends[0][0].higher_is_better else -1.0

    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    return Cell(
        place,
        len(pairs),
        _exponential(Effect.of([math.log(ratio) for ratio in ratios])) if len(ratios) == len(pairs) else None,
        Effect.of([sign * (one.value - other.value) for one, other in ends]),
        mean(one.value for one, _ in ends),
        mean(other.value for _, other in ends),
        mean(one.curve.records[-1]["samples_seen"] / one.pairs for one, _ in pairs),
        mean(other.curve.records[-1]["samples_seen"] / other.pairs for _, other in pairs),
        mean(_pace(one.curve) / _pace(other.curve) for one, other in pairs),
        pairs[0][0].tower_flops / pairs[0][1].tower_flops,
        pairs[0][0].curve.tuned,
        max(abs(_seconds(one) / _seconds(other) - 1) for one, other in pairs),
    )


def _seconds(run: MapRun) -> float:
    return run.curve.records[-1]["trained_seconds"]


def _ratio(masked: Curve, whole: Curve, name: str) -> float | None:
    """Return the ratio of times to equal results; None if the unmasked run ends no better than chance."""
    end, own = whole.course(name)[-1], masked.course(name)[-1]
    if end.result.chance is not None and end.result.low is not None and end.result.low <= end.result.chance:
        return None
    seconds = seconds_to(masked, name, end.result.value)
    if seconds is not None:
        return end.trained_seconds / seconds if seconds else None
    seconds = seconds_to(whole, name, own.result.value)
    return seconds / own.trained_seconds if seconds else None


def _pace(curve: Curve) -> float:
    """Return the pairs per second of the first stage."""
    first = next(iter(curve.masks))
    own = [record for record in curve.records if record.get("stage") == first] or curve.records
    return own[-1]["samples_seen"] / own[-1]["trained_seconds"]


def _exponential(logs: Effect) -> Effect:
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Effect(math.exp(logs.mean), low, high)


def map_text(cells: Sequence[Cell], planned: Iterable[Place], words: str) -> str:
    """Return the map as Markdown: a row for each place, and the rank correlations of the ratio.

    Args:
        planned: all places of the study; places without a cell have dashes.
        words: label of the result.
    """
    by_place = {cell.place: cell for cell in cells}
    places = sorted({place for place in planned if place.mask > 0.0}, key=lambda p: (p.mask, -p.fraction, p.minutes))
    rows = [["data", "minutes", "mask", "seeds", "times as fast", "points", "from", "to", "epochs", "at mask 0"]]
    for place in places:
        facts = [NOTHING] * 7
        if cell := by_place.get(place):
            facts = [str(cell.seeds), cell.ratio_text, str(cell.gain), f"{cell.whole_end:.3g}", f"{cell.end:.3g}"]
            facts += [f"{cell.epochs:.2f}", f"{cell.whole_epochs:.2f}"]
        rows.append([place.data, f"{place.minutes:g}", f"{place.mask:.0%}", *facts])
    head = (
        f"By {words}. Times as fast: the end of mask 0, over the time at which the masked run is as good. If it never "
        "is, the time at which mask 0 is as good as the masked run's end, over that end. Points: at equal time, from "
        "the end of mask 0 to that of the masked run. Epochs: those of the masked run, and of mask 0."
    )
    table = markdown_table(rows, 1)
    return "\n\n".join(["# Where masking pays", head, table, *_paces(cells), *_correlations(cells), *_unequal(cells)])


def _by_mask(cells: Sequence[Cell]) -> dict[float, list[Cell]]:
    return {mask: [c for c in cells if c.place.mask == mask] for mask in sorted({c.place.mask for c in cells})}


def _paces(cells: Sequence[Cell]) -> list[str]:
    """Return a sentence for each mask on the speed of its steps and the image tower's share of a step."""
    return [
        f"At a mask of {mask:.0%} pairs come {_median(own, 'speed'):.1f} times as fast, with "
        f"{_median(own, 'left'):.0%} of the image tower's operations: the tower is "
        f"{_median(own, 'tower'):.0%} of a step at mask 0."
        for mask, own in _by_mask(cells).items()
    ]


def _median(cells: Sequence[Cell], name: str) -> float:
    return float(np.median([getattr(cell, name) for cell in cells]))


def _correlations(cells: Sequence[Cell]) -> list[str]:
    """Return a sentence for each mask with the Spearman rank correlations of the ratio, over cells with a ratio."""
    sentences = []
    for mask, own in _by_mask([cell for cell in cells if cell.ratio is not None]).items():
        if len(own) < _LEAST_CELLS:
            continue
        ratios = [cell.ratio.mean for cell in own if cell.ratio is not None]
        predictors = {
            "the minutes": [cell.place.minutes for cell in own],
            "the epochs of the masked run": [cell.epochs for cell in own],
            "the end of mask 0": [cell.whole_end for cell in own],
        }
        words = ", ".join(
            f"{spearmanr(ratios, values).statistic:+.2f} with {name}"
            for name, values in predictors.items()
            if len(set(values)) > 1
        )
        sentences.append(f"At {mask:.0%}, over {len(own)} cells, the rank correlation of times as fast is {words}.")
    return sentences


def _unequal(cells: Sequence[Cell]) -> list[str]:
    off = [f"{c.place.data}, {c.place.minutes:g} minutes, {c.place.mask:.0%}" for c in cells if c.off > _MOST_UNEQUAL]
    return [f"Not at equal time, the clocks differ by more than 1 %: {'; '.join(off)}."] if off else []


def draw_map(cells: Sequence[Cell], planned: Iterable[Place], words: str, path: Path) -> None:
    """Draw the map: a panel for each mask, data x training time, a number and a colour in each cell.

    Args:
        planned: all places of the study.
        words: label of the result.
    """
    places = list(planned)
    fractions = sorted({place.fraction for place in places}, reverse=True)
    minutes = sorted({place.minutes for place in places})
    masks = sorted({place.mask for place in places if place.mask > 0.0})
    size = (max(1.3 + 1.75 * len(minutes) * len(masks), 7.0), 1.9 + 0.95 * len(fractions))
    figure, axes = drawing_pyplot().subplots(
        1, len(masks), figsize=size, sharey=True, squeeze=False, constrained_layout=True
    )
    for axis, mask in zip(axes[0], masks, strict=True):
        own = {cell.place: cell for cell in cells if cell.place.mask == mask}
        _draw_panel(axis, [[own.get(Place(part, time, mask)) for time in minutes] for part in fractions])
        tuned = ", then tuned" if any(cell.tuned for cell in own.values()) else ""
        title = f"{mask:.0%} masked{tuned}"
        if own:
            title += f"\n{_median(list(own.values()), 'speed'):.1f}x the pairs a second"
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xticks(range(len(minutes)), [f"{time:g}" for time in minutes])
        axis.set_xlabel("training time, minutes")
    axes[0, 0].set_yticks(range(len(fractions)), [Place(part, 0, 0).data for part in fractions])
    axes[0, 0].set_ylabel("part of the data")
    figure.suptitle(
        f"Where masking pays: how many times as fast the masked run reaches the {words} at which mask 0 ends.\n"
        "Blue, above 1: masking wins. Below: from the end of mask 0 to that of the masked run, and its epochs.",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    save_figure(figure, path)


def _draw_panel(axis: "Axes", table: Sequence[Sequence[Cell | None]]) -> None:
    values = np.array(
        [[math.log2(cell.ratio.mean) if cell and cell.ratio else np.nan for cell in row] for row in table]
    )
    axis.set_facecolor("#eeeeee")
    axis.imshow(values, cmap="RdBu", vmin=-_DEEPEST, vmax=_DEEPEST, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        cell = table[row][column]
        colour = "white" if abs(value) > 0.6 * _DEEPEST else "black"
        number = NOTHING if cell is None else cell.ratio_text.replace(" (", "\n(")
        head, _, interval = number.partition("\n")
        axis.text(column, row - 0.12, head, ha="center", va="center", fontsize=12, weight="bold", color=colour)
        if cell is not None:
            below = f"{interval}\n" if interval else ""
            below += f"{cell.whole_end:.2g} → {cell.end:.2g}; {cell.epochs:,.{0 if cell.epochs >= 10 else 1}f} epochs"
            axis.text(column, row + 0.06, below, ha="center", va="top", fontsize=7.5, color=colour)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def main() -> None:
    """Draw the map of the study that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="The study's folder.")
    with report_user_errors():
        draw_study(parser.parse_args().folder)


if __name__ == "__main__":
    main()
