"""What an objective is: a loss, and what it needs of the model and of a batch."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from flipscale.data.pairs import PairDataset
from flipscale.model import FlipConfig, FlipModel, FlipPreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is learned. The loss is the sum of two parts, of which a subclass defines one or both:

    * `coupled_loss` compares the samples of the global batch with each other. Its inputs are kept for all samples, and
      their gradients are handed back to one micro-batch after another.
    * `mean_loss` is a mean over samples, so any split into processes and micro-batches is exact.

    A subclass is a frozen dataclass, too. Its own fields are the options that `loss.options` of a recipe can set.

    Args:
        exchange: how the processes' texts meet the images of each: `gather` or `ring`. Does not change what is learned.
    """

    # The class of the model that is trained, and of the exported one, which has of its weights those that it names.
    model_class: ClassVar[type[FlipPreTrainedModel]] = FlipModel
    exported_class: ClassVar[type[FlipPreTrainedModel]] = FlipModel
    # Whether the model has a text tower, so that a batch has captions and a tokenizer belongs to the model.
    takes_text: ClassVar[bool] = True
    # The columns of a batch beside the towers' inputs, such as `masked_patches`.
    columns: ClassVar[tuple[str, ...]] = ()

    exchange: str = "gather"

    @property
    def num_labels(self) -> int | None:
        """Of how many classes or answers the model names one, whose names lie beside the shards; None of none."""
        return None

    @property
    def is_coupled(self) -> bool:
        """Whether there is a `coupled_loss`."""
        return type(self).coupled_loss is not Objective.coupled_loss

    def model_config(self, config: FlipConfig) -> FlipConfig:
        """Return `config`, or a copy with other first values of the loss's parameters."""
        return config

    def dataset(self, *arguments: Any, **options: Any) -> PairDataset:
        """Return what a run reads its batches from: a `PairDataset` of these arguments, or of a subclass.

        Raises:
            ValueError: the source or a stage is not as this objective needs it.
        """
        options["sends_masked"] = "masked_patches" in self.columns
        return PairDataset(*arguments, **options)

    def example_labels(self, batch_size: int) -> torch.Tensor:
        """Return labels as a batch has them, for objectives that have the column `labels`: here `(batch, 1)` class
        numbers."""
        return torch.zeros(batch_size, 1, dtype=torch.int64)

    def parameters(self, output: Any) -> dict[str, torch.Tensor]:
        """Return the loss's parameters by name, as the model's `forward` returns them: the same for every sample."""
        found = {name: getattr(output, name) for name in getattr(self.model_class, "loss_parameters", ())}
        return {name: value for name, value in found.items() if value is not None}

    def compared(self, output: Any) -> tuple[torch.Tensor, ...]:
        """Return what `coupled_loss` compares: tensors with a row for each sample, or with as many as it has views."""
        assert output.image_embeds is not None
        assert output.text_embeds is not None
        return output.image_embeds, output.text_embeds

    def coupled_loss(self, *compared: Any, **parameters: Any) -> torch.Tensor:
        """Collective. Return this process's part of the loss, fp32 `()`: the mean over processes is the global batch's,
        and the mean of the gradients is its gradient.

        Args:
            compared: what `compared` returns, of all samples of this process.
            parameters: what `parameters` returns, by name.
        """
        raise NotImplementedError

    def mean_loss(self, output: Any) -> torch.Tensor:
        """Return the mean over the samples of a micro-batch, fp32 `()`."""
        assert output.image_embeds is not None
        return output.image_embeds.new_zeros((), dtype=torch.float32)

    def metrics(self, output: Any) -> dict[str, torch.Tensor]:
        """Return numbers for `metrics.jsonl`, `()` or `(1,)`. The mean over the main process's micro-batches is logged.
        Unless a subclass adds more, they are the loss's parameters."""
        return self.parameters(output)

    def gradient_squares(self, output: Any) -> dict[str, torch.Tensor]:
        """Return the squared norms of gradients that the backward pass of `output` has found, `()`, by what
        `metrics.jsonl` calls the norms. They are added up over the main process's micro-batches."""
        return {}
