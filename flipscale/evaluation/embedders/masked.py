"""Evaluate a FLIP model on masked images: one view of each, or several that share no patch, averaged.

The masks are those of training: chosen before the pixels move, so that only the patches that are left are normalised,
sent to the device and encoded. The mask of an image is a function of its row number alone, so that two runs, and any
number of processes and workers, see the same patches.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import torch

from flipscale.data.decode import decode_box, visible_patches
from flipscale.data.masks import IMAGE_MASKS, check_kind, keyed_patches
from flipscale.data.pairs import InputShape
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.images import Decoder
from flipscale.evaluation.reports.figures import can_draw
from flipscale.io.errors import UserError
from flipscale.io.files import check_png_path
from flipscale.model.patches import num_kept

# The masks of training are keyed by the recipe's seed; those of an evaluation are always the same.
_SEED = 0


@dataclass(frozen=True)
class ImageMask:
    """Which part of each image a model is evaluated on.

    Args:
        ratio: the fraction of patches removed from each view, in [0, 1); 0 keeps the image whole.
        views: masks of the same image that share no patch; their embeddings are averaged.
        kind: one of `flipscale.data.masks.image.IMAGE_MASKS`.
    """

    ratio: float = 0.0
    views: int = 1
    kind: str = "random"

    @property
    def label(self) -> str:
        """What tables call it: `whole`, `75 % random`, `4 views of 75 % random`."""
        if self.ratio == 0.0:
            return "whole"
        masked = f"{100 * self.ratio:g} % {self.kind}"
        return masked if self.views == 1 else f"{self.views} views of {masked}"

    @property
    def fields(self) -> dict[str, Any]:
        """What is recorded of it: `ratio`, `views` and `kind`; nothing of whole images."""
        return {"ratio": self.ratio, "views": self.views, "kind": self.kind} if self.ratio > 0.0 else {}

    def patches(self, rows: Sequence[int], side: int) -> np.ndarray:
        """Return the patches left of the images of these rows: int16 `(rows, views, kept)`, ascending.

        Raises:
            ValueError: a mask that its kind cannot draw, or that `side` x `side` patches do not allow.
        """
        return keyed_patches(_SEED, np.asarray(rows), side, self.ratio, self.kind, self.views)


WHOLE = ImageMask()


def image_masks(ratios: Sequence[float], views: Sequence[int], kind: str, side: int) -> list[ImageMask]:
    """Return a mask for each ratio and number of views that images of `side` x `side` patches have room for, since
    views share no patch. Ratio 0 is the whole image, once.

    Raises:
        ValueError: a ratio outside of [0, 1) or that leaves no patch, fewer than one view, a ratio or a number of views
            that fits none of the others, an unknown kind or a mask that it cannot draw.
    """
    check_kind(kind, IMAGE_MASKS, "--mask_kind")
    num_patches = side**2
    for count in views:
        if count < 1:
            raise UserError(f"--mask_views is {count}; it must be 1 or more")
    most = {ratio: num_patches // num_kept(num_patches, ratio) for ratio in dict.fromkeys(ratios)}
    found = [
        ImageMask(ratio, count, kind) if ratio > 0.0 else WHOLE
        for ratio, limit in most.items()
        for count in dict.fromkeys(views if ratio > 0.0 else [1])
        if count <= limit
    ]
    for ratio, limit in most.items():
        if all(mask.ratio != ratio for mask in found):
            raise UserError(
                f"--mask_ratio {ratio:g} leaves room for {limit} views that share no patch, fewer than --mask_views "
                f"{' '.join(map(str, views))}; use fewer views or a higher ratio"
            )
    for count in views:
        if count > 1 and all(mask.views != count for mask in found):
            raise UserError(
                f"--mask_views {count} fits no --mask_ratio of {' '.join(f'{ratio:g}' for ratio in ratios)}, since "
                f"views share no patch; use fewer views, or ratio {math.ceil(1000 * (1 - 1 / count)) / 1000:g} or more"
            )
    for mask in found:
        mask.patches([0], side)
    return found


def check_mask_arguments(args: argparse.Namespace, other_models: Sequence[str]) -> None:
    """Raise if no mask can be as the arguments ask, before a model is loaded.

    Args:
        other_models: the names of those that are not flipscale's.

    Raises:
        ValueError: an argument that needs `--mask_ratio` has none, a figure matplotlib or a place, or a mask a model of
            flipscale.
    """
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
        raise UserError(_takes_whole_images(name))


def asked_masks(args: argparse.Namespace, embedder: Embedder) -> list[ImageMask]:
    """Return the masks that the arguments ask for, of images as the embedder's model takes them.

    Raises:
        ValueError: as `image_masks`, or the model is not flipscale's.
    """
    if not any(args.mask_ratio):
        return [WHOLE]
    _check_maskable(embedder)
    shape = InputShape.of(embedder.model.config).at(embedder.image_size)
    return image_masks(args.mask_ratio, args.mask_views, args.mask_kind, shape.side)


def masked_embedder(embedder: Embedder, mask: ImageMask) -> Embedder:
    """Return the embedder that sees images under `mask`; for whole images, `embedder` itself.

    Raises:
        ValueError: the model is not flipscale's.
    """
    if mask.ratio == 0.0:
        return embedder
    _check_maskable(embedder)
    same = {known.name: getattr(embedder, known.name) for known in fields(embedder)}
    return MaskedEmbedder(**same, image_mask=mask)


def _check_maskable(embedder: Embedder) -> None:
    if type(embedder) is not Embedder:
        raise UserError(_takes_whole_images(embedder.name))


def _takes_whole_images(name: str) -> str:
    return f"{name} takes whole images only; --mask_ratio is for flipscale's models"


@dataclass(frozen=True)
class MaskedEmbedder(Embedder):
    """An embedder of FLIP whose image tower sees the patches that `image_mask` leaves, each view on its own. An image's
    embedding is the mean of its views' unit vectors, renormalised."""

    image_mask: ImageMask = field(kw_only=True)

    @property
    def mask(self) -> dict[str, Any]:
        return self.image_mask.fields

    def decoder(self) -> Decoder:
        shape = InputShape.of(self.model.config)
        return partial(_masked_square, self.image_size, shape.patch_size, self.image_mask)

    def image_features(self, **columns: torch.Tensor) -> torch.Tensor:
        from flipscale.model.modeling_flip import normalise_embeds  # seconds to import; a model has done it

        features = super().image_features(**columns)
        views = self.image_mask.views
        return features if views == 1 else normalise_embeds(features).unflatten(0, (-1, views)).mean(dim=1)

    def pooled_features(self, **columns: torch.Tensor) -> torch.Tensor:
        return super().pooled_features(**columns).unflatten(0, (-1, self.image_mask.views)).mean(dim=1)


def _masked_square(
    image_size: int, patch_size: int, mask: ImageMask, encoded: bytes, row: int
) -> dict[str, np.ndarray]:
    """Return what is left of the centred square: `patches` uint8 `(views, kept, 3 * p * p)` and `patch_index` int16
    `(views, kept)`."""
    index = mask.patches([row], image_size // patch_size)[0]
    square = decode_box(encoded, None, image_size, (1.0, 1.0))
    return {"patches": visible_patches(square, patch_size, index), "patch_index": index}
