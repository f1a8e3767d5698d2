"""Masks keyed by sample: the noise of `keyed_uniform` put into the definitions of `flipscale.model.masking`."""

from dataclasses import dataclass

import numpy as np
import torch

from flipscale.data.randomness import keyed_uniform
from flipscale.model.masking import ImageMask, TextMask, complement, keep_patches, keep_tokens


@dataclass(frozen=True)
class MaskRecipe:
    """How patches and words are chosen where a stage's mask_ratio or text_mask_ratio is above 0.

    Args:
        kind: `random`; `grid`, as many in every cell of a regular grid; `block`, one window; `centre`, Gaussian around
            the middle.
        views: masks of one decoded crop that share no patch, each embedded and paired with the caption; one text pass.
        text_kind: `random`, or `padding_first`: padding is removed before any word.
    """

    kind: ImageMask = "random"
    views: int = 1
    text_kind: TextMask = "padding_first"

    def views_at(self, mask_ratio: float) -> int:
        """The times that an image is embedded: once where nothing is masked, since views share no patch."""
        return self.views if mask_ratio > 0.0 else 1


def keyed_patches(seed: int, positions: np.ndarray, side: int, mask_ratio: float, recipe: MaskRecipe) -> np.ndarray:
    """The patches left of each sample's `side` x `side`: int16 `(len(positions), views, kept)`, ascending."""
    noise = keyed_uniform(seed, "mask", positions, side * side).reshape(-1, side, side)
    return keep_patches(torch.from_numpy(noise), mask_ratio, recipe.kind, recipe.views).numpy().astype(np.int16)


def left_out(index: np.ndarray, num_patches: int) -> np.ndarray:
    """The patches that `index` `(samples, kept)` leaves out: int64 `(samples, num_patches - kept)`, ascending."""
    return complement(torch.from_numpy(index), num_patches).numpy()


def mask_tokens(
    tokens: dict[str, torch.Tensor], seed: int, positions: np.ndarray, mask_ratio: float, recipe: MaskRecipe
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `(len(positions), kept)` of what is left of each caption, and its
    `position_ids` in the whole one."""
    noise = torch.from_numpy(keyed_uniform(seed, "text mask", positions, tokens["input_ids"].shape[1]))
    index = keep_tokens(noise, tokens["attention_mask"], mask_ratio, recipe.text_kind)
    return {**{name: values.gather(1, index) for name, values in tokens.items()}, "position_ids": index}
