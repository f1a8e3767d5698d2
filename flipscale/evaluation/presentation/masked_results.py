"""A table and a figure of results on masked images, against the image encoder's operations."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flipscale.evaluation.masked_images import ImageMask
from flipscale.evaluation.presentation.figures import drawing_pyplot, save_figure, tidy
from flipscale.evaluation.results import NOTHING, Result, as_metrics
from flipscale.io.text_table import markdown_table


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
    """Return a Markdown table of models and masks: operations per image, then each headline with its interval."""
    columns = list(dict.fromkeys(name for row in rows for name in row.headlines))
    several = len({row.model for row in rows}) > 1
    table = [[*(["model"] if several else []), "image", "encoder GFLOPs", "of whole", *columns]]
    for row in rows:
        cost = [f"{row.flops / 1e9:.3g}", f"{row.relative:.2f}x"]
        values = [row.headlines[name].estimate_text if name in row.headlines else NOTHING for name in columns]
        table.append([*([row.model] if several else []), row.mask.label, *cost, *values])
    return markdown_table(table, num_names=2 if several else 1)


def draw_masked_results(rows: Sequence[MaskedResults], path: Path) -> None:
    """Draw each task's first headline against the encoder's operations: a panel for each model and task, a line for
    each mask ratio, a point for each number of views. Bars are 95 % intervals."""
    panels: dict[tuple[str, str], list[MaskedResults]] = {}
    for row in rows:
        firsts = {result.task: name for name, result in reversed(row.headlines.items())}
        for name in (name for name in row.headlines if name in firsts.values()):
            panels.setdefault((row.model, name), []).append(row)
    size = (3.6 * len(panels) + 0.4, 3.6)
    figure, axes = drawing_pyplot().subplots(1, len(panels), figsize=size, squeeze=False, constrained_layout=True)
    for axis, ((model, name), shown) in zip(axes[0], panels.items(), strict=True):
        for number, ratio in enumerate(dict.fromkeys(row.mask.ratio for row in shown)):
            line = sorted((row for row in shown if row.mask.ratio == ratio), key=lambda row: row.flops)
            label = f"{100 * ratio:g} % {line[0].mask.kind}" if ratio > 0.0 else "whole"
            results = [row.headlines[name] for row in line]
            gflops, values = [row.flops / 1e9 for row in line], [result.value for result in results]
            axis.plot(gflops, values, "o-", color=f"C{number}", label=label, markersize=4)
            for row, at, result in zip(line, gflops, results, strict=True):
                if result.low is not None and result.high is not None:
                    axis.plot([at, at], [result.low, result.high], color=f"C{number}", linewidth=1, alpha=0.4)
                if row.mask.views > 1:
                    axis.annotate(f" {row.mask.views} views", (at, result.value), va="top", fontsize=7)
        result = shown[0].headlines[name]
        axis.set_title(model, loc="left", fontsize=10)
        axis.set_xlabel("encoder GFLOPs an image")
        axis.set_ylabel(f"{result.task.replace('_', '-')} {result.shown}, {result.unit}")
        axis.set_xlim(0, 1.25 * max(row.flops for row in shown) / 1e9)
        tidy(axis)
    axes[0, 0].legend(loc="lower right", framealpha=0.9, edgecolor="none", fontsize=8)
    save_figure(figure, path)
