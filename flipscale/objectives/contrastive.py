"""The contrastive loss over the whole global batch, exact, in memory that does not grow with its square."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from flipscale.objectives.contrastive_tiles import (
    Rivals,
    Share,
    SimilarityTiles,
    common_shift,
    in_blocks,
    merge,
    views_of,
)
from flipscale.objectives.exchange import Rows, exchange_of, summed, world_size
from flipscale.objectives.ready_gradients import ReadyGradients

# Up to so many pairs the products are fp64: a logit near 100 is known to 4e-6 in fp32, and few do not average that out.
_FEW = 256

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def contrastive_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor, exchange: str = "gather"
) -> torch.Tensor:
    """Collective. Symmetric InfoNCE, fp32 `()`: this process's pairs against those of all processes.

    The mean over processes is the loss of the global batch, and the mean of its gradients, which every engine takes,
    is that loss's gradient: no factor of the world size anywhere. The gradients are made along with the loss, so that
    nothing is exchanged in the backward pass, which must multiply the loss by the same number on every process and can
    be run once.

    With several views of each image it is the mean over views of the loss of that view's images and all texts: every
    view is paired with its caption, and no view is a negative of its siblings. The texts are exchanged once for all.

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
            images, texts = image_embeds.to(dtype), text_embeds.to(dtype)
            batch = _Batch(images, texts, logit_scale, exchange)
            loss = batch.loss()
            if any(ctx.needs_input_grad):
                inputs = (image_embeds, text_embeds, logit_scale)
                ctx.gradients = [g.to(t.dtype) for g, t in zip(batch.gradients(), inputs, strict=True)]
        return loss.float()


class _Batch:
    """This process's part of the batch: its images, view by view, against all texts."""

    def __init__(self, images: torch.Tensor, texts: torch.Tensor, logit_scale: torch.Tensor, exchange: str):
        self.images, self.scale = images, float(logit_scale)
        self.all_texts = exchange_of(texts, exchange)
        views = views_of(images, len(texts))
        shift = _shift_of_all(views, texts, self.scale)
        self.views = [_View(view, self.scale, shift) for view in views]

    def loss(self) -> torch.Tensor:
        """Collective. fp64 `()`."""

        def rivals(first_pair: int, texts: torch.Tensor) -> Rows:
            return _in_a_row([view.add_rivals(first_pair, texts) for view in self.views])

        def merged(one: Rows, other: Rows) -> Rows:
            sides = zip(_by_view(one), _by_view(other), strict=True)
            return _in_a_row([merge(Rivals(*a), Rivals(*b)) for a, b in sides])

        of_texts = _by_view(self.all_texts.visit(rivals, merged))
        losses = [view.settle(Rivals(*rivals)) for view, rivals in zip(self.views, of_texts, strict=True)]
        return torch.stack(losses).mean() / 2

    def gradients(self) -> Gradients:
        """Collective. Of the images, the texts and `logit_scale`; after `loss`."""
        image_gradient = torch.zeros_like(self.images)
        by_view = views_of(image_gradient, len(self.views[0].images))

        def gradient(first_pair: int, texts: torch.Tensor, *of_texts: torch.Tensor) -> Rows:
            text_gradient = torch.zeros_like(texts)
            for view, share, view_gradient in zip(self.views, _by_view(of_texts), by_view, strict=True):
                view.add_gradients(first_pair, texts, Share(*share), view_gradient, text_gradient)
            return (text_gradient,)

        (text_gradient,) = self.all_texts.visit(gradient, summed, *_in_a_row([view.of_texts for view in self.views]))
        count = 2 * len(self.images)
        scale_gradient = _dot(self.images, image_gradient).sum(dtype=torch.float64).reshape(1) / count
        return image_gradient.mul_(self.scale / count), text_gradient.div_(count), scale_gradient


class _View:
    """A view of each of this process's images: every logit of it is on one process only. Each image's softmax is known
    here; that of a text is put together from all processes."""

    def __init__(self, images: torch.Tensor, scale: float, shift: float | None):
        self.images, self.scale, self.shift = images, scale, shift
        self.pairs = torch.empty_like(images[:, 0])
        self.rivals = Rivals.none(images, shift)

    def add_rivals(self, first_pair: int, texts: torch.Tensor) -> Rivals:
        """Gives the images some `texts` as rivals. Those that the texts have in them are returned."""
        of_texts = Rivals.none(texts, self.shift)

        def add(tiles: SimilarityTiles, rows: slice, columns: slice) -> None:
            sides = (self.rivals.of(rows), of_texts.of(columns))
            tiles.add_rivals(*sides, self.pairs[rows], self.shift)

        in_blocks(self.images, texts, self.scale, first_pair, add)
        return of_texts

    def settle(self, of_texts: Rivals) -> torch.Tensor:
        """The cross entropy of both sides of each pair, fp64 `(batch,)`, when the images have met all texts and
        `of_texts` are the rivals of this process's. Gradients can follow."""
        self.of_images, self.of_texts = self.rivals.share(self.pairs), of_texts.share(self.pairs)
        self.of_pairs = -(self.rivals.total * self.of_images.factor + of_texts.total * self.of_texts.factor)
        return self.rivals.cross_entropy(self.pairs) + of_texts.cross_entropy(self.pairs)

    def add_gradients(
        self,
        first_pair: int,
        texts: torch.Tensor,
        of_texts: Share,
        image_gradient: torch.Tensor,
        text_gradient: torch.Tensor,
    ) -> None:
        """As `SimilarityTiles.add_gradients`, of the images and some `texts`."""

        def add(tiles: SimilarityTiles, rows: slice, columns: slice) -> None:
            shares = (self.of_images.of(rows), of_texts.of(columns))
            gradients = (image_gradient[rows], text_gradient[columns])
            tiles.add_gradients(*shares, self.of_pairs[rows], *gradients, self.shift)

        in_blocks(self.images, texts, self.scale, first_pair, add)


def _in_a_row(of_views: Sequence[Rivals | Share]) -> Rows:
    return tuple(part for of_view in of_views for part in of_view)


def _by_view(rows: Rows) -> list[Rows]:
    return list(zip(rows[::2], rows[1::2], strict=True))


def _shift_of_all(views: Sequence[torch.Tensor], texts: torch.Tensor, scale: float) -> float | None:
    """Collective. The `common_shift` of the global batch."""
    lowest_pair = torch.stack([_dot(view, texts).min() for view in views]).min()
    highest_norm = torch.stack([view.norm(dim=1).max() for view in views]).max()
    bounds = torch.stack([highest_norm, texts.norm(dim=1).max(), -lowest_pair])
    if world_size() > 1:
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
    image_norm, text_norm, lowest = bounds.tolist()
    return common_shift(scale * image_norm * text_norm, -scale * lowest)


def _dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nd,nd->n", one, other)
