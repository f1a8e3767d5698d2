"""Classification: the image tower is fine-tuned with a linear head on its pooled output (paper, section 4.3)."""

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import nn
from transformers.utils import ModelOutput

from flipscale.data.batch_inputs import BatchInputs
from flipscale.data.columns.column import Column
from flipscale.data.columns.labels import Labels
from flipscale.data.columns.pixels import image_columns
from flipscale.io.options import Range, ShareBelowOne
from flipscale.model import FlipConfig, FlipForImageClassification, FlipPreTrainedModel
from flipscale.objectives.objective import Objective


@dataclass
class ClassifyOutput(ModelOutput):
    """
    Args:
        logits: `(images, num_labels)`, a row for each view of an image.
        labels: int64 `(batch, n)`, the classes of each image.
        label_shares: fp32 `(batch, n)`, shares of the classes in a mixed image; None if n is 1.
    """

    logits: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    label_shares: torch.Tensor | None = None


class ClassifyingFlipModel(FlipForImageClassification):
    """A `FlipForImageClassification` for training: its output also carries the labels. Weights have the same names."""

    def forward(  # type: ignore[override]
        self,
        labels: torch.Tensor | None = None,
        label_shares: torch.Tensor | None = None,
        return_logits: bool = True,
        **images: Any,
    ) -> ClassifyOutput:
        """Classify `images`, the arguments of `FlipVisionModel.forward`."""
        return ClassifyOutput(logits=super().forward(**images).logits, labels=labels, label_shares=label_shares)


@dataclass(frozen=True, kw_only=True)
class Classify(Objective):
    """The cross-entropy of each image's class; for a mixed image, of its classes, weighted by their shares.

    Args:
        num_classes: number of classes of the head, one per line of `classnames.txt` next to the training shards.
        label_smoothing: share of the target spread evenly over all classes (arXiv 1512.00567); 0.1 in the paper.
    """

    model_class: ClassVar[type[FlipPreTrainedModel]] = ClassifyingFlipModel
    exported_class: ClassVar[type[FlipPreTrainedModel]] = FlipForImageClassification
    takes_text: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("labels",)

    num_classes: Annotated[int, Range(at_least=2, at_most=10_000_000)]
    label_smoothing: ShareBelowOne = 0.0

    @property
    def num_labels(self) -> int:
        return self.num_classes

    def model_config(self, config: FlipConfig) -> FlipConfig:
        changed = copy.deepcopy(config)
        changed.num_labels = self.num_classes
        return changed

    def makers(self, given: BatchInputs) -> list[Column]:
        return [Labels(given, self.num_classes), *image_columns(given)]

    def chance_loss(self, batch_size: int) -> float:
        return math.log(self.num_classes)

    def loss_inputs(self, output: ClassifyOutput) -> tuple[torch.Tensor, ...]:
        return ()

    def per_sample_loss(self, output: ClassifyOutput) -> torch.Tensor:
        assert output.logits is not None
        assert output.labels is not None
        logits, labels = output.logits.float(), output.labels
        shares = torch.ones_like(labels, dtype=torch.float32) if output.label_shares is None else output.label_shares
        views = len(logits) // len(labels)
        # The cross-entropy is linear in the target, so the loss of a mixture is the mixture of its classes' losses.
        options: dict[str, Any] = {"label_smoothing": self.label_smoothing, "reduction": "none"}
        total = logits.new_zeros(())
        for label, share in zip(labels.unbind(dim=1), shares.unbind(dim=1), strict=True):
            each = nn.functional.cross_entropy(logits, label.repeat_interleave(views), **options)
            total = total + (share.repeat_interleave(views) * each).mean()
        return total
