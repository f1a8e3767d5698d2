"""What the columns of a batch are made of: the data of a run, and a stage's sizes and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from flipscale.data.masks import keep_patches
from flipscale.data.samples import Source
from flipscale.io.errors import UserError
from flipscale.model.configuration_flip import FlipConfig, patches_along
from flipscale.model.patches import num_kept
from flipscale.recipe.data import DataRecipe, MaskRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from flipscale.data.features import PrecomputedFeatures, Teacher


@dataclass(frozen=True)
class InputShape:
    """The sizes of the model's inputs: pixels along each side, tokens of a caption, blocks of the image tower.

    Args:
        squashes: whether a test image is resized to the square, else its centre is cut out.
    """

    image_size: int
    patch_size: int
    max_tokens: int
    num_blocks: int = 0
    squashes: bool = False

    @classmethod
    def of(cls, config: FlipConfig) -> InputShape:
        vision, text = config.vision_config, config.caption_config
        sizes = (vision.image_size, vision.patch_size, text.max_position_embeddings, vision.num_hidden_layers)
        return cls(*sizes, squashes=getattr(config, "squashes", False))

    def at(self, image_size: int | None) -> InputShape:
        """Return the shape for another image size; None keeps the size."""
        if image_size is None:
            return self
        try:
            patches_along(image_size, self.patch_size)
        except ValueError as error:
            raise UserError(str(error)) from error
        return replace(self, image_size=image_size)

    @property
    def side(self) -> int:
        """Number of patches along each side of an image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.side**2


@dataclass(frozen=True)
class BatchInputs:
    """What the columns of a batch are made of. Raise UserError if the mask is impossible at these ratios.

    Args:
        stored: features in place of the input of a tower, by tower.
        teachers: teachers whose embeddings the loss needs.
    """

    source: Source
    tokenizer: PreTrainedTokenizerBase | None
    recipe: DataRecipe
    shape: InputShape
    seed: int
    mask_ratio: float
    mask: MaskRecipe = field(default_factory=MaskRecipe)
    text_mask_ratio: float = 0.0
    drop_path_rate: float = 0.0
    stored: Mapping[str, PrecomputedFeatures] = field(default_factory=dict)
    teachers: Sequence[Teacher] = ()

    def __post_init__(self) -> None:
        check_masks(self.shape, self.mask_ratio, self.mask, self.text_mask_ratio)


def check_masks(shape: InputShape, mask_ratio: float, mask: MaskRecipe, text_mask_ratio: float) -> int:
    """Return the number of kept patches of an image. Raise UserError if a mask is impossible at these ratios."""
    try:
        kept = num_kept(shape.num_patches, mask_ratio)
        num_kept(shape.max_tokens, text_mask_ratio, "tokens")
    except ValueError as error:
        raise UserError(str(error)) from error
    if mask_ratio > 0.0:
        # Drawn once, so that an impossible mask is refused here.
        keep_patches(torch.zeros(1, shape.side, shape.side), mask_ratio, mask.kind, mask.views)
    return kept
