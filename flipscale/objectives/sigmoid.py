"""The pairwise sigmoid loss (SigLIP, arXiv 2303.15343) over the whole global batch.

Memory does not grow with the batch's square: a tile of logits gives its gradients before the next overwrites it.
"""

import copy
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from flipscale.model import FlipConfig
from flipscale.objectives import contrastive


@dataclass(frozen=True, kw_only=True)
class Sigmoid(contrastive.PairLoss):
    """A binary decision for each image and each text of the batch: pair or not. The model has a `logit_bias`."""

    def model_config(self, config: FlipConfig) -> FlipConfig:
        config = copy.deepcopy(config)
        # SigLIP's initial values. Nearly all combinations are negatives, and the bias starts them as negatives.
        config.logit_scale_init_value, config.logit_bias_init_value = math.log(10.0), -10.0
        return config

    def chance_loss(self, batch_size: int) -> float:
        # Each decision gives a pair the probability 1 / batch_size.
        return math.log(batch_size) - (batch_size - 1) * math.log1p(-1 / batch_size) if batch_size > 1 else 0.0

    def coupled_loss(self, images: Any, texts: Any, **parameters: Any) -> torch.Tensor:
        ids = parameters.pop("caption_ids", None)
        return sigmoid_loss(images, texts, ids=ids, **parameters)


def sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    ids: torch.Tensor | None = None,
    pending: contrastive.PendingGather | None = None,
) -> torch.Tensor:
    """Collective. Return the pairwise sigmoid loss of this process's images against all processes' texts, fp32 `()`.

    As in SigLIP, it is summed over the texts and averaged over the images. Means, views and the other arguments are
    those of `contrastive_loss`; `logit_bias` is `(1,)`, as `FlipModel.forward` returns it. An image and a text of pairs
    with equal `ids` match. With several captions of each image, all of them match, and the loss is their mean too.
    """
    if len(text_embeds) > len(image_embeds):
        # To an image, its captions are what its views are to a text.
        image_embeds, text_embeds = text_embeds, image_embeds
    compute = functools.partial(_loss_and_gradients, ids=ids, pending=pending)
    tensors = (image_embeds, text_embeds, logit_scale, logit_bias)
    loss: torch.Tensor = contrastive.PrecomputedGradients.apply(compute, torch.float32, *tensors)
    return loss


def _loss_and_gradients(
    images: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    ids: torch.Tensor | None,
    pending: contrastive.PendingGather | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Collective. Return the loss, fp64 `()`, and the gradients of images, texts, scale and bias."""
    gathered = contrastive.GatheredTexts(texts, pending)
    both_ids = None if ids is None else (ids, contrastive.GatheredTexts(ids).rows)
    image_gradient, text_gradient = torch.zeros_like(images), torch.zeros_like(gathered.rows)
    # Columns: each image's loss, and the sum of its logits' gradients.
    sums = torch.zeros(len(images), 2, dtype=torch.float64, device=images.device)
    for view, *results in zip(
        *(contrastive.views_of(side, len(texts)) for side in (images, sums, image_gradient)), strict=True
    ):
        matrix = contrastive.Matrix(view, gathered.rows, scale, gathered.first)
        fused = contrastive.triton_serves(view)
        contrastive.for_each_tile(_add_tile, matrix, bias, both_ids, *results, text_gradient, fused=fused)
    count = len(images)
    loss, bias_gradient = sums.sum(0) / count
    scale_gradient = contrastive.row_products(images, image_gradient).sum(dtype=torch.float64) / count
    image_gradient.mul_(scale / count)
    text_gradient = gathered.sum(text_gradient).div_(count)
    return loss, (image_gradient, text_gradient, scale_gradient.reshape(1), bias_gradient.reshape(1))


def _add_tile(
    tile: contrastive.Tile,
    bias: torch.Tensor,
    ids: tuple[torch.Tensor, torch.Tensor] | None,
    sums: torch.Tensor,
    image_gradient: torch.Tensor,
    text_gradient: torch.Tensor,
) -> None:
    logit_gradient = tile.spare
    tile_ids = None if ids is None else (ids[0][tile.rows], ids[1][tile.columns])
    if tile.fused:
        from flipscale.objectives import contrastive_triton

        parts = contrastive_triton.block_decisions(
            tile.scaled, tile.others, tile.first_pair, bias, tile_ids, logit_gradient
        )
        sums[tile.rows] += parts.sum(1, dtype=torch.float64).t()
    else:
        losses = _losses(tile, bias, tile_ids)
        sums[tile.rows, 0] += losses.sum(1)
        sums[tile.rows, 1] += logit_gradient.sum(1)
    tile.add_products(logit_gradient, image_gradient, text_gradient)


def _losses(tile: contrastive.Tile, bias: torch.Tensor, ids: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Return the losses of a tile in place of its logits, and write their gradients to its spare memory."""
    tile.logits.add_(bias)
    # With the positives negated, one function, softplus, gives the losses of positives and negatives.
    if ids is not None:
        signs = 1 - 2 * (ids[0][:, None] == ids[1]).to(torch.int8)
        torch.sigmoid(tile.logits.mul_(signs), out=tile.spare).mul_(signs)
    else:
        tile.pairs(tile.logits).neg_()
        tile.pairs(torch.sigmoid(tile.logits, out=tile.spare)).neg_()
    losses: torch.Tensor = torch.ops.aten.softplus.out(tile.logits, out=tile.logits)
    return losses
