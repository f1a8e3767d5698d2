"""The contrastive loss over the whole global batch: exact, in memory that does not grow with the batch's square."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

from flipscale.objectives import passes
from flipscale.objectives.exchange import Rows, exchange_of, world_size
from flipscale.objectives.logsumexp import LogSumExp, Softmax, common_shift, merge
from flipscale.objectives.objective import Objective
from flipscale.objectives.ready_gradients import ReadyGradients
from flipscale.objectives.tiles import as_number, views_of

# Up to this many pairs the products are fp64: fp32 knows a logit near 100 to 4e-6, and few do not average that out.
_FEW = 256

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Contrastive(Objective):
    """Each pair against the rest of the batch, in both directions (InfoNCE)."""

    def coupled_loss(
        self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor
    ) -> torch.Tensor:
        return contrastive_loss(image_embeds, text_embeds, logit_scale, self.exchange)


def contrastive_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor, exchange: str = "gather"
) -> torch.Tensor:
    """Collective. Return the symmetric InfoNCE of this process's pairs against those of all processes, fp32 `()`.

    The mean over processes is the loss of the global batch, and the mean of the gradients, which every engine takes, is
    its gradient: there is no factor of the world size. The gradients are computed along with the loss, so nothing is
    exchanged in the backward pass. It must multiply the loss by the same number on every process, and can run once.

    With several views of each image, the loss is the mean over views of the loss of that view's images and all texts:
    every view is paired with its caption, and no view is a negative of its siblings. The texts are exchanged once.

    Args:
        image_embeds: `(batch * views, dim)`, of unit length, the views of an image in a row.
        text_embeds: `(batch, dim)`, of unit length, the same `batch` on every process.
        logit_scale: `(1,)`, as `FlipModel.forward` returns it.
        exchange: how the processes' texts meet the images: `gather` or `ring`.
    """
    loss: torch.Tensor = _InfoNCE.apply(image_embeds, text_embeds, logit_scale, exchange)
    return loss


class _InfoNCE(ReadyGradients):
    @staticmethod
    def forward(
        ctx: Any, image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor, exchange: str
    ) -> torch.Tensor:
        pairs = len(text_embeds) * world_size()
        dtype = torch.float64 if pairs <= _FEW else torch.float32
        with torch.autocast(image_embeds.device.type, enabled=False):
            batch = ContrastiveBatch(image_embeds.to(dtype), text_embeds.to(dtype), as_number(logit_scale), exchange)
            batch.sum_negatives()
            loss = batch.loss()
            if any(ctx.needs_input_grad):
                inputs = (image_embeds, text_embeds, logit_scale)
                ctx.gradients = [g.to(t.dtype) for g, t in zip(batch.gradients(), inputs, strict=True)]
        return loss.float()


class ContrastiveBatch:
    """This process's images, view by view, against the texts of all processes.

    First sum the negatives, then take the loss, then the gradients. Another loss of the same softmax can change each
    view's `positives` in between.
    """

    def __init__(self, images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, exchange: str):
        """Collective.

        Args:
            scale: see `as_number`.
        """
        self.images, self.scale = images, scale
        self.texts = exchange_of(texts, exchange)
        views = views_of(images, len(texts))
        shift = _shift_of_all(views, texts, scale)
        self.views = [_View(view, scale, shift) for view in views]

    def sum_negatives(self) -> None:
        """Collective. Run the first pass over the tiles: the positives and the negatives of every image and text."""
        for first_pair, texts, slot in self.texts.visits(_merge_views):
            slot.found = _flat([view.add_negatives(first_pair, texts) for view in self.views])
        for view, negatives in zip(self.views, _by_view(self.texts.reduced), strict=True):
            view.text_negatives = LogSumExp(*negatives)

    def loss(self) -> torch.Tensor:
        """Return the loss of this process's pairs, fp64 `()`."""
        return torch.stack([view.cross_entropy() for view in self.views]).mean() / 2

    def gradients(self) -> Gradients:
        """Collective. Run the second pass over the tiles; return the gradients of images, texts and scale."""
        image_gradient = torch.zeros_like(self.images)
        image_gradients = views_of(image_gradient, len(self.views[0].images))
        softmax = _flat([view.normalise() for view in self.views])
        for first_pair, texts, slot in self.texts.visits(None, *softmax):
            text_gradient = torch.zeros_like(texts)
            for view, of_texts, of_images in zip(self.views, _by_view(slot.along), image_gradients, strict=True):
                view.add_gradients(first_pair, texts, Softmax(*of_texts), of_images, text_gradient)
            slot.found = (text_gradient,)
        (text_gradient,) = self.texts.reduced
        count = 2 * len(self.images)
        scale_gradient = _dot(self.images, image_gradient).sum(dtype=torch.float64).reshape(1) / count
        return image_gradient.mul_(self.scale / count), text_gradient.div_(count), scale_gradient


class _View:
    """One view of each of this process's images.

    Every logit of it is computed on this process only. So the softmax of each image is known here; that of a text is
    put together from all processes.
    """

    # Of this process's own texts, once the images of all processes have met them.
    text_negatives: LogSumExp

    def __init__(self, images: torch.Tensor, scale: torch.Tensor, shift: float | None):
        self.images, self.scale, self.shift = images, scale, shift
        self.positives = images.new_empty(len(images))
        self.image_negatives = LogSumExp.empty(images, shift)

    def add_negatives(self, first_pair: int, texts: torch.Tensor) -> LogSumExp:
        """Add some `texts` to the negatives of the images, and return the images as negatives of the texts."""
        text_negatives = LogSumExp.empty(texts, self.shift)
        found = (self.image_negatives, text_negatives, self.positives, self.shift)
        passes.add_negatives(self.images, texts, self.scale, first_pair, *found)
        return text_negatives

    def cross_entropy(self) -> torch.Tensor:
        """Return the cross-entropy of both sides of each pair, fp64 `(batch,)`."""
        sides = (self.image_negatives, self.text_negatives)
        return sides[0].cross_entropy(self.positives) + sides[1].cross_entropy(self.positives)

    def normalise(self) -> Softmax:
        """Make each image's softmax and the gradients of the positives; return the softmax of this process's texts."""
        self.image_softmax = self.image_negatives.softmax(self.positives)
        text_softmax = self.text_negatives.softmax(self.positives)
        self.positive_gradient = -(
            self.image_negatives.total * self.image_softmax.factor + self.text_negatives.total * text_softmax.factor
        )
        return text_softmax

    def add_gradients(
        self,
        first_pair: int,
        texts: torch.Tensor,
        text_softmax: Softmax,
        image_gradient: torch.Tensor,
        text_gradient: torch.Tensor,
    ) -> None:
        """Add the gradients of the images and of some `texts`, both still without their factors."""
        given = (self.image_softmax, text_softmax, self.positive_gradient)
        found = (image_gradient, text_gradient, self.shift)
        passes.add_gradients(self.images, texts, self.scale, first_pair, *given, *found)


def _merge_views(parts: Rows) -> Rows:
    """Merge the negatives of each view, of which each tensor is a stack of some processes'."""
    return _flat([merge(LogSumExp(*view)) for view in _by_view(parts)])


def _flat(views: Sequence[LogSumExp | Softmax]) -> Rows:
    return tuple(tensor for view in views for tensor in view)


def _by_view(rows: Rows) -> list[Rows]:
    return list(zip(rows[::2], rows[1::2], strict=True))


def _shift_of_all(views: Sequence[torch.Tensor], texts: torch.Tensor, scale: torch.Tensor) -> float | None:
    """Collective on CPUs. Return the `common_shift` of the global batch; on accelerators always None: to know it, the
    host would have to wait for all that is queued, and running maxima cost little there."""
    if texts.device.type != "cpu" or isinstance(texts, FakeTensor):
        return None
    lowest_positive = torch.stack([_dot(view, texts).min() for view in views]).min()
    highest_norm = torch.stack([view.norm(dim=1).max() for view in views]).max()
    bounds = torch.stack([highest_norm, texts.norm(dim=1).max(), -lowest_positive])
    if world_size() > 1:
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
    image_norm, text_norm, lowest = bounds.tolist()
    return common_shift(scale.item() * image_norm * text_norm, -scale.item() * lowest)


def _dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nd,nd->n", one, other)
