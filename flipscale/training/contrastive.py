"""The contrastive loss over the whole global batch, exact, in memory that does not grow with its square."""

from typing import Any

import torch
import torch.distributed as dist

from flipscale.training.contrastive_tiles import Rivals, Share, SimilarityTiles, common_shift, merge
from flipscale.training.exchange import Gathered, Ring, Rows, exchange_of, world_size
from flipscale.training.ready_gradients import ReadyGradients

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
    view is paired with its caption, and no view is a negative of its siblings.

    Args:
        image_embeds: `(batch * views, dim)`, of unit length, the views of an image in a row.
        text_embeds: `(batch, dim)`, of unit length, the same `batch` on every process.
        logit_scale: `(1,)`, as `FlipModel.forward` returns it.
        exchange: how the processes' texts meet the images: `gather` or `ring`.
    """
    views = image_embeds.unflatten(0, (len(text_embeds), -1)).unbind(1)
    return torch.stack([_InfoNCE.apply(view, text_embeds, logit_scale, exchange) for view in views]).mean()


class _InfoNCE(ReadyGradients):
    @staticmethod
    def forward(
        ctx: Any, image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor, exchange: str
    ) -> torch.Tensor:
        pairs = len(image_embeds) * world_size()
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
    """This process's part of the batch: `images` against all texts, every logit on one process only. Each image's
    softmax is known here; that of a text is put together from all processes."""

    def __init__(self, images: torch.Tensor, texts: torch.Tensor, logit_scale: torch.Tensor, exchange: str):
        self.images, self.texts, self.scale = images, texts, float(logit_scale)
        self.all_texts: Gathered | Ring = exchange_of(texts, exchange)
        self.shift = _shift_of_all(images, texts, self.scale)
        self.pairs = torch.empty_like(images[:, 0])
        self.of_images, self.of_texts = Rivals.none(images, self.shift), Rivals.none(texts, self.shift)

    def loss(self) -> torch.Tensor:
        """Collective. fp64 `()`; leaves the rivals of this process's images and texts."""

        def rivals(first_pair: int, texts: torch.Tensor) -> Rows:
            of_texts = Rivals.none(texts, self.shift)
            tiles = SimilarityTiles(self.images, texts, self.scale, first_pair)
            tiles.add_rivals(self.of_images, of_texts, self.pairs, shared=self.shift is not None)
            return of_texts

        self.of_texts = Rivals(*self.all_texts.visit(rivals, lambda one, other: merge(Rivals(*one), Rivals(*other))))
        return (self.of_images.cross_entropy(self.pairs) + self.of_texts.cross_entropy(self.pairs)).mean() / 2

    def gradients(self) -> Gradients:
        """Collective. Of `images`, `texts` and `logit_scale`; after `loss`."""
        of_images, of_texts = self.of_images.share(self.pairs), self.of_texts.share(self.pairs)
        of_pairs = -(self.of_images.total * of_images.factor + self.of_texts.total * of_texts.factor)
        image_gradient = torch.zeros_like(self.images)

        def gradient(first_pair: int, texts: torch.Tensor, *share: torch.Tensor) -> Rows:
            text_gradient = torch.zeros_like(texts)
            tiles = SimilarityTiles(self.images, texts, self.scale, first_pair)
            gradients = (image_gradient, text_gradient)
            tiles.add_gradients(of_images, Share(*share), of_pairs, *gradients, shared=self.shift is not None)
            return (text_gradient,)

        (text_gradient,) = self.all_texts.visit(gradient, lambda one, other: (one[0].add_(other[0]),), *of_texts)
        count = 2 * len(self.images)
        scale_gradient = _dot(self.images, image_gradient).sum(dtype=torch.float64).reshape(1) / count
        return image_gradient.mul_(self.scale / count), text_gradient.div_(count), scale_gradient


def _shift_of_all(images: torch.Tensor, texts: torch.Tensor, scale: float) -> float | None:
    """Collective. The `common_shift` of the global batch."""
    bounds = torch.stack([images.norm(dim=1).max(), texts.norm(dim=1).max(), -_dot(images, texts).min()])
    if world_size() > 1:
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
    image_norm, text_norm, lowest = bounds.tolist()
    return common_shift(scale * image_norm * text_norm, -scale * lowest)


def _dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nd,nd->n", one, other)
