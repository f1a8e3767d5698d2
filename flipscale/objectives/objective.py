"""The interface of an objective: a loss, and its demands on the model and on a batch."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from flipscale.data.batch_inputs import BatchInputs
from flipscale.data.batches import BatchDataset
from flipscale.data.columns.column import Column
from flipscale.data.columns.pixels import image_columns
from flipscale.data.columns.stored import StoredFeatures
from flipscale.data.columns.teacher_embeds import TeacherEmbeds
from flipscale.data.columns.tokens import Tokens
from flipscale.io.options import Copies
from flipscale.model import FlipConfig, FlipModel, FlipOutput, FlipPreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The learning goal of a run. The loss is the sum of two parts; a subclass defines one or both:

    * `coupled_loss` compares the samples of the global batch with each other. Its inputs are kept for all samples.
      Their gradients are handed back to one micro-batch after another.
    * `per_sample_loss` is a mean over samples, so any split into processes and micro-batches is exact.

    A subclass is a frozen dataclass, too. Its own fields are the options that `loss.options` of a recipe can set.

    Args:
        positives: `pairs` or `equal_captions`, see `LossRecipe`.
        captions_per_image: see `LossRecipe`; each image has as many rows of text.
    """

    # Class of the trained model, and class of the exported model, whose weights are a subset of the trained ones.
    model_class: ClassVar[type[FlipPreTrainedModel]] = FlipModel
    exported_class: ClassVar[type[FlipPreTrainedModel]] = FlipModel
    # Whether the model reads text, so that batches have captions and the export has a tokenizer.
    takes_text: ClassVar[bool] = True
    # Columns of a batch besides the towers' inputs, such as `masked_patches`.
    columns: ClassVar[tuple[str, ...]] = ()

    positives: str = "pairs"
    captions_per_image: Copies = 1

    @property
    def num_labels(self) -> int | None:
        """Number of classes or answers, whose names lie next to the shards; None for losses without labels."""
        return None

    @property
    def needs_global_batch(self) -> bool:
        return type(self).coupled_loss is not Objective.coupled_loss

    @property
    def global_columns(self) -> tuple[str, ...]:
        """Columns of a batch that `coupled_loss` takes as keywords, and the model does not."""
        return ("caption_ids",) if self.positives == "equal_captions" else ()

    def model_config(self, config: FlipConfig) -> FlipConfig:
        """Return the configuration of the trained model: `config`, or a changed copy."""
        return config

    def trained_class(self, config: Any) -> Any:
        """Return the class of the trained model: this objective's for FLIP, or that of another family."""
        return self.model_class if isinstance(config, FlipConfig) else config.trained_class

    def exported_model(self, config: Any) -> tuple[Any, Any]:
        if isinstance(config, FlipConfig):
            return self.exported_class, config
        return config.exported_class, config.exported()

    def dataset(self, *arguments: Any, **options: Any) -> BatchDataset:
        """Return the data set of a run, given the fields of `BatchInputs`."""
        given = BatchInputs(*arguments, **options)
        return BatchDataset(given, self.makers(given))

    def makers(self, given: BatchInputs) -> list[Column]:
        """Return the makers of a batch's columns, in the order in which they read a sample."""
        makers: list[Column] = [StoredFeatures(given, tower) for tower in given.stored]
        if given.teachers:
            makers.append(TeacherEmbeds(given))
        if "texts" not in given.stored:
            makers.append(Tokens(given, self.captions_per_image, "caption_ids" in self.global_columns))
        if "images" not in given.stored:
            makers += image_columns(given, "masked_patches" in self.columns)
        return makers

    def example_labels(self, batch_size: int) -> torch.Tensor:
        """Return labels of a batch's shape and dtype; by default class numbers `(batch, 1)`."""
        return torch.zeros(batch_size, 1, dtype=torch.int64)

    def pending_gather(self, micro_batches: int) -> Any:
        """Return the gather of a step's texts that begins beside the image tower, which `coupled_loss` then takes as
        the keyword `pending`. None for losses without one."""
        return None

    def parameters(self, output: Any) -> dict[str, torch.Tensor]:
        """Return the loss's parameters by name from the output of the model's `forward`."""
        values = {name: getattr(output, name) for name in getattr(self.model_class, "loss_parameters", ())}
        return {name: value for name, value in values.items() if value is not None}

    def loss_inputs(self, output: Any) -> tuple[torch.Tensor, ...]:
        """Return the inputs of `coupled_loss`: tensors with one row for each sample, or for each view of a sample."""
        assert output.image_embeds is not None
        assert output.text_embeds is not None
        return output.image_embeds, output.text_embeds

    def coupled_loss(self, *loss_inputs: Any, **parameters: Any) -> torch.Tensor:
        """Collective. Return this process's part of the loss, fp32 `()`, of all its `loss_inputs` and `parameters`. The
        `global_columns` are among the keywords.

        The mean over processes is the loss of the global batch, and the mean of the gradients is its gradient.
        """
        raise NotImplementedError

    def per_sample_loss(self, output: Any) -> torch.Tensor:
        """Return the mean over the samples of a micro-batch, fp32 `()`."""
        assert output.image_embeds is not None
        return output.image_embeds.new_zeros((), dtype=torch.float32)

    def chance_loss(self, batch_size: int) -> float | None:
        """Return the loss, in nats, of a model that cannot tell the samples of a batch apart; None if it is unknown."""
        return None

    def metrics(self, output: Any) -> dict[str, torch.Tensor]:
        """Return numbers for `metrics.jsonl`, `()` or `(1,)`: the loss's parameters, and `image_spread` and
        `text_spread`, 1 minus the mean cosine of two embeddings of a micro-batch: 0 if all are one vector.

        The mean over the main process's micro-batches is logged.
        """
        sides = zip(
            ("image_spread", "text_spread"), self.loss_inputs(output) if self.needs_global_batch else (), strict=False
        )
        spreads = {name: 1.0 - rows.detach().mean(0, dtype=torch.float32).square().sum() for name, rows in sides}
        return {**self.parameters(output), **spreads}

    def gradient_squares(self, output: Any) -> dict[str, torch.Tensor]:
        """Return squared gradient norms `()` by their names in `metrics.jsonl`, after the backward pass of `output`.

        The main process sums them over its micro-batches.
        """
        return {}


@dataclass
class SecondLossOutput(FlipOutput):
    """A `FlipOutput` with `second_losses`, fp32 `(images,)` or `()`, and `gradient_squares` (see `watch_gradients`)."""

    second_losses: torch.Tensor | None = None
    gradient_squares: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class WithSecondLoss(Objective):
    """Another objective plus `weight` times a second loss, on the image tower's tokens.

    The model's output is a `SecondLossOutput`.
    """

    # Name of the second loss in metrics.
    second_loss: ClassVar[str]

    other: Objective
    weight: float

    @property
    def needs_global_batch(self) -> bool:
        return self.other.needs_global_batch

    @property
    def global_columns(self) -> tuple[str, ...]:
        return self.other.global_columns

    def model_config(self, config: FlipConfig) -> FlipConfig:
        return self.other.model_config(config)

    def pending_gather(self, micro_batches: int) -> Any:
        return self.other.pending_gather(micro_batches)

    def loss_inputs(self, output: Any) -> tuple[torch.Tensor, ...]:
        return self.other.loss_inputs(output)

    def coupled_loss(self, *loss_inputs: torch.Tensor, **parameters: Any) -> torch.Tensor:
        return self.other.coupled_loss(*loss_inputs, **parameters)

    def per_sample_loss(self, output: Any) -> torch.Tensor:
        return self.other.per_sample_loss(output) + self.weight * output.second_losses.mean()

    def metrics(self, output: Any) -> dict[str, torch.Tensor]:
        return {**self.other.metrics(output), f"{self.second_loss}_loss": output.second_losses.mean()}

    def gradient_squares(self, output: Any) -> dict[str, torch.Tensor]:
        names = ("contrastive_grad_norm", f"{self.second_loss}_grad_norm")
        return dict(zip(names, output.gradient_squares, strict=True))


@contextmanager
def recorded_inputs(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the first input of each call of a module."""
    inputs: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def watch_gradients(tokens: torch.Tensor, means: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens for a second loss, and the squared gradient norms of both losses, fp32 `(2,)`.

    The first loss uses the `means` `(batch, width)` of the `tokens` `(batch, tokens, width)`, the other each token. The
    norms are of the losses' gradients with respect to the tokens. The one backward pass computes both, from the
    gradients of tensors that only one of the losses uses.
    """
    squares = torch.zeros(2, device=tokens.device)

    def record(gradient: torch.Tensor, square: torch.Tensor, factor: float) -> None:
        square.copy_(factor * torch.linalg.vector_norm(gradient, dtype=torch.float32).square())

    # A view of its own, because the gradient of `tokens` itself is the sum of both losses'.
    own = tokens.view_as(tokens)
    if own.requires_grad:
        own.register_hook(functools.partial(record, square=squares[1], factor=1.0))
    if means.requires_grad:
        # A mean hands an equal part of its gradient to each token.
        means.register_hook(functools.partial(record, square=squares[0], factor=1 / tokens.shape[1]))
    return own, squares
