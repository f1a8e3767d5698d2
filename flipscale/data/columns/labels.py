"""The class number of each image."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from flipscale.data.columns.column import Candidate, Column
from flipscale.data.image_augmentation import draw_mix
from flipscale.data.samples import BadSample, Sample
from flipscale.io.errors import UserError


@dataclass(eq=False, repr=False)
class Labels(Column):
    """`labels` int64 `(batch, 1)`: class numbers below `num_classes`.

    If the recipe mixes images, `labels` are `(batch, 2)`, an image's own class and its neighbour's. `label_shares` fp32
    `(batch, 2)` are their shares.
    """

    reads: ClassVar[str] = "class number"

    num_classes: int

    def __post_init__(self) -> None:
        """Raise if the first good sample has no class number, because then, as a rule, no sample has one."""
        source = self.given.source
        for shard, size in enumerate(source.shard_sizes):
            try:
                if size and source.read(shard, 0).label is not None:
                    return
            except BadSample:
                continue
            if size:
                raise UserError(
                    f"{source.shard_name(shard)}: {source.key(shard, 0)} has no class number, which loss.kind "
                    "'classify' learns; give shards with KEY.cls, as `flipscale prepare shards --labels` writes them"
                )

    def read(self, row: int, candidate: Candidate) -> int:
        return number_of(candidate.sample, "class", "num_classes", self.num_classes)

    def columns(self) -> dict[str, torch.Tensor]:
        labels = torch.tensor(self.values, dtype=torch.int64)
        recipe, seed, size = self.given.recipe.augment, self.given.seed, self.given.shape.image_size
        if not recipe.mixes:
            return {"labels": labels[:, None]}
        shares = torch.tensor([draw_mix(recipe, seed, size, first)[0] for first in self.where[::2].tolist()])
        own, others = shares.repeat_interleave(2), labels.view(-1, 2).flip(1).flatten()
        both, both_shares = torch.stack([labels, others], dim=1), torch.stack([own, 1.0 - own], dim=1)
        return {"labels": both, "label_shares": both_shares}


def number_of(sample: Sample, what: str, field: str, count: int) -> int:
    """Return the class or answer of a sample, below `count`, the value of `loss.options.FIELD`."""
    if sample.label is None:
        raise BadSample("there is no KEY.cls with a number" + ", and no KEY.npy" * (what == "answer"), "missing_label")
    if sample.label >= count:
        raise UserError(
            f"{sample.name} has {what} {sample.label}, counted from 0, and loss.options.{field} is {count}; set it "
            "to the number of lines in classnames.txt"
        )
    return sample.label
