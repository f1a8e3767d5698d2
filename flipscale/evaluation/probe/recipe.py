"""What the paper's linear probe is trained by."""

import math
from dataclasses import dataclass

from flipscale.io.errors import UserError
from flipscale.io.options import Count, CountOrZero, Positive, Seed, ShareAboveZero, ShareBelowOne


@dataclass(frozen=True)
class LarsRecipe:
    """How the classifier is trained. The defaults are the paper's for ImageNet-1K; trust is MAE's.

    Args:
        base_lr: learning rate for 256 images.
        batch_size: images of a step, of all processes together.
        epochs: how often each image is seen.
        warmup_epochs: of a linear rise from zero; a cosine to zero follows.
        momentum: of the steps.
        trust: what a matrix moves by is the rate times `trust` times the ratio of its norm to its gradient's. Vectors
            move by the rate alone.
        batch_norm: normalise each feature over the batch, as MAE's head does, without learned scale and shift.
        crop_scale: the least and the largest share of an image's area that a crop has.
        seed: of weights, order and crops.
    """

    base_lr: Positive = 0.01
    batch_size: Count = 16_384
    epochs: Count = 90
    warmup_epochs: CountOrZero = 10
    momentum: ShareBelowOne = 0.9
    trust: Positive = 0.001
    batch_norm: bool = False
    crop_scale: tuple[ShareAboveZero, ShareAboveZero] = (0.08, 1.0)
    seed: Seed = 0

    def __post_init__(self) -> None:
        least, most = self.crop_scale
        if not 0 < least <= most <= 1:
            raise UserError(f"crop_scale is {least} {most}; give two shares above 0, at most 1, the least first")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise UserError(
                f"epochs is {self.epochs}, {self.warmup_epochs} of them to warm up; give epochs more than that"
            )

    def check(self, num_images: int) -> None:
        """Raise if these images cannot be trained on so.

        Raises:
            ValueError: the batch is larger than the data.
        """
        if not 1 <= self.batch_size <= num_images:
            raise UserError(
                f"the batch of {self.batch_size:,} does not fit the {num_images:,} training images; give "
                f"--global_batch_size a number from 1 to {num_images}, such as {max(num_images // 4, 1)}"
            )

    def rate(self, epoch: float) -> float:
        """Return the learning rate at a point of the training, in epochs."""
        peak = self.base_lr * self.batch_size / 256
        if epoch < self.warmup_epochs:
            return peak * epoch / self.warmup_epochs
        done = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return peak * 0.5 * (1 + math.cos(math.pi * done))
