"""Figures of runs: loss and results against training time, and what the image encoder sees."""

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flipscale.data.masks.image import IMAGE_MASKS
from flipscale.data.masks.keyed import keyed_patches
from flipscale.data.masks.recipe import MaskRecipe
from flipscale.data.pairs import PairDataset
from flipscale.evaluation.reports.comparison import Curve, by_recipe, headlines
from flipscale.evaluation.reports.seeds import over_seeds
from flipscale.evaluation.results import THIS_MODEL, Result, with_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f6feb", "#d1495b", "#2e8b57", "#8a5fbf")
_GREY = 190
# A line of so many points of a stage is drawn smoothed.
_SMOOTHED_POINTS = 40
# What a line of small words takes of the height of a figure.
_LINE_OF_WORDS = 0.04


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def drawing_pyplot() -> Any:
    """Return matplotlib's pyplot, set to draw to files only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _axes(title: str, y_label: str, curves: list[Curve]) -> "tuple[Figure, Axes, float]":
    """Return a figure over training time, and the seconds of its unit: hours where a run took more than two."""
    pyplot = drawing_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.2), constrained_layout=True)
    axes.set_title(title, loc="left")
    hours = max(curve.records[-1]["trained_seconds"] for curve in curves) > 7200
    axes.set_xlabel(f"training time, {'hours' if hours else 'seconds'}")
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, 1.02 * max(curve.records[-1]["trained_seconds"] for curve in curves) / (3600 if hours else 1))
    return figure, axes, 3600.0 if hours else 1.0


def draw_loss(curves: list[Curve], path: Path) -> None:
    """Draw the loss against training time, one line a run, smoothed where there are many points, and marks
    where stages begin."""
    figure, axes, unit = _axes("Loss of the training batches", "loss", curves)
    coloured = [(curve, colour) for group, colour in zip(by_recipe(curves), COLOURS, strict=False) for curve in group]
    for curve, colour in coloured:
        for number, (seconds, losses) in enumerate(curve.by_stage("loss").values()):
            times = [s / unit for s in seconds]
            is_first = curve is next(other for other, own in coloured if own == colour)
            label = curve.label if number == 0 and is_first else None
            is_many = len(losses) >= _SMOOTHED_POINTS
            if is_many:
                axes.plot(times, losses, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(times, _smoothed(losses) if is_many else losses, color=colour, label=label)
    _mark_stages(axes, [group[0] for group in by_recipe(curves)], unit)
    if len({ratio for curve in curves for ratio in curve.masks.values()}) > 1:
        _explain(axes, "Masked images are harder than whole ones: losses under different masks do not compare.")
    if len(curves) > 1:
        axes.legend(frameon=False)
    save_figure(figure, path)


def draw_metric(curve: Curve, metric: str, title: str, y_label: str, path: Path, factor: float = 1.0) -> None:
    """Draw a number of a run's intervals, times a factor, against training time."""
    figure, axes, unit = _axes(title, y_label, [curve])
    seconds, values = curve.points(metric)
    axes.plot([s / unit for s in seconds], [factor * value for value in values], color=COLOURS[0])
    _mark_stages(axes, [curve], unit)
    axes.set_ylim(0, 1.15 * factor * max(values) or 1.0)
    save_figure(figure, path)


def _smoothed(values: Sequence[float]) -> np.ndarray:
    """Return the mean of each value and those about it, a twentieth of all."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _mark_stages(axes: "Axes", curves: list[Curve], unit: float) -> None:
    """Mark where the later stages of each run begin, with name and mask of each stage where there is one run."""
    for curve, colour in zip(curves, COLOURS, strict=False):
        ends = [seconds[-1] / unit for seconds, _ in curve.by_stage("lr").values()]
        for end in ends[:-1]:
            axes.axvline(end, color=colour if len(curves) > 1 else "#888888", linewidth=0.9, linestyle="--", zorder=0)
        if len(curves) > 1 or len(ends) < 2:
            continue
        for name, begin, end in zip(curve.by_stage("lr"), [0.0, *ends], ends, strict=False):
            ratio = curve.masks.get(name, 0.0)
            words = f"{name}, {ratio:.0%} masked" if ratio else f"{name}, whole images"
            # Beside its mark where there is room to write, else along it.
            is_narrow = end - begin < 0.02 * len(words) * ends[-1]
            axes.annotate(
                words, (begin, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -3), textcoords="offset points",
                va="top", fontsize=8, color="#555555", rotation=90 if is_narrow else 0,
            )  # fmt: skip


def _explain(axes: "Axes", words: str) -> None:
    """Write a line of explanation between the title and the axes."""
    axes.set_title(axes.get_title(loc="left"), loc="left", pad=18)
    axes.annotate(
        words, (0.0, 1.0), xycoords="axes fraction", xytext=(0, 5), textcoords="offset points", fontsize=8,
        color="#555555", va="bottom",
    )  # fmt: skip


def result_figures(curves: list[Curve]) -> dict[str, Result]:
    """Return the results that can be drawn, by the names of their figures: the first headline of each task that was
    measured more than once."""
    found: dict[str, Result] = {}
    for name in headlines(curves):
        course = max((curve.course(name) for curve in curves), key=len)
        if len(course) > 1:
            found.setdefault(course[-1].result.task, course[-1].result)
    return found


def draw_result(curves: list[Curve], shown: Result, path: Path) -> None:
    """Draw a result against training time, one line a run with the 95 % intervals as a band, and one for runs that
    differ in their seeds alone, with that of their mean; the baselines of the first run are levels. What chance
    achieves is said in words: its level would squeeze the lines."""
    title = f"{shown.task.replace('_', '-')}: {shown.shown}"
    figure, axes, unit = _axes(title, ", ".join(filter(None, (shown.shown, shown.unit))), curves)
    drawn: list[float] = []
    groups = [found for group in by_recipe(curves) if (found := [c for c in group if c.course(shown.name)])]
    has_band = has_seeds = False
    for group, colour in zip(groups, COLOURS, strict=False):
        if len(group) > 1:
            times, means = over_seeds(group, shown.name)
            values, lows, highs = (list(column) for column in zip(*means, strict=True))
            label = f"{group[0].label}, {len(group)} seeds"
            axes.plot(times / unit, values, "o-", color=colour, label=label)
            axes.fill_between(times / unit, lows, highs, color=colour, alpha=0.15, linewidth=0)
            drawn += values
            has_seeds = True
            continue
        course = group[0].course(shown.name)
        at, values = [m.trained_seconds / unit for m in course], [m.result.value for m in course]
        axes.plot(at, values, "o-", color=colour, label=group[0].label)
        drawn += values
        if all(measured.result.low is not None for measured in course):
            low, high = ([getattr(measured.result, end) for measured in course] for end in ("low", "high"))
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
            has_band = True
    levels = {r.who: r.value for r in curves[0].results if r.name == shown.name and r.who != THIS_MODEL}
    drawn += levels.values()
    for name, value in levels.items():
        axes.axhline(value, color="#888888", linewidth=0.9, linestyle=":", zorder=0)
        # Under its line where the next one is so near above that its words would lie on this one's.
        is_under = any(0 < other - value < _LINE_OF_WORDS * max(drawn) for other in levels.values())
        place, side = (0.01, value), "top" if is_under else "bottom"
        axes.annotate(name, place, xycoords=("axes fraction", "data"), va=side, fontsize=8)
    if min(drawn) < max(drawn) / 2 and min(drawn) >= 0:
        axes.set_ylim(bottom=0)
    said = ["Band: the 95 % interval over the queries."] if has_band else []
    said += ["Band: the 95 % interval of the mean over seeds."] if has_seeds else []
    if shown.chance is not None:
        said.append(f"Guessing: {with_unit(shown.chance, shown.unit)}.")
    _explain(axes, " ".join(said))
    if len(groups) > 1 or has_seeds:
        axes.legend(loc="best", framealpha=0.9, edgecolor="none")
    save_figure(figure, path)


def save_figure(figure: "Figure", path: Path, file_format: str | None = None) -> None:
    """Write the picture, the same bytes for the same figure, and close it. Its format is what the name ends in, or
    `file_format`."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=150, metadata={"Software": None}, format=file_format)
    pyplot.close(figure)


def _paste(patches: np.ndarray, index: np.ndarray, patch_size: int, side: int) -> np.ndarray:
    """Return the patches at their places on a grey image: uint8 `(side * p, side * p, 3)`."""
    image = np.full((side, side, 3, patch_size, patch_size), _GREY, np.uint8)
    rows, columns = np.divmod(index.astype(int), side)
    image[rows, columns] = patches.reshape(-1, 3, patch_size, patch_size)
    return image.transpose(0, 3, 1, 4, 2).reshape(side * patch_size, side * patch_size, 3)


def draw_patches(masked: PairDataset, whole: PairDataset, path: Path, count: int = 8) -> None:
    """Draw the first `count` training samples, whole and with only the patches that the encoder sees."""
    assert masked.tokenizer is not None
    pyplot = drawing_pyplot()
    positions = list(range(count))
    seen, full = masked.__getitems__(positions), whole.__getitems__(positions)
    side, patch_size = masked.shape.image_size // masked.shape.patch_size, masked.shape.patch_size
    everything = np.arange(side * side)
    index = seen["patch_index"].numpy() if "patch_index" in seen else np.tile(everything, (count, 1))
    figure, axes = pyplot.subplots(2, count, figsize=(1.5 * count, 3.6), constrained_layout=True)
    for column in range(count):
        axes[0, column].imshow(_paste(full["patches"][column].numpy(), everything, patch_size, side))
        axes[1, column].imshow(_paste(seen["patches"][column].numpy(), index[column], patch_size, side))
        caption = str(masked.tokenizer.decode(full["input_ids"][column], skip_special_tokens=True)).strip()
        axes[0, column].set_title("\n".join(textwrap.wrap(caption, 24, max_lines=2, placeholder=" …")), fontsize=7)
    for axis in axes.flat:
        axis.set_axis_off()
    kept = masked.kept / masked.shape.num_patches
    figure.suptitle(f"Above: the crop. Below: the {kept:.0%} of its patches that the image encoder sees.", fontsize=9)
    save_figure(figure, path)


def draw_masks(whole: PairDataset, path: Path, samples: Sequence[int] = (4, 1, 9)) -> None:
    """Draw some training samples under each kind of mask, and as two views that share no patch."""
    pyplot = drawing_pyplot()
    positions, side, patch_size = np.asarray(samples), whole.shape.side, whole.shape.patch_size
    full = whole.__getitems__(positions.tolist())["patches"].numpy()
    shown = {"the crop": np.tile(np.arange(side * side), (len(samples), 1))}
    for kind in IMAGE_MASKS:
        shown[f"{kind}, 75%"] = keyed_patches(whole.seed, positions, side, 0.75, MaskRecipe(kind))[:, 0]
    views = keyed_patches(whole.seed, positions, side, 0.5, MaskRecipe(views=2))
    shown |= {"1st view of 50%": views[:, 0], "2nd view of 50%": views[:, 1]}
    size = (1.35 * len(shown), 1.35 * len(samples) + 0.3)
    figure, axes = pyplot.subplots(len(samples), len(shown), figsize=size, squeeze=False, constrained_layout=True)
    for column, (title, index) in enumerate(shown.items()):
        axes[0, column].set_title(title, fontsize=9)
        for row in range(len(samples)):
            axes[row, column].imshow(_paste(full[row, index[row]], index[row], patch_size, side))
            axes[row, column].set_axis_off()
    save_figure(figure, path)
