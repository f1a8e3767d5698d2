"""A batch of images with class numbers: read, decoded, cropped and masked in a loader worker, as pairs are."""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch

from flipscale.data.faults import BadSample, Fault
from flipscale.data.labelled.augment import Augment
from flipscale.data.pairs import PairDataset
from flipscale.data.sources.source import Sample, Source
from flipscale.io.errors import UserError


class MissingLabel(BadSample):
    """The sample has no class number."""

    cause = "missing_label"


class LabelledDataset(PairDataset):
    """Labelled images by global position. The columns of a batch are those of `PairDataset`, but for the captions';
    in their place:

    * `labels` int64 `(batch, 1)`: the class numbers, below `num_classes`.

    Where `recipe.augment` mixes images, each two that follow each other are mixed; `labels` are then `(batch, 2)`, an
    image's own and the other's, and `label_shares` fp32 `(batch, 2)` say how much of each there is.

    Args:
        num_classes: of the model's head.
    """

    what: ClassVar[str] = "class number"

    def __init__(self, *arguments: Any, num_classes: int, **options: Any):
        """
        Raises:
            ValueError: as `PairDataset`, or the shards have no class numbers.
        """
        super().__init__(*arguments, **options)
        self.num_classes = num_classes
        self.augment = Augment(self.recipe.augment, self.seed, self.shape.image_size)
        refuse_without_labels(self.source)

    def _answer(self, sample: Sample, draw: float, each_caption: bool) -> int:
        """Return the class number of a sample.

        Raises:
            BadSample: it has none.
            ValueError: the model's head has no such class.
        """
        if sample.label is None:
            raise MissingLabel("there is no KEY.cls with a number")
        if sample.label >= self.num_classes:
            raise UserError(
                f"{sample.name} has class {sample.label}, and the model's head has {self.num_classes} classes, "
                "counted from 0; set loss.options.num_classes to the lines of classnames.txt"
            )
        return sample.label

    def _images(self, where: np.ndarray, each_caption: bool) -> Iterator[tuple[np.ndarray, Any, Fault | None]]:
        found = zip(where.tolist(), super()._images(where, each_caption), strict=True)
        varied = ((self.augment.varied(image, position), label, fault) for position, (image, label, fault) in found)
        if not self.recipe.augment.mixes:
            yield from varied
            return
        assert len(where) % 2 == 0, "a micro-batch has whole couples"
        for position in where[::2].tolist():
            (one, label, fault), (other, other_label, other_fault) = next(varied), next(varied)
            one, other, share = self.augment.mixed(one, other, position)
            yield one, (label, other_label, share), fault
            yield other, (other_label, label, share), other_fault

    def _answers(self, labels: list[Any], where: np.ndarray) -> dict[str, torch.Tensor]:
        if not self.recipe.augment.mixes:
            return {"labels": torch.tensor(labels, dtype=torch.int64)[:, None]}
        *both, shares = zip(*labels, strict=True)
        own = torch.tensor(shares, dtype=torch.float32)
        return {"labels": torch.tensor(both, dtype=torch.int64).T, "label_shares": torch.stack([own, 1.0 - own], dim=1)}


def refuse_without_labels(source: Source) -> None:
    """Raise if the first good sample has no class number: then, as a rule, none has.

    Raises:
        ValueError: it has none.
        OSError: it cannot be read.
    """
    for shard, size in enumerate(source.shard_sizes):
        for number in range(min(size, 1)):
            try:
                sample = source.read(shard, number)
            except BadSample:
                continue
            if sample.label is None:
                raise UserError(
                    f"{source.shard_name(shard)}: {source.key(shard, number)} has no class number, which loss.kind "
                    "'classify' learns; give shards with KEY.cls, as `flipscale prepare shards --labels` writes them"
                )
            return
