"""Accuracy against what the image encoder computes, for whole images, masked ones and ensembles of views."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flipscale.evaluation.embedders.masked import ImageMask
from flipscale.evaluation.reports.figures import drawing_pyplot, save_figure
from flipscale.evaluation.results import Result, as_metrics

_COLOURS = ("#1f6feb", "#d1495b", "#2e8b57", "#8a5fbf", "#b8860b")


@dataclass(frozen=True)
class MaskedResults:
    """What a model achieves on images under one mask.

    Args:
        model: what tables call the model.
        mask: of its images.
        flops: operations of its image tower and projection for one image, all views together; a multiply-add is two.
        whole_flops: the same of a whole image.
        results: of all tasks, in their order.
    """

    model: str
    mask: ImageMask
    flops: float
    whole_flops: float
    results: Sequence[Result]

    @property
    def relative(self) -> float:
        """The operations, in those of a whole image."""
        return self.flops / self.whole_flops

    @property
    def headlines(self) -> dict[str, Result]:
        """The results that short tables show, by their names `task/metric`."""
        return {result.name: result for result in self.results if result.headline}

    def as_json(self) -> dict[str, Any]:
        """Return the mask, the operations and the metrics, for a line of JSON."""
        mask = {"mask_ratio": self.mask.ratio, "mask_views": self.mask.views, "mask_kind": self.mask.kind}
        cost = {"encoder_gflops": self.flops / 1e9, "encoder_relative": self.relative}
        return {"model": self.model, **mask, **cost, **as_metrics(self.results)}


def mask_table(rows: Sequence[MaskedResults]) -> str:
    """Return a Markdown table: a line for each model and mask, with the encoder's operations for an image, and a column
    with 95 % intervals for each headline of the tasks."""
    columns = list(dict.fromkeys(name for row in rows for name in row.headlines))
    several = len({row.model for row in rows}) > 1
    table = [[*(["model"] if several else []), "image", "encoder GFLOPs", "of whole", *columns]]
    for row in rows:
        cost = [f"{row.flops / 1e9:.3g}", f"{row.relative:.2f}x"]
        values = [_cell(row.headlines.get(name)) for name in columns]
        table.append([*([row.model] if several else []), row.mask.label, *cost, *values])
    left = 2 if several else 1
    widths = [max(3, *(len(line[column]) for line in table)) for column in range(len(table[0]))]
    rules = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    lines = [
        [cell.ljust(width) if column < left else cell.rjust(width) for column, (cell, width) in enumerate(cells)]
        for cells in (list(zip(line, widths, strict=True)) for line in table)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rules, *lines[1:]))


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    return result.value_text + (f" ({result.interval_text})" if result.interval_text else "")


def draw_masked_results(rows: Sequence[MaskedResults], path: Path) -> None:
    """Draw the first headline of each task against the encoder's operations: a panel for each model and task, a line
    for each ratio, whose points are the numbers of views; bars are 95 % intervals and the level is that of whole
    images."""
    panels = {}
    for row in rows:
        for result in reversed(list(row.headlines.values())):
            panels[row.model, result.task] = result.name
    panels = {(m, t): name for (m, t), name in panels.items()}
    figure, axes = drawing_pyplot().subplots(
        1, len(panels), figsize=(4.2 * len(panels) + 0.6, 3.8), squeeze=False, constrained_layout=True
    )
    for axis, ((model, _), name) in zip(axes[0], panels.items(), strict=True):
        _draw_panel(axis, [row for row in rows if row.model == model and name in row.headlines], name)
        axis.set_title(model if len({m for m, _ in panels}) > 1 else name, loc="left", fontsize=10)
    axes[0, 0].legend(loc="lower right", framealpha=0.9, edgecolor="none", fontsize=8)
    save_figure(figure, path)


def _draw_panel(axis: Any, rows: Sequence[MaskedResults], name: str) -> None:
    masked = {row.mask.ratio: [r for r in rows if r.mask.ratio == row.mask.ratio] for row in rows if row.mask.ratio}
    lines = {f"{100 * ratio:g} % {group[0].mask.kind}": group for ratio, group in masked.items()}
    whole = [row for row in rows if row.mask.ratio == 0.0]
    if whole:
        axis.axhline(whole[0].headlines[name].value, color="#888888", linewidth=0.9, linestyle=":", zorder=0)
        lines["whole"] = whole
    for (label, group), colour in zip(lines.items(), _COLOURS, strict=False):
        group = sorted(group, key=lambda row: row.flops)
        x, y = [row.flops / 1e9 for row in group], [row.headlines[name].value for row in group]
        axis.plot(x, y, "o-", color=colour, label=label, markersize=4)
        for row, at, value in zip(group, x, y, strict=True):
            result = row.headlines[name]
            if result.low is not None and result.high is not None:
                axis.plot([at, at], [result.low, result.high], color=colour, linewidth=1, alpha=0.5)
            if row.mask.views > 1:
                axis.annotate(f"{row.mask.views}", (at, value), xytext=(-3, 5), textcoords="offset points", ha="right")
    shown = rows[0].headlines[name]
    axis.set_xlabel("encoder GFLOPs an image")
    axis.set_ylabel(", ".join(filter(None, (f"{shown.task} {shown.shown}", shown.unit))))
    axis.set_xlim(left=0)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
