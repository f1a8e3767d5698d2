"""Distillation from teachers: the contrastive loss with the teachers' similarities as targets (arXiv 2311.17049).

Of a pair, InfoNCE's target is the pair alone. A teacher's target is its own softmax over the global batch, of images
and of texts. The loss is `1 - weight` of the one and `weight` of the other, averaged over the teachers. Both parts have
the same log-sum-exps of the student's logits. So the change from InfoNCE is linear in these logits, and needs no
softmax of the student.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from flipscale.objectives import contrastive
from flipscale.objectives.contrastive import Contrastive, workspace_of
from flipscale.objectives.exchange import GatheredTexts
from flipscale.objectives.tiles import LogSumExp, PrecomputedGradients, views_of


@dataclass(frozen=True, kw_only=True)
class Distilled(Contrastive):
    """The contrastive loss with `teacher_weight` of its targets from teachers."""

    teacher_weight: float

    @property
    def coupled_columns(self) -> tuple[str, ...]:
        return ("teacher_embeds",)

    def coupled_loss(self, images: Any, texts: Any, **parameters: Any) -> torch.Tensor:
        teacher_embeds = parameters.pop("teacher_embeds")
        change = change_of_targets(images, texts, parameters["logit_scale"], teacher_embeds)
        return super().coupled_loss(images, texts, **parameters) + self.teacher_weight * change


def change_of_targets(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    teacher_embeds: torch.Tensor,
) -> torch.Tensor:
    """Collective. Return the loss with the teachers' targets minus the loss with the pairs as targets, fp32 `()`.

    As with `contrastive_loss`, the mean over processes belongs to the global batch, gradients are computed along, and
    several views of each image are averaged.

    Args:
        image_embeds, text_embeds, logit_scale: see `contrastive_loss`; a text for each image.
        teacher_embeds: fp32 `(batch, teachers, 2, width)`: image and text, whose product is the teacher's logit.
    """
    dtype = contrastive.loss_dtype(text_embeds)
    compute = functools.partial(_change_and_gradients, teachers=teacher_embeds.to(dtype))
    loss: torch.Tensor = PrecomputedGradients.apply(compute, dtype, image_embeds, text_embeds, logit_scale)
    return loss


def _change_and_gradients(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, teachers: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Collective. Return the change, fp64 `()`, and its gradients by images, texts and scale.

    With `N` pairs, logits `s` of the student, and `W` the sum of the teacher's softmax over texts and that over images,
    the change is `(2 trace(s) - sum(W * s)) / 2N`. The weights `W - 2` of pairs and `W` of others are the gradient of
    the teacher's own InfoNCE by its logits. So the two passes of the contrastive loss run over the teacher's tiles, and
    the second multiplies the weights with the student's embeddings.
    """
    count, width = teachers.shape[1], teachers.shape[3]
    views = views_of(images, len(texts))
    mean_images = torch.stack(views).mean(0)
    own_images, own_texts = ([*side.unbind(1)] for side in teachers.unbind(2))
    # One exchange: each text of the student behind those of the teachers.
    together = GatheredTexts(torch.cat([*own_texts, texts], dim=1))
    first, (*of_teachers, their_texts) = together.first, together.rows.split([width] * count + [texts.shape[1]], dim=1)
    one = torch.ones_like(scale)
    shifts = [contrastive.shift_of_all([a], b, one) for a, b in zip(own_images, own_texts, strict=True)]
    positives = [texts.new_empty(len(texts)) for _ in range(count)]
    image_negatives = [LogSumExp.empty(texts, shift) for shift in shifts]
    text_negatives = [LogSumExp.empty(their_texts, shift) for shift in shifts]
    for rows, columns, *sums, shift in zip(
        own_images, of_teachers, image_negatives, text_negatives, positives, shifts, strict=True
    ):
        contrastive.add_negatives(rows, columns, one, first, shift, *sums, workspace_of(rows, columns))
    sides = [*zip(image_negatives, together.merged(text_negatives), positives, strict=True)]
    image_softmax, text_softmax, of_pairs = contrastive.logit_gradients(sides)

    image_gradient = torch.zeros_like(mean_images)
    text_gradient = texts.new_zeros(their_texts.shape)
    for rows, columns, of_images, of_texts, weights, shift in zip(
        own_images, of_teachers, image_softmax, together.bring(text_softmax), of_pairs, shifts, strict=True
    ):
        weighted = (rows, columns, one, first, shift, of_images, of_texts, weights)
        results = (image_gradient, text_gradient, workspace_of(rows, columns))
        contrastive.add_gradients(*weighted, *results, [mean_images, their_texts])
    text_gradient = together.summed(text_gradient)
    part = -1 / (2 * len(texts) * count)
    product = part * torch.einsum("nd,nd->n", mean_images, image_gradient).sum(dtype=torch.float64)
    image_gradient = image_gradient.mul_(scale * part / len(views)).repeat_interleave(len(views), dim=0)
    return scale * product, (image_gradient, text_gradient.mul_(scale * part), product.reshape(1))
