"""Evaluation of a FLIP model on masked images, one view of each or the mean over several disjoint views; and a table
and a figure of accuracy against the image encoder's operations.

The masks are training's: chosen before the pixels move, so only the remaining patches are normalised, sent to the
device and encoded. The mask of an image depends on its row number alone, so every run sees the same patches, with any
number of processes and workers.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flipscale.data.decode import decode_box, visible_patches
from flipscale.data.masks import IMAGE_MASKS, check_kind, keyed_patches
from flipscale.data.pairs import InputShape
from flipscale.evaluation.embedding import Decoder, Embedder
from flipscale.evaluation.reports.figures import can_draw, drawing_pyplot, save_figure, tidy
from flipscale.evaluation.results import NOTHING, Result, as_metrics
from flipscale.io.errors import UserError
from flipscale.io.files import check_png_path
from flipscale.io.text_table import markdown_table
from flipscale.model.patches import num_kept

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Fixed, because a recipe's seed must not change an evaluation.
_SEED = 0
# In the order of ratios.
_COLOURS = ("#2e8b57", "#1f6feb", "#d1495b", "#8a5fbf", "#b8860b")


@dataclass(frozen=True)
class ImageMask:
    """The mask of each image in an evaluation.

    Args:
        ratio: fraction of patches removed from each view, in [0, 1); 0 keeps the image whole.
        views: number of disjoint views of an image, whose embeddings are averaged.
    """

    ratio: float = 0.0
    views: int = 1
    kind: str = "random"

    @property
    def label(self) -> str:
        """Name of the mask in tables: `whole`, `75 % random`, `4 views of 75 % random`."""
        if self.ratio == 0.0:
            return "whole"
        masked = f"{100 * self.ratio:g} % {self.kind}"
        return masked if self.views == 1 else f"{self.views} views of {masked}"

    @property
    def fields(self) -> dict[str, Any]:
        """The recorded fields `ratio`, `views` and `kind`; empty for whole images."""
        return asdict(self) if self.ratio > 0.0 else {}

    def patches(self, rows: Sequence[int], side: int) -> np.ndarray:
        """Return the remaining patches of the images of these rows: int16 `(rows, views, kept)`, ascending.

        Raises:
            ValueError: the kind cannot draw the mask, or `side` x `side` patches do not allow it.
        """
        return keyed_patches(_SEED, np.asarray(rows), side, self.ratio, self.kind, self.views)


WHOLE = ImageMask()


def image_masks(ratios: Sequence[float], views: Sequence[int], kind: str, side: int) -> list[ImageMask]:
    """Return a mask for each ratio and each number of views that fits it. Ratio 0 is the whole image, once."""
    check_kind(kind, IMAGE_MASKS, "--mask_kind")
    num_patches = side**2
    most = {ratio: num_patches // num_kept(num_patches, ratio) for ratio in dict.fromkeys(ratios)}
    masks = [
        ImageMask(ratio, count, kind) if ratio > 0.0 else WHOLE
        for ratio, limit in most.items()
        for count in dict.fromkeys(views if ratio > 0.0 else [1])
        if count <= limit
    ]
    for ratio, limit in most.items():
        if all(mask.ratio != ratio for mask in masks):
            raise UserError(
                f"--mask_ratio {ratio:g} has room for {limit} views that share no patch, fewer than --mask_views "
                f"{' '.join(map(str, views))}; use fewer views or a higher ratio"
            )
    for count in views:
        if count > 1 and all(mask.views != count for mask in masks):
            raise UserError(
                f"--mask_views {count} fits no --mask_ratio of {' '.join(f'{ratio:g}' for ratio in ratios)}, because "
                f"views share no patch; use fewer views, or ratio {math.ceil(1000 * (1 - 1 / count)) / 1000:g} or more"
            )
    for mask in masks:
        mask.patches([0], side)
    return masks


def check_mask_arguments(args: argparse.Namespace, other_models: Sequence[str]) -> None:
    """Raise before a model is loaded if the mask arguments do not fit together."""
    if not any(args.mask_ratio):
        given = {"--mask_views": args.mask_views != [1], "--mask_kind": args.mask_kind != "random"}
        for flag in (flag for flag, is_given in {**given, "--mask_figure": args.mask_figure}.items() if is_given):
            raise UserError(f"{flag} needs a --mask_ratio above 0, such as --mask_ratio 0 0.5 0.75")
        return
    if args.mask_figure and not can_draw():
        raise UserError("--mask_figure draws with matplotlib, which is not installed; pip install 'flipscale[plots]'")
    if args.mask_figure:
        check_png_path(args.mask_figure, "--mask_figure")
    for name in other_models:
        raise _only_whole(name)


def asked_masks(args: argparse.Namespace, embedder: Embedder) -> list[ImageMask]:
    """Return the masks that the arguments ask for, for the embedder's image size."""
    if not any(args.mask_ratio):
        return [WHOLE]
    if type(embedder) is not Embedder:
        raise _only_whole(embedder.name)
    shape = InputShape.of(embedder.model.config).at(embedder.image_size)
    return image_masks(args.mask_ratio, args.mask_views, args.mask_kind, shape.side)


def masked_embedder(embedder: Embedder, mask: ImageMask) -> Embedder:
    """Return the embedder of images under `mask`; for whole images, `embedder` itself."""
    if mask.ratio == 0.0:
        return embedder
    same = {known.name: getattr(embedder, known.name) for known in fields(embedder)}
    return MaskedEmbedder(**same, image_mask=mask)


def _only_whole(name: str) -> UserError:
    return UserError(f"{name} takes whole images only; --mask_ratio is for flipscale's models")


@dataclass(frozen=True)
class MaskedEmbedder(Embedder):
    """An embedder of FLIP whose image tower sees the patches that `image_mask` leaves, view by view. An image's
    embedding is the mean of its views' unit vectors, renormalised."""

    image_mask: ImageMask = field(kw_only=True)

    @property
    def mask(self) -> dict[str, Any]:
        return self.image_mask.fields

    def decoder(self) -> Decoder:
        return partial(_masked_square, self.image_size, InputShape.of(self.model.config).patch_size, self.image_mask)

    def image_features(self, **columns: torch.Tensor) -> torch.Tensor:
        from flipscale.model.modeling_flip import normalise_embeds  # slow to import; a model has done it

        features = super().image_features(**columns)
        views = self.image_mask.views
        return features if views == 1 else normalise_embeds(features).unflatten(0, (-1, views)).mean(dim=1)

    def pooled_features(self, **columns: torch.Tensor) -> torch.Tensor:
        return super().pooled_features(**columns).unflatten(0, (-1, self.image_mask.views)).mean(dim=1)


def _masked_square(
    image_size: int, patch_size: int, mask: ImageMask, encoded: bytes, row: int
) -> dict[str, np.ndarray]:
    """Return the remaining patches of the centred square: `patches` uint8 `(views, kept, 3 * p * p)` and `patch_index`
    int16 `(views, kept)`."""
    index = mask.patches([row], image_size // patch_size)[0]
    square = decode_box(encoded, None, image_size, (1.0, 1.0))
    return {"patches": visible_patches(square, patch_size, index), "patch_index": index}


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
