"""A labelled set of images, which a probe learns from or is tested on."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.test_set import TestSet, read_labels
from flipscale.io.errors import UserError

if TYPE_CHECKING:
    from flipscale.evaluation.embedding import Embedder


@dataclass(frozen=True)
class LabelledSet:
    """Shards with `KEY.cls`, and the names of their classes.

    Args:
        data: the folder, as it was named.
        source: its images.
        class_names: in the order of their numbers.
    """

    data: str
    source: TarSource
    class_names: list[str]

    @classmethod
    def open(cls, folder: str, part: str) -> "LabelledSet":
        """Return the set at a folder or URL: of the shards in its folder `part` (`train`, `test`), as CLIP_benchmark
        lays sets out, or of its own.

        Raises:
            ValueError: the shards or the class names are missing, or there are no images.
            OSError: a shard cannot be fetched.
        """
        opened = TestSet.open(folder, part)
        if not len(opened):
            raise UserError(f"{opened.data} has no images; a probe needs shards with KEY.cls beside each image")
        return cls(opened.data, opened.source, opened.class_names())

    def labels(self, embedder: "Embedder") -> torch.Tensor:
        """Collective. Return the classes of this process's rows, int64 `(rows,)`.

        Raises:
            ValueError: on every process, if an image has no class number or one out of range.
        """
        return read_labels(embedder, self.source, len(self.class_names))


@dataclass(frozen=True)
class Sets:
    """What a probe learns from and is tested on; all have the same classes.

    Args:
        train: the training images.
        test: the test images.
        validation: the images by which the penalty is chosen; left out, a share of `train`.
    """

    train: LabelledSet
    test: LabelledSet
    validation: LabelledSet | None = None

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: the classes differ, or there is one only.
        """
        names = self.train.class_names
        if len(names) < 2:
            raise UserError(f"{self.train.data} has {len(names)} class; a probe needs 2 or more")
        for other in (self.test, self.validation):
            if other is not None and other.class_names != names:
                raise UserError(
                    f"the classes of {self.train.data} and {other.data} differ: {_difference(names, other.class_names)}"
                )


def _difference(names: list[str], theirs: list[str]) -> str:
    if len(names) != len(theirs):
        return f"{len(names)} and {len(theirs)}; use sets with the same classnames.txt"
    place = next(place for place, pair in enumerate(zip(names, theirs, strict=True)) if pair[0] != pair[1])
    return f"class {place} is {names[place]!r} and {theirs[place]!r}; use sets with the same classnames.txt"
