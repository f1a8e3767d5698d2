"""Lanes: the equal parts that every global batch has, whatever the number of processes."""

import math
from dataclasses import dataclass

import numpy as np

from flipscale.io.errors import UserError

_USUAL_LANES = 64


@dataclass(frozen=True)
class Lanes:
    """Which lane each global position belongs to: lane l has the l-th of `count` equal runs of every batch.

    A process takes a run of every batch too, so it has whole lanes or a part of one wherever the numbers divide.

    Args:
        count: divides `batch_size`.
        batch_size: the pairs of a step.
    """

    count: int = 1
    batch_size: int = 1

    @property
    def width(self) -> int:
        """The pairs that a lane has of every batch."""
        return self.batch_size // self.count

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the lane of each of `positions`, and how many earlier positions the lane has; both are int64."""
        batches, offsets = np.divmod(positions, self.batch_size)
        lanes, within = np.divmod(offsets, self.width)
        return lanes, batches * self.width + within

    def before(self, position: int) -> np.ndarray:
        """Return how many of the first `position` positions each lane has: int64 `(count,)`."""
        batches, offset = divmod(position, self.batch_size)
        return batches * self.width + np.clip(offset - np.arange(self.count) * self.width, 0, self.width)


def shared_out(num_shards: int, shards_per_block: int, lanes: Lanes) -> tuple[Lanes, int]:
    """Return the lanes of an order of `num_shards` shards, and how many of them each lane reads at a time.

    All lanes read `shards_per_block` at a time, and each at least one. Where all shards would be read at once, there is
    nothing to share out: a single lane has them.
    """
    of_each = -(-shards_per_block // lanes.count)
    return (lanes, of_each) if of_each * lanes.count < num_shards else (Lanes(), num_shards)


def number_of_lanes(wish: int | None, batch_size: int) -> int:
    """Return the number of lanes of a recipe: the wish, or the largest divisor of both 64 and the batch.

    Raises:
        ValueError: the wish does not divide the batch.
    """
    if wish is None:
        return math.gcd(_USUAL_LANES, batch_size)
    if wish >= 1 and batch_size % wish == 0:
        return wish
    nearest = divisors_around(batch_size, wish)
    raise UserError(f"data.lanes {wish} does not divide data.global_batch_size {batch_size}; use {nearest}")


def divisors_around(number: int, wish: int) -> str:
    """Return the nearest divisors of `number` below and above `wish`, such as `16 or 32`."""
    divisors = [count for count in range(1, number + 1) if number % count == 0]
    below = [count for count in divisors if count < wish][-1:]
    return " or ".join(str(count) for count in [*below, *[count for count in divisors if count > wish][:1]])
