"""Evaluation of a FLIP model on masked images, one view of each or the mean over several disjoint views.

The masks are training's: chosen before the pixels move, so only the remaining patches are normalised, sent to the
device and encoded. The mask of an image depends on its row number alone, so every run sees the same patches, with any
number of processes and workers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from flipscale.data.decode import decode_processed, visible_patches
from flipscale.data.masks import IMAGE_MASKS, check_kind, keyed_patches
from flipscale.data.pairs import InputShape
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.whole_images import Decoder
from flipscale.io.errors import UserError
from flipscale.model.patches import num_kept

# Fixed, because a recipe's seed must not change an evaluation.
_SEED = 0


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
        """Return the remaining patches of the images of these rows: int16 `(rows, views, kept)`, ascending."""
        return keyed_patches(_SEED, np.asarray(rows), side, self.ratio, self.kind, self.views)


WHOLE = ImageMask()


def image_masks(ratios: Sequence[float], views: Sequence[int], kind: str, side: int) -> list[ImageMask]:
    """Return a mask for each ratio and each number of views that fits it. Ratio 0 is the whole image, once."""
    check_kind(kind, IMAGE_MASKS, "--mask_kind")
    masks = []
    for ratio in dict.fromkeys(ratios):
        most = side**2 // num_kept(side**2, ratio)
        own = [ImageMask(ratio, count, kind) for count in dict.fromkeys(views) if count <= most] if ratio else [WHOLE]
        if not own:
            raise UserError(
                f"--mask_ratio {ratio:g} has room for {most} views that share no patch, fewer than --mask_views "
                f"{' '.join(map(str, views))}; use fewer views or a higher ratio"
            )
        masks += own
    for mask in masks:
        mask.patches([0], side)
    return masks


def check_mask_arguments(
    ratios: Sequence[float], views: Sequence[int], kind: str, other_models: Sequence[str], tasks: Sequence[Task]
) -> None:
    """Raise before a model is loaded if the mask arguments do not fit together."""
    if not any(ratios):
        if views != [1] or kind != "random":
            flag = "--mask_views" if views != [1] else "--mask_kind"
            raise UserError(f"{flag} needs a --mask_ratio above 0, such as --mask_ratio 0 0.5 0.75")
    elif other_models:
        raise _only_whole(other_models[0])
    elif max(views) > 1:
        for task in tasks:
            if task.needs in ("decoder", "answers"):
                raise UserError(
                    f"mask_views is {max(views)} and {task.name} of kind {task.kind!r}, which reads one view of an "
                    "image; leave mask_views out"
                )


def asked_masks(ratios: Sequence[float], views: Sequence[int], kind: str, embedder: Embedder) -> list[ImageMask]:
    """Return the masks that the arguments ask for, for the embedder's image size."""
    if not any(ratios):
        return [WHOLE]
    if type(embedder.side("images")) is not Embedder:
        raise _only_whole(embedder.name)
    shape = InputShape.of(embedder.model.config).at(embedder.image_size)
    return image_masks(ratios, views, kind, shape.side)


def masked_embedder(embedder: Embedder, mask: ImageMask) -> Embedder:
    """Return the embedder of images under `mask`; for whole images, `embedder` itself."""
    if mask.ratio == 0.0:
        return embedder
    if (of_images := embedder.side("images")) is not embedder:
        return replace(cast(Any, embedder), of_images=masked_embedder(of_images, mask))
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
        return partial(_masked_square, InputShape.of(self.model.config).at(self.image_size), self.image_mask)

    def image_features(self, **columns: torch.Tensor) -> torch.Tensor:
        from flipscale.model.modeling_flip import normalise_embeds  # slow to import; a model has done it

        features = super().image_features(**columns)
        views = self.image_mask.views
        return features if views == 1 else normalise_embeds(features).unflatten(0, (-1, views)).mean(dim=1)

    def pooled_features(self, **columns: torch.Tensor) -> torch.Tensor:
        return super().pooled_features(**columns).unflatten(0, (-1, self.image_mask.views)).mean(dim=1)


def _masked_square(shape: InputShape, mask: ImageMask, encoded: bytes, row: int) -> dict[str, np.ndarray]:
    """Return the remaining patches of the centred square: `patches` uint8 `(views, kept, 3 * p * p)` and `patch_index`
    int16 `(views, kept)`."""
    index = mask.patches([row], shape.side)[0]
    square = decode_processed(encoded, shape.image_size, shape.squashes)
    return {"patches": visible_patches(square, shape.patch_size, index), "patch_index": index}
