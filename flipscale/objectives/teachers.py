"""The contrastive loss with soft targets from stored teachers (multi-modal reinforced training, arXiv 2311.17049)."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from flipscale.objectives.contrastive import (
    Contrastive,
    GatheredTexts,
    Matrix,
    PrecomputedGradients,
    common_shift,
    first_pass,
    loss_dtype,
    row_products,
    second_pass,
    views_of,
)


@dataclass(frozen=True, kw_only=True)
class Distilled(Contrastive):
    """The contrastive loss with `teacher_weight` of its targets from teachers.

    InfoNCE's target is one-hot. A teacher's target is its own softmax over the global batch, of images and of texts.
    The targets are averaged over the teachers.
    """

    teacher_weight: float

    @property
    def global_columns(self) -> tuple[str, ...]:
        return ("teacher_embeds",)

    def coupled_loss(self, images: Any, texts: Any, **parameters: Any) -> torch.Tensor:
        """Return the loss, given `teacher_embeds`, fp32 `(batch, teachers, 2, width)`: image and text, whose product is
        the teacher's logit."""
        dtype = loss_dtype(texts)
        teachers = parameters.pop("teacher_embeds").to(dtype)
        compute = functools.partial(loss_difference, teachers=teachers)
        difference = PrecomputedGradients.apply(compute, dtype, images, texts, parameters["logit_scale"])
        return super().coupled_loss(images, texts, **parameters) + self.teacher_weight * difference


def loss_difference(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, teachers: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Collective. Return the loss with the teachers' targets minus that with one-hot targets, fp64 `()`, and its
    gradients of images, texts and scale.

    Both losses have the same log-sum-exps of the student's logits `s`, so their difference is linear in `s` and needs
    no softmax of the student. With `N` pairs, and `W` the sum of the teacher's softmax over texts and that over images,
    it is `(2 trace(s) - sum(W * s)) / 2N`. The weights `W - 2` of pairs and `W` of others are the gradient of the
    teacher's own InfoNCE by its logits. So the two passes of the contrastive loss run over the teacher's tiles, and
    the second multiplies the weights with the student's embeddings.
    """
    count, width = teachers.shape[1], teachers.shape[3]
    own_images, own_texts = (side.unbind(1) for side in teachers.unbind(2))
    # One exchange: each text of the student behind those of the teachers.
    gathered = GatheredTexts(torch.cat([*own_texts, texts], dim=1))
    *of_teachers, all_texts = gathered.rows.split([width] * count + [texts.shape[1]], dim=1)
    one = torch.ones_like(scale)
    matrices = [Matrix(*sides, one, gathered.first) for sides in zip(own_images, of_teachers, strict=True)]
    matrices = [matrix._replace(shift=common_shift([matrix])) for matrix in matrices]
    sums = first_pass(matrices, gathered)
    views = views_of(images, len(texts))
    student = (torch.stack(views).mean(0), all_texts)
    image_gradient, text_gradient = torch.zeros_like(student[0]), all_texts.new_zeros(all_texts.shape)
    second_pass(matrices, sums, gathered, [image_gradient] * count, [text_gradient] * count, student=student)
    part = -1 / (2 * len(texts) * count)
    product = part * row_products(student[0], image_gradient).sum(dtype=torch.float64)
    image_gradient = image_gradient.mul_(scale * part / len(views)).repeat_interleave(len(views), dim=0)
    text_gradient = gathered.sum(text_gradient).mul_(scale * part)
    return scale * product, (image_gradient, text_gradient, product.reshape(1))
