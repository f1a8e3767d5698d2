"""The paper's linear probe: a classifier trained by LARS on random crops, which are embedded anew each epoch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from flipscale.data.randomness import keyed_permutation
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.probe.recipe import LarsRecipe
from flipscale.evaluation.probe.rows import Classifier, Rows, Total, total_of
from flipscale.evaluation.probe.views import RandomCrops

if TYPE_CHECKING:
    from flipscale.evaluation.embedding import Embedder, Features

FIRST_STD = 0.01  # of the weights: MAE's head
NORM_EPS, NORM_MOMENTUM = 1e-6, 0.1  # MAE's batch norm before the head, and how fast its averages move


class Lars:
    """LARS without weight decay (You et al. 2017, as MAE has it): only matrices take the ratio of norms.

    Args:
        parameters: changed in place by `step`.
        momentum: of the steps.
        trust: the factor of the ratio.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], momentum: float, trust: float):
        self.parameters = parameters
        self.momentum = momentum
        self.trust = trust
        self._moving = [torch.zeros_like(parameter) for parameter in parameters]

    def step(self, gradients: Sequence[torch.Tensor], rate: float) -> None:
        """Move the parameters by one step."""
        for parameter, gradient, moving in zip(self.parameters, gradients, self._moving, strict=True):
            ratio = 1.0
            if parameter.ndim > 1:
                norms = parameter.norm().item(), gradient.norm().item()
                ratio = self.trust * norms[0] / norms[1] if all(norms) else 1.0
            moving.mul_(self.momentum).add_(gradient, alpha=ratio)
            parameter.sub_(moving, alpha=rate)


class Head:
    """The classifier while it is trained: fp64, the same on all processes."""

    def __init__(self, dim: int, num_classes: int, recipe: LarsRecipe, total: Total, device: torch.device | str):
        draws = torch.Generator().manual_seed(recipe.seed)
        weight = torch.randn(num_classes, dim, generator=draws, dtype=torch.float64) * FIRST_STD
        self.weight = weight.to(device)
        self.bias = self.weight.new_zeros(num_classes)
        self.mean, self.variance = self.weight.new_zeros(dim), self.weight.new_ones(dim)
        self.batch_norm = recipe.batch_norm
        self.total = total
        self._lars = Lars([self.weight, self.bias], recipe.momentum, recipe.trust)

    def learn(self, rows: Rows, count: int, rate: float) -> float:
        """Collective. Take one step by this process's `rows` of a batch of `count`, and return the batch's loss."""
        features = self._normalised(rows.features, count) if self.batch_norm else rows.features
        scores = torch.addmm(self.bias, features, self.weight.t())
        log_shares = scores.log_softmax(dim=1)
        loss = -log_shares.gather(1, rows.labels[:, None]).sum()
        errors = log_shares.exp()
        errors.scatter_add_(1, rows.labels[:, None], errors.new_full((len(rows), 1), -1.0))
        mine = torch.cat([(errors.t() @ features).flatten(), errors.sum(dim=0), loss[None]])
        sums = self.total(mine) / count
        weight, bias, loss = sums.split([self.weight.numel(), len(self.bias), 1])
        self._lars.step([weight.view_as(self.weight), bias], rate)
        return loss.item()

    def classifier(self) -> Classifier:
        """Return the classifier of features as they are; the batch norm's averages are worked into it."""
        if not self.batch_norm:
            return Classifier(self.weight, self.bias)
        weight = self.weight / (self.variance + NORM_EPS).sqrt()
        return Classifier(weight, self.bias - weight @ self.mean)

    def _normalised(self, features: torch.Tensor, count: int) -> torch.Tensor:
        mean = self.total(features.sum(dim=0)) / count
        variance = self.total((features - mean).square().sum(dim=0)) / count
        self.mean.lerp_(mean, NORM_MOMENTUM)
        self.variance.lerp_(variance * count / max(count - 1, 1), NORM_MOMENTUM)
        return (features - mean) / (variance + NORM_EPS).sqrt()


def train_lars(
    embedder: "Embedder",
    source: TarSource,
    labels: torch.Tensor,
    num_classes: int,
    features: "Features",
    recipe: LarsRecipe,
    step_done: Callable[[float], None] = lambda loss: None,
) -> Classifier:
    """Collective. Return the classifier that the recipe trains; the same for any number of processes but for rounding.

    Each epoch takes the images in an order of its own, and leaves out the last that fill no batch.

    Args:
        embedder: of the frozen model.
        source: the training images.
        labels: int64 of all images, in shard order.
        num_classes: all that labels may name.
        features: `pooled` or `embeds`.
        recipe: how it is trained.
        step_done: called after each step with the batch's loss.

    Raises:
        ValueError: as `LarsRecipe.check`; an image cannot be decoded.
    """
    recipe.check(len(labels))
    steps = len(labels) // recipe.batch_size
    seen = 0

    def count(news: int) -> None:
        nonlocal seen
        seen += news

    counting = dataclasses.replace(embedder, progress=count)
    device, total = embedder.accelerator.device, total_of(embedder.accelerator)
    head: Head | None = None
    for epoch in range(recipe.epochs):
        order = keyed_permutation(recipe.seed, "probe order", epoch, len(labels))[: steps * recipe.batch_size]
        crops = RandomCrops(source, order, epoch, embedder.image_size, recipe.crop_scale, recipe.seed)
        places, rows, seen, step = torch.empty(0, dtype=torch.int64), None, 0, 0
        for new_places, found in counting.image_batches(crops, features):
            new = Rows(found.double(), labels[torch.from_numpy(order)[new_places]])
            places, rows = torch.cat([places, new_places]), new if rows is None else rows.and_also(new)
            head = head or Head(found.shape[1], num_classes, recipe, total, device)
            # All processes have embedded all images up to `seen`.
            while (step + 1) * recipe.batch_size <= seen:
                due = places < (step + 1) * recipe.batch_size
                step_done(head.learn(rows.where(due).to(device), recipe.batch_size, recipe.rate(epoch + step / steps)))
                places, rows, step = places[~due], rows.where(~due), step + 1
    assert head is not None
    return head.classifier()
