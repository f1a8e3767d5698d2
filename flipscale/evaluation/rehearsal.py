"""Tries test sets before a run begins, so that what is wrong with one is told before the training and not after it."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flipscale.data.decode import decode_box
from flipscale.data.samples import BadSample
from flipscale.evaluation.images import SampleNumbers
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.test_set import TestSet
from flipscale.io.errors import UserError

# For the samples of each test set. A small set is tried whole, of ImageNet's a process has a thousand or two.
SECONDS = 5.0


def rehearse(tasks: Sequence[Task], image_size: int, rank: int, world: int) -> None:
    """Decode the images and read the answers of the test sets, for a few seconds each, spread over the whole set.

    Args:
        tasks: which `check` found to have all their files.
        image_size: of the model.
        rank, world: which of how many processes this is. Each tries other samples.

    Raises:
        ValueError: an image cannot be decoded, or has no answer that its task needs; the message names it.
    """
    for task in tasks:
        for test_set in [TestSet.open(task.data), *task.other_sets()]:
            if not len(test_set):
                raise UserError(f"{task.name}: the test set {test_set.data} is empty; name another")
            _try(test_set, task.truth(test_set), task.image_size or image_size, rank, world)


def _try(test_set: TestSet, truth: Callable[[int, int], Any], image_size: int, rank: int, world: int) -> None:
    numbers, end = SampleNumbers(test_set.source), time.monotonic() + SECONDS
    for row in _spread(len(numbers), rank, world):
        shard, number = numbers[row]
        truth(shard, number)
        try:
            decode_box(test_set.source.read(shard, number).image, None, image_size, (1.0, 1.0))
        except BadSample as error:
            name = f"{test_set.source.shard_name(shard)}#{number}"
            raise UserError(f"evaluation image {name} cannot be decoded: {error}; fetch the set again") from error
        if time.monotonic() > end:
            break


def _spread(count: int, rank: int, world: int) -> Iterator[int]:
    """Yield the rows of a process, in an order in which any beginning is spread over all of them."""
    mine = range(rank, count, world)
    bits = max(len(mine) - 1, 0).bit_length()
    for number in range(1 << bits):
        row = int(f"{number:0{bits}b}"[::-1], 2) if bits else 0
        if row < len(mine):
            yield mine[row]
