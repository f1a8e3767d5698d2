"""The pairwise sigmoid loss (SigLIP, arXiv 2303.15343) over the whole global batch, in memory that does not grow with
its square: each tile of logits is made once, and its gradients are taken before the next one takes its place."""

from functools import partial
from typing import Any

import torch
from torch.nn.functional import softplus

from flipscale.objectives.contrastive_tiles import SimilarityTiles, in_blocks, views_of
from flipscale.objectives.exchange import Rows, exchange_of, summed
from flipscale.objectives.ready_gradients import ReadyGradients


def sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    exchange: str = "gather",
) -> torch.Tensor:
    """Collective. The pairwise sigmoid loss, fp32 `()`: each of this process's images is asked of each text of all
    processes whether it is its own. Summed over the texts and averaged over the images, as SigLIP has it.

    The mean over processes is the loss of the global batch, and the mean of the gradients its gradient. As
    `contrastive_loss`, it makes them along with the loss, and with several views it is the mean over views,
    the texts exchanged once.

    Args:
        image_embeds: `(batch * views, dim)`, of unit length, the views of an image in a row.
        text_embeds: `(batch, dim)`, of unit length, the same `batch` on every process.
        logit_scale, logit_bias: `(1,)`, as `FlipModel.forward` returns them.
        exchange: how the processes' texts meet the images: `gather` or `ring`.
    """
    loss: torch.Tensor = _Sigmoid.apply(image_embeds, text_embeds, logit_scale, logit_bias, exchange)
    return loss


class _Sigmoid(ReadyGradients):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        *tensors, exchange = inputs
        with torch.autocast(tensors[0].device.type, enabled=False):
            images, texts = (side.float() for side in tensors[:2])
            loss, gradients = _loss_and_gradients(images, texts, float(tensors[2]), float(tensors[3]), exchange)
        ctx.gradients = [g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True)]
        return loss.float()


def _loss_and_gradients(
    images: torch.Tensor, texts: torch.Tensor, scale: float, bias: float, exchange: str
) -> tuple[torch.Tensor, Rows]:
    """Collective. The loss, fp64 `()`, and its gradients by images, texts, scale and bias."""
    image_gradient = torch.zeros_like(images)
    # Of each image: its loss, and the sum of the gradients of its logits.
    sums = torch.zeros(len(images), 2, dtype=torch.float64, device=images.device)
    views = list(zip(*(views_of(rows, len(texts)) for rows in (images, image_gradient, sums)), strict=True))

    def contribute(first_pair: int, texts: torch.Tensor) -> Rows:
        text_gradient = torch.zeros_like(texts)
        for view, *found in views:
            work = partial(_add_block, bias, text_gradient, *found)
            in_blocks(view, texts, scale, first_pair, work)
        return (text_gradient,)

    (text_gradient,) = exchange_of(texts, exchange).visit(contribute, summed)
    loss, bias_gradient = sums.sum(0) / len(images)
    scale_gradient = torch.einsum("nd,nd->n", images, image_gradient).sum(dtype=torch.float64) / len(images)
    gradients = (image_gradient.mul_(scale / len(images)), text_gradient.div_(len(images)))
    return loss, (*gradients, scale_gradient.reshape(1), bias_gradient.reshape(1))


def _add_block(
    bias: float,
    text_gradient: torch.Tensor,
    image_gradient: torch.Tensor,
    sums: torch.Tensor,
    tiles: SimilarityTiles,
    rows: slice,
    columns: slice,
) -> None:
    image_gradient, text_gradient, sums = image_gradient[rows], text_gradient[columns], sums[rows]
    for tile in tiles:
        tile.logits.add_(bias)
        # -log sigmoid(logit) of a pair and -log sigmoid(-logit) of any other are one function of these.
        tile.pairs.neg_()
        weights = torch.sigmoid(tile.logits, out=tiles.beside(tile))
        tiles.pairs_of(weights, tile).neg_()
        sums[tile.rows, 0] += softplus(tile.logits).sum(1)
        sums[tile.rows, 1] += weights.sum(1)
        tiles.add_products(tile, weights, image_gradient, text_gradient)
