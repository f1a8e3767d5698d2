"""Where masking pays: over data and training time, how much sooner a masked run is where the unmasked one ends, and
what predicts that."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flipscale.evaluation.intervals import mean_of
from flipscale.evaluation.reports.comparison import Curve
from flipscale.evaluation.reports.figures import drawing_pyplot, save_figure
from flipscale.evaluation.reports.seeds import seconds_to
from flipscale.evaluation.results import NOTHING
from flipscale.io.text_table import markdown_table
from flipscale.studies.scaling.transfer import Effect

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Cells that a rank correlation takes.
_LEAST_CELLS = 5
# Clocks that differ by more are no equal ones.
_MOST_UNEQUAL = 0.01
# The colours' ends: four times as fast, and four times as slow.
_DEEPEST = 2.0


@dataclass(frozen=True, order=True)
class Place:
    """A place on the map.

    Args:
        fraction: the part of the data.
        minutes: of training.
        mask: the part of the patches that is removed, before any tuning.
    """

    fraction: float
    minutes: float
    mask: float

    @property
    def data(self) -> str:
        """The part of the data in words: `1/32`, `all`."""
        return "all" if self.fraction == 1.0 else str(Fraction(self.fraction).limit_denominator(4096))


@dataclass(frozen=True)
class MapRun:
    """A finished run on the map.

    Args:
        place: where it is.
        pairs: how many different pairs its data has.
        tower_flops: operations of the image tower for a pair of its first stage.
        curve: what it measured.
    """

    place: Place
    pairs: float
    tower_flops: float
    curve: Curve


@dataclass(frozen=True)
class Cell:
    """What a mask brings at an amount of data and a training time, against mask 0 there; means over `seeds` seeds.

    Args:
        place: where it is.
        seeds: how many seeds both have.
        ratio: how many times as fast it is, with its interval; None where that cannot be said.
        gain: its last result less that of mask 0, in points.
        end, whole_end: its last result, and that of mask 0.
        epochs, whole_epochs: how often it saw each pair, and how often mask 0 did.
        speed: its pairs a second while it masks, in those of mask 0.
        left: the part of the image tower's operations that the mask leaves.
        tuned: whether unmasked tuning follows.
        off: by which part its training time differs from that of mask 0, at most.
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
        """The share of a step at mask 0 that is the image tower's, by how much sooner a step is done that leaves out
        `1 - left` of its operations."""
        return (1 - 1 / self.speed) / (1 - self.left)


def cells_of(runs: Sequence[MapRun], name: str) -> list[Cell]:
    """Return what each mask brings at each place where a run of it and one of mask 0 with the same seed are finished.

    How many times as fast it is: the time at which mask 0 ends over the time at which the masked run is as good, on the
    lines between evaluations. Where it never is, the time at which mask 0 is as good as the masked run's end over the
    time at which that ends, which is below 1.

    Args:
        name: of the result, `task/metric`.
    """
    by_place: dict[Place, dict[int, MapRun]] = {}
    for run in runs:
        if run.curve.course(name):
            by_place.setdefault(run.place, {})[run.curve.seed] = run
    cells = []
    for place, masked in sorted(by_place.items()):
        whole = by_place.get(Place(place.fraction, place.minutes, 0.0), {})
        both = [(masked[seed], whole[seed]) for seed in sorted(masked.keys() & whole.keys())]
        if place.mask > 0.0 and both:
            cells.append(_cell(place, both, name))
    return cells


def _cell(place: Place, both: Sequence[tuple[MapRun, MapRun]], name: str) -> Cell:
    ratios = [ratio for one, other in both if (ratio := _ratio(one.curve, other.curve, name)) is not None]
    ends = [[run.curve.course(name)[-1].result for run in pair] for pair in both]
    sign = 1.0 if ends[0][0].higher_is_better else -1.0
    return Cell(
        place,
        len(both),
        _power_of(_effect([math.log(ratio) for ratio in ratios])) if len(ratios) == len(both) else None,
        _effect([sign * (one.value - other.value) for one, other in ends]),
        float(np.mean([one.value for one, _ in ends])),
        float(np.mean([other.value for _, other in ends])),
        float(np.mean([one.curve.records[-1]["samples_seen"] / one.pairs for one, _ in both])),
        float(np.mean([other.curve.records[-1]["samples_seen"] / other.pairs for _, other in both])),
        float(np.mean([_pace(one.curve) / _pace(other.curve) for one, other in both])),
        both[0][0].tower_flops / both[0][1].tower_flops,
        both[0][0].curve.tuned,
        max(abs(_seconds(one) / _seconds(other) - 1) for one, other in both),
    )


def _seconds(run: MapRun) -> float:
    return run.curve.records[-1]["trained_seconds"]


def _ratio(masked: Curve, whole: Curve, name: str) -> float | None:
    """Return how many times as fast a masked run is as the unmasked one; None where that one is no better than chance
    at its end."""
    end, own = whole.course(name)[-1], masked.course(name)[-1]
    if end.result.chance is not None and end.result.low is not None and end.result.low <= end.result.chance:
        return None
    seconds = seconds_to(masked, name, end.result.value)
    if seconds is not None:
        return end.trained_seconds / seconds if seconds else None
    seconds = seconds_to(whole, name, own.result.value)
    return seconds / own.trained_seconds if seconds else None


def _pace(curve: Curve) -> float:
    """Return the pairs a second of a run's first stage."""
    first = next(iter(curve.masks))
    own = [record for record in curve.records if record.get("stage") == first] or curve.records
    return own[-1]["samples_seen"] / own[-1]["trained_seconds"]


def _effect(values: Sequence[float]) -> Effect:
    return Effect(values[0]) if len(values) == 1 else Effect(*mean_of(values))


def _power_of(logs: Effect) -> Effect:
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Effect(math.exp(logs.mean), low, high)


def map_words(cells: Sequence[Cell], planned: Iterable[Place], words: str) -> str:
    """Return the map as a section of a report: a row for each place, and what the ratio goes with.

    Args:
        planned: all places of the study; those without a cell have dashes.
        words: what the result is called.
    """
    found = {cell.place: cell for cell in cells}
    places = sorted({place for place in planned if place.mask > 0.0}, key=lambda p: (p.mask, -p.fraction, p.minutes))
    head = ["data", "minutes", "mask", "seeds", "times as fast", "points", "from", "to", "epochs", "at mask 0"]
    rows = [head]
    for place in places:
        at = [place.data, f"{place.minutes:g}", f"{place.mask:.0%}"]
        rows.append([*at, *(_facts(found[place]) if place in found else len(head[3:]) * [NOTHING])])
    said = (
        f"By {words}. Times as fast: when mask 0 ends, over when the masked run is as good; where it never is, when "
        "mask 0 is as good as the masked run's end, over when that ends. Points: at equal time, from the end of mask 0 "
        "to that of the masked run. Epochs: how often the masked run saw each pair, and mask 0."
    )
    return "\n\n".join(
        ["## Where masking pays", said, markdown_table(rows, 1), *_paces(cells), *_predictors(cells), *_unequal(cells)]
    )


def _facts(cell: Cell) -> list[str]:
    return [
        str(cell.seeds),
        ratio_text(cell),
        cell.gain.text,
        f"{cell.whole_end:.3g}",
        f"{cell.end:.3g}",
        f"{cell.epochs:.2f}",
        f"{cell.whole_epochs:.2f}",
    ]


def ratio_text(cell: Cell) -> str:
    """Return how many times as fast a cell's mask is: `1.42x (1.21 to 1.66)`."""
    if cell.ratio is None:
        return NOTHING
    between = "" if cell.ratio.low is None else f" ({cell.ratio.low:.2f} to {cell.ratio.high:.2f})"
    return f"{cell.ratio.mean:.2f}x{between}"


def _of_masks(cells: Sequence[Cell]) -> dict[float, list[Cell]]:
    return {mask: [c for c in cells if c.place.mask == mask] for mask in sorted({c.place.mask for c in cells})}


def _paces(cells: Sequence[Cell]) -> list[str]:
    """Return a sentence for each mask on how fast its steps are, and what share of a step the image tower has."""
    return [
        f"At a mask of {mask:.0%} pairs come {_median(own, 'speed'):.1f} times as fast, with "
        f"{_median(own, 'left'):.0%} of the image tower's operations: the tower is "
        f"{_median(own, 'tower'):.0%} of a step at mask 0."
        for mask, own in _of_masks(cells).items()
    ]


def _median(cells: Sequence[Cell], name: str) -> float:
    return float(np.median([getattr(cell, name) for cell in cells]))


def _predictors(cells: Sequence[Cell]) -> list[str]:
    """Return a sentence for each mask on what the ratio goes with, over the cells that have one."""
    told = []
    for mask, own in _of_masks([cell for cell in cells if cell.ratio is not None]).items():
        if len(own) >= _LEAST_CELLS:
            ratios = [cell.ratio.mean for cell in own if cell.ratio is not None]
            predictors = {
                "the minutes": [cell.place.minutes for cell in own],
                "the epochs that the masked run saw": [cell.epochs for cell in own],
                "the end of mask 0": [cell.whole_end for cell in own],
            }
            said = ", ".join(
                f"{_rank_correlation(ratios, values):+.2f} with {name}"
                for name, values in predictors.items()
                if len(set(values)) > 1
            )
            told.append(f"At {mask:.0%}, over {len(own)} cells, the rank correlation of times as fast is {said}.")
    return told


def _unequal(cells: Sequence[Cell]) -> list[str]:
    """Return a line that names the places where the clocks differ."""
    off = [f"{c.place.data}, {c.place.minutes:g} minutes, {c.place.mask:.0%}" for c in cells if c.off > _MOST_UNEQUAL]
    return [f"Not at equal time, the clocks differ by more than 1 %: {'; '.join(off)}."] if off else []


def _rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation."""
    from scipy.stats import spearmanr  # takes a second, and few reports have a map

    return float(spearmanr(one, other).statistic)


def draw_map(cells: Sequence[Cell], planned: Iterable[Place], words: str, path: Path) -> None:
    """Draw the map: a panel for each mask, data x training time, a number and a colour in each cell.

    Args:
        planned: as in `map_words`.
        words: what the result is called.
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
        number = NOTHING if cell is None else ratio_text(cell).replace(" (", "\n(")
        head, _, interval = number.partition("\n")
        axis.text(column, row - 0.12, head, ha="center", va="center", fontsize=12, weight="bold", color=colour)
        if cell is not None:
            below = f"{interval}\n" if interval else ""
            below += f"{cell.whole_end:.2g} → {cell.end:.2g}; {cell.epochs:,.{0 if cell.epochs >= 10 else 1}f} epochs"
            axis.text(column, row + 0.06, below, ha="center", va="top", fontsize=7.5, color=colour)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
