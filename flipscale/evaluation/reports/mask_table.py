"""Accuracy against the image encoder's operations, for whole images, masked images and ensembles of views."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flipscale.evaluation.masked import ImageMask
from flipscale.evaluation.reports.figures import drawing_pyplot, save_figure, tidy
from flipscale.evaluation.results import NOTHING, Result, as_metrics
from flipscale.io.text_table import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# In the order of ratios.
_COLOURS = ("#2e8b57", "#1f6feb", "#d1495b", "#8a5fbf", "#b8860b")


@dataclass(frozen=True)
class MaskedResults:
    """A model's results under one mask.

    Args:
        flops: operations of the image tower and projection per image, all views together; a multiply-add is two.
    """

    model: str
    mask: ImageMask
    flops: float
    whole_flops: float
    results: Sequence[Result]

    @property
    def relative(self) -> float:
        """Operations as a share of a whole image's."""
        return self.flops / self.whole_flops

    @property
    def headlines(self) -> dict[str, Result]:
        return {result.name: result for result in self.results if result.headline}

    def as_json(self) -> dict[str, Any]:
        mask = {"mask_ratio": self.mask.ratio, "mask_views": self.mask.views, "mask_kind": self.mask.kind}
        cost = {"encoder_gflops": self.flops / 1e9, "encoder_relative": self.relative}
        return {"model": self.model, **mask, **cost, **as_metrics(self.results)}


def mask_table(rows: Sequence[MaskedResults]) -> str:
    """Return a Markdown table with a row for each model and mask: operations per image, then each headline with its
    95 % interval."""
    columns = list(dict.fromkeys(name for row in rows for name in row.headlines))
    several = len({row.model for row in rows}) > 1
    table = [[*(["model"] if several else []), "image", "encoder GFLOPs", "of whole", *columns]]
    for row in rows:
        cost = [f"{row.flops / 1e9:.3g}", f"{row.relative:.2f}x"]
        values = [row.headlines[name].estimate_text if name in row.headlines else NOTHING for name in columns]
        table.append([*([row.model] if several else []), row.mask.label, *cost, *values])
    return markdown_table(table, num_names=2 if several else 1)


def draw_masked_results(rows: Sequence[MaskedResults], path: Path) -> None:
    """Draw each task's first headline against the encoder's operations, a panel for each model and task.

    A line is a mask ratio and its points are numbers of views. Bars are 95 % intervals. A dotted level marks whole
    images."""
    panels: dict[tuple[str, str], list[MaskedResults]] = {}
    for row in rows:
        firsts = {result.task: name for name, result in reversed(row.headlines.items())}
        for name in (name for name in row.headlines if name in firsts.values()):
            panels.setdefault((row.model, name), []).append(row)
    size = (3.6 * len(panels) + 0.4, 3.6)
    figure, axes = drawing_pyplot().subplots(
        *(1, len(panels)), figsize=size, sharey=len({name for _, name in panels}) == 1, squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    for axis, ((model, name), shown) in zip(axes[0], panels.items(), strict=True):
        _draw_panel(axis, shown, name)
        axis.set_title(model, loc="left", fontsize=10)
    axes[0, 0].legend(loc="lower right", framealpha=0.9, edgecolor="none", fontsize=8)
    save_figure(figure, path)


def _draw_panel(axis: "Axes", rows: Sequence[MaskedResults], name: str) -> None:
    ratios = dict.fromkeys(row.mask.ratio for row in rows)
    for ratio, colour in zip(ratios, _COLOURS, strict=False):
        line = sorted((row for row in rows if row.mask.ratio == ratio), key=lambda row: row.flops)
        label = f"{100 * ratio:g} % {line[0].mask.kind}" if ratio > 0.0 else "whole"
        gflops, values = [row.flops / 1e9 for row in line], [row.headlines[name].value for row in line]
        axis.plot(gflops, values, "o-", color=colour, label=label, markersize=4)
        for row, at, value in zip(line, gflops, values, strict=True):
            low, high = row.headlines[name].low, row.headlines[name].high
            if low is not None and high is not None:
                axis.plot([at, at], [low, high], color=colour, linewidth=1, alpha=0.4)
            if row.mask.views > 1:
                beside: dict[str, Any] = {"xytext": (6, -3), "textcoords": "offset points", "va": "top"}
                axis.annotate(f"{row.mask.views} views", (at, value), **beside, fontsize=7, color=colour)
        if ratio == 0.0:
            axis.axhline(values[0], color=colour, linewidth=0.9, linestyle=":", zorder=0)
    shown = rows[0].headlines[name]
    axis.set_xlabel("encoder GFLOPs an image")
    axis.set_ylabel(", ".join(filter(None, (f"{shown.task.replace('_', '-')} {shown.shown}", shown.unit))))
    axis.set_xlim(0, 1.25 * max(row.flops for row in rows) / 1e9)
    tidy(axis)
