"""Masks whose randomness is keyed by sample: a sample's mask depends on the seed and its position, and nothing else."""

import numpy as np
import torch

from flipscale.data.masks.image import keep_patches
from flipscale.data.masks.recipe import MaskRecipe
from flipscale.data.masks.text import keep_tokens
from flipscale.data.randomness import keyed_uniform
from flipscale.model.patches import complement


def keyed_patches(seed: int, positions: np.ndarray, side: int, mask_ratio: float, recipe: MaskRecipe) -> np.ndarray:
    """Return the patches left of each sample's `side` x `side`: int16 `(len(positions), views, kept)`, ascending.

    Raises:
        ValueError: as `keep_patches`.
    """
    noise = keyed_uniform(seed, "mask", positions, side * side).reshape(-1, side, side)
    return keep_patches(torch.from_numpy(noise), mask_ratio, recipe.kind, recipe.views).numpy().astype(np.int16)


def left_out(index: np.ndarray, num_patches: int) -> np.ndarray:
    """Return the patches that `index` `(samples, kept)` leaves out: int64 `(samples, masked)`, ascending."""
    return complement(torch.from_numpy(index), num_patches).numpy()


def mask_tokens(
    tokens: dict[str, torch.Tensor], seed: int, positions: np.ndarray, mask_ratio: float, recipe: MaskRecipe
) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask` `(len(positions), kept)` of what is left of each caption, and its
    `position_ids` in the whole caption."""
    noise = torch.from_numpy(keyed_uniform(seed, "text mask", positions, tokens["input_ids"].shape[1]))
    index = keep_tokens(noise, tokens["attention_mask"], mask_ratio, recipe.text_kind)
    return {**{name: values.gather(1, index) for name, values in tokens.items()}, "position_ids": index}


def branch_scales(seed: int, positions: np.ndarray, views: int, num_blocks: int, drop_path_rate: float) -> np.ndarray:
    """Return what the attention and the MLP of each block are multiplied by, fp32 `(len(positions), views, num_blocks,
    2)`: 0 where they are dropped, by stochastic depth (Huang et al. 2016, arXiv 1603.09382).

    The rate grows linearly from 0 at the first block to `drop_path_rate` at the last, as timm has it. What is kept is
    divided by the share that is, so that the mean is 1.
    """
    draws = keyed_uniform(seed, "drop path", positions, views * num_blocks * 2).reshape(-1, views, num_blocks, 2)
    kept = 1.0 - np.linspace(0.0, drop_path_rate, num_blocks)[:, None]
    return ((draws < kept) / kept).astype(np.float32)
