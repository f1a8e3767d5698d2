"""What people would rather look at than read: loss and accuracy against time, and what the encoder sees."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from flipscale.data.masks import MaskRecipe, keyed_patches
from flipscale.data.pairs import PairDataset
from flipscale.evaluation.comparison import Curve
from flipscale.model.masking import ImageMask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#1f6feb", "#d1495b", "#2e8b57", "#8a5fbf")
_GREY = 190


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _pyplot() -> Any:
    """matplotlib's, which draws to files only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _axes(title: str, y_label: str, curves: list[Curve]) -> "tuple[Figure, Axes, float]":
    """A figure over training time, and the seconds of a unit of it: hours where a run took more than two."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.2), constrained_layout=True)
    axes.set_title(title, loc="left")
    hours = max(curve.records[-1]["trained_seconds"] for curve in curves) > 7200
    axes.set_xlabel(f"training time, {'hours' if hours else 'seconds'}")
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes, 3600.0 if hours else 1.0


def draw_loss(curves: list[Curve], path: Path) -> None:
    """Contrastive loss against training time, one line a run."""
    figure, axes, unit = _axes("Contrastive loss of the training batches", "loss", curves)
    for curve, colour in zip(curves, _COLOURS, strict=False):
        seconds, losses = curve.points("loss")
        axes.plot([s / unit for s in seconds], losses, color=colour, label=curve.label)
    axes.legend(frameon=False)
    _save(figure, path)


def draw_accuracy(curves: list[Curve], path: Path, baselines: dict[str, float] | None = None) -> None:
    """Zero-shot top-1 against training time, one line a run, the trivial baselines as levels."""
    figure, axes, unit = _axes("Zero-shot top-1", "top-1, %", curves)
    for curve, colour in zip(curves, _COLOURS, strict=False):
        seconds, values = curve.points("zero_shot/top1")
        axes.plot([s / unit for s in seconds], values, "o-", color=colour, label=curve.label)
    for name, value in (baselines or {}).items():
        axes.axhline(value, color="#888888", linewidth=0.9, linestyle=":", zorder=0)
        axes.annotate(name, (0.01, value), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right", framealpha=0.9, edgecolor="none")
    _save(figure, path)


def _save(figure: "Figure", path: Path) -> None:
    """Writes the picture, the same bytes for the same figure, and forgets it."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def _paste(patches: np.ndarray, index: np.ndarray, patch_size: int, side: int) -> np.ndarray:
    """The patches at their places on a grey image: uint8 `(side * p, side * p, 3)`."""
    image = np.full((side, side, 3, patch_size, patch_size), _GREY, np.uint8)
    rows, columns = np.divmod(index.astype(int), side)
    image[rows, columns] = patches.reshape(-1, 3, patch_size, patch_size)
    return image.transpose(0, 3, 1, 4, 2).reshape(side * patch_size, side * patch_size, 3)


def draw_patches(masked: PairDataset, whole: PairDataset, path: Path, count: int = 8) -> None:
    """The first `count` training samples, whole and with only the patches that the encoder sees."""
    pyplot = _pyplot()
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
        axes[0, column].set_title(caption if len(caption) <= 22 else caption[:21] + "…", fontsize=7)
    for axis in axes.flat:
        axis.set_axis_off()
    kept = masked.kept / masked.shape.num_patches
    figure.suptitle(f"Above: the crop. Below: the {kept:.0%} of its patches that the image encoder sees.", fontsize=9)
    _save(figure, path)


def draw_masks(whole: PairDataset, path: Path, samples: Sequence[int] = (4, 1, 9)) -> None:
    """Some training samples under each kind of mask, and as two views that share no patch."""
    pyplot = _pyplot()
    positions, side, patch_size = np.asarray(samples), whole.shape.side, whole.shape.patch_size
    full = whole.__getitems__(positions.tolist())["patches"].numpy()
    shown = {"the crop": np.tile(np.arange(side * side), (len(samples), 1))}
    for kind in get_args(ImageMask):
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
    _save(figure, path)
