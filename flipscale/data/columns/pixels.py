"""The visible patches of each image: decoded, cropped, changed in colour, varied and masked."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from flipscale.data.batch_inputs import BatchInputs
from flipscale.data.columns.column import Candidate, Column
from flipscale.data.decode import DRAWS_PER_CROP, Crop, decode_crop, visible_patches
from flipscale.data.image_augmentation import Augment, draw_colors, recolored
from flipscale.data.masks import branch_scales, keyed_patches, removed_patches
from flipscale.data.randomness import keyed_uniform

# Number of the model's pixels that are decoded before the first crop is resized. Alternating decoders and filters would
# evict each other's code from the cache and cost a fifth more. Of large images, only one is in memory.
_PIXELS_TOGETHER = 1 << 16


@dataclass(eq=False, repr=False)
class Pixels(Column):
    """The patches of random crops.

    * `patches` uint8 `(batch, kept, 3 * p * p)`: visible patches of each crop.
    * `patch_index` int16 `(batch, kept)`: positions of the visible patches; absent without a mask.
    * `masked_patches` uint8 `(batch, num_patches - kept, 3 * p * p)`, with `sends_masked`: the removed patches.

    With several views, `patches` is `(batch, views, kept, 3 * p * p)` and `patch_index` `(batch, views, kept)`. With
    teachers, each image has one of the crops that they saw. If the recipe mixes images, each two neighbours are mixed.
    """

    reads: ClassVar[str] = "image"

    sends_masked: bool = False

    def __post_init__(self) -> None:
        self.size, self.patch_size = self.given.shape.image_size, self.given.shape.patch_size
        self.augment = Augment(self.given.recipe.augment, self.given.seed, self.size)

    def draw(self) -> None:
        given, where, side = self.given, self.where, self.given.shape.side
        index = removed = None
        if given.mask_ratio > 0.0:
            mask = given.mask
            index = keyed_patches(given.seed, where, side, given.mask_ratio, mask.kind, mask.views)
            index = index if mask.views > 1 else index[:, 0]
            removed = removed_patches(index, side**2) if self.sends_masked else None
        shape, patch_bytes = (len(where), side**2) if index is None else index.shape, 3 * self.patch_size**2
        # The patches that each column shows, and the column.
        self._shown = {"patches": (index, np.empty((*shape, patch_bytes), np.uint8))}
        if removed is not None:
            self._shown["masked_patches"] = removed, np.empty((*removed.shape, patch_bytes), np.uint8)
        self._crop_draws = keyed_uniform(given.seed, "crop", where, DRAWS_PER_CROP)
        if not given.recipe.mirror:
            self._crop_draws[:, -1] = 1.0
        jitter = given.recipe.augment.color_jitter
        self._colors = draw_colors(jitter, given.seed, where) if jitter.changes else None
        self._decoded: list[tuple[int, Crop]] = []
        self._together = max(2 if self.augment.recipe.mixes else 1, _PIXELS_TOGETHER // self.size**2 // 2 * 2)

    def read(self, row: int, candidate: Candidate) -> Crop:
        encoded, draws = candidate.sample.image, self._crop_draws[row]
        if self.given.teachers:
            crops = self.given.teachers[0].crops
            return crops.decode(encoded, candidate.place, crops.number(draws), self.size)
        return decode_crop(encoded, draws, self.size, self.given.recipe.crop_scale)

    def put(self, row: int, value: Any) -> None:
        self._decoded.append((row, value))
        if len(self._decoded) >= self._together:
            self._show()

    def _show(self) -> None:
        """Write the patches of the decoded crops."""
        images = self._mixed() if self.augment.recipe.mixes else self._fitted()
        for row, image in images:
            for index, column in self._shown.values():
                column[row] = visible_patches(image, self.patch_size, None if index is None else index[row])
        self._decoded.clear()

    def _mixed(self) -> Iterator[tuple[int, np.ndarray]]:
        images = self._fitted()
        for (row, one), (other_row, other) in zip(images, images, strict=True):
            one, other, _ = self.augment.mixed(one, other, int(self.where[row]))
            yield from ((row, one), (other_row, other))

    def _fitted(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each row and its image, uint8 RGB `(image_size, image_size, 3)`, before it is mixed with another."""
        for row, crop in self._decoded:
            image = crop.fitted(self.size)
            if self._colors is not None:
                image = recolored(image, self._colors[row])
            yield row, self.augment.varied(image, int(self.where[row]))

    def columns(self) -> dict[str, torch.Tensor]:
        self._show()
        index, _ = self._shown["patches"]
        columns = {name: torch.from_numpy(column) for name, (_, column) in self._shown.items()}
        return columns if index is None else {**columns, "patch_index": torch.from_numpy(index)}


@dataclass(eq=False, repr=False)
class BranchScales(Column):
    """`branch_scales` fp32 `(batch, blocks, 2)`, or `(batch, views, blocks, 2)`: factors of the branches of the image
    tower's blocks."""

    def columns(self) -> dict[str, torch.Tensor]:
        given, views = self.given, self.given.mask.views_at(self.given.mask_ratio)
        scales = branch_scales(given.seed, self.where, views, given.shape.num_blocks, given.drop_path_rate)
        return {"branch_scales": torch.from_numpy(scales if views > 1 else scales[:, 0])}


def image_columns(given: BatchInputs, sends_masked: bool = False) -> list[Column]:
    """Return the makers of the image tower's columns."""
    return [Pixels(given, sends_masked), *([BranchScales(given)] if given.drop_path_rate > 0.0 else [])]
