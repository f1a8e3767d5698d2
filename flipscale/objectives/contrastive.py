"""The contrastive loss (InfoNCE) over the whole global batch: exact, in memory that does not grow with its square."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

from flipscale.engines.device import succeeds
from flipscale.objectives import tiles
from flipscale.objectives.exchange import EarlyGather, GatheredTexts, world_size
from flipscale.objectives.objective import Objective
from flipscale.objectives.tiles import (
    LogSumExp,
    PrecomputedGradients,
    Softmax,
    common_shift,
    for_each_block,
    merge,
    views_of,
    workspace,
)

# Up to this many pairs the products are fp64 on a CPU: fp32 resolves a logit near 100 to 4e-6, and few pairs do not
# average that error out. A GPU has its kernels in fp32.
_FEW = 256


@dataclass(frozen=True, kw_only=True)
class Contrastive(Objective):
    """Each pair against the rest of the batch, in both directions (InfoNCE)."""

    takes_captions: ClassVar[bool] = True
    takes_gather: ClassVar[bool] = True

    def chance_loss(self, batch_size: int) -> float:
        # With several captions, an image chooses among all of them, and a caption among the images.
        return math.log(batch_size) + math.log(self.captions_per_image) / 2

    def coupled_loss(self, images: Any, texts: Any, **parameters: Any) -> torch.Tensor:
        return contrastive_loss(images, texts, **parameters)


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    begun: EarlyGather | None = None,
) -> torch.Tensor:
    """Collective. Return the symmetric InfoNCE of this process's pairs against those of all processes, fp32 `()`.

    The mean over processes is the loss of the global batch, and the mean of the gradients is its gradient. Gradients
    are computed along with the loss, so the backward pass exchanges nothing. It must multiply the loss by the same
    number on every process, and can run only once.

    With several views of each image, the loss is the mean over views. Views of one image are not negatives of each
    other. The texts are exchanged once.

    With several captions of each image, the target of an image is spread evenly over its captions, as in
    UniCL (Yang et al. 2022, arXiv 2204.03610). The images are exchanged, not the texts.

    Args:
        image_embeds: `(batch * views, dim)`, of unit length; the views of an image are neighbouring rows.
        text_embeds: `(batch, dim)`, of unit length; the same `batch` on every process. Or `(batch * captions, dim)` for
            `(batch, dim)` images; the captions of an image are neighbouring rows.
        logit_scale: `(1,)`, as `FlipModel.forward` returns it.
        begun: the gather of these texts, if it has begun.
    """
    has_captions = len(text_embeds) > len(image_embeds)
    sides = (text_embeds, image_embeds) if has_captions else (image_embeds, text_embeds)
    is_trained = any(tensor.requires_grad for tensor in (*sides, logit_scale))
    compute = functools.partial(_loss_and_gradients, with_gradients=is_trained, spreads=has_captions, begun=begun)
    loss: torch.Tensor = PrecomputedGradients.apply(compute, loss_dtype(sides[1]), *sides, logit_scale)
    return loss


def _loss_and_gradients(
    images: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    with_gradients: bool,
    spreads: bool,
    begun: EarlyGather | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Collective. Return the loss, fp64 `()`, and the gradients of images, texts and scale.

    This process computes every logit of its own images, view by view, against the texts of all processes. The softmax
    of an image is therefore known here; the softmax of a text is merged from all processes.

    With `spreads`, `images` are several captions of each image, and `texts` are the images. The softmax of an image is
    then over the captions of all views, and its target is spread over its own.
    """
    views, all_texts = views_of(images, len(texts)), GatheredTexts(texts, begun)
    first, columns = all_texts.first, all_texts.rows
    shift = shift_of_all(views, texts, scale)
    positives = [view.new_empty(len(view)) for view in views]
    image_negatives = [LogSumExp.empty(view, shift) for view in views]
    text_negatives = [LogSumExp.empty(columns, shift) for _ in views]
    for view, *sums in zip(views, image_negatives, text_negatives, positives, strict=True):
        add_negatives(view, columns, scale, first, shift, *sums, workspace_of(view, columns))
    text_negatives = all_texts.merged(text_negatives)
    if spreads:
        # In fp64, because the positives of an image compete, and what they leave of each other's gradient is small.
        positives = [scale * _dot(view.double(), texts.double()) for view in views]
        text_negatives = _beside_each(text_negatives, positives, shift)
    sides = [*zip(image_negatives, text_negatives, positives, strict=True)]
    losses = [image.cross_entropy(p) + text.cross_entropy(p) for image, text, p in sides]
    loss = torch.stack(losses).mean() / 2
    if not with_gradients:
        return loss, ()

    image_softmax, text_softmax, positive_gradients = logit_gradients(sides)
    image_gradient = torch.zeros_like(images)
    if spreads:
        # The mean over views divides by their number, but each view has only its part of the one softmax.
        text_softmax = [Softmax(of_text.shift, len(views) * of_text.factor) for of_text in text_softmax]
        positive_gradients = [
            (len(views) - 1 - image.total * of_image.factor - text.total * of_text.factor).to(texts.dtype)
            for (image, text, _), of_image, of_text in zip(sides, image_softmax, text_softmax, strict=True)
        ]
        image_softmax, text_softmax = (
            [Softmax(*(part.to(texts.dtype) for part in one)) for one in softmax]
            for softmax in (image_softmax, text_softmax)
        )
    of_views = [*zip(views, views_of(image_gradient, len(texts)), image_softmax, positive_gradients, strict=True)]
    text_gradient = torch.zeros_like(columns)
    for (view, view_gradient, softmax, of_pairs), of_texts in zip(of_views, all_texts.bring(text_softmax), strict=True):
        results = (view_gradient, text_gradient, workspace_of(view, columns))
        add_gradients(view, columns, scale, first, shift, softmax, of_texts, of_pairs, *results, [])
    text_gradient = all_texts.summed(text_gradient)
    count = 2 * len(images)
    scale_gradient = _dot(images, image_gradient).sum(dtype=torch.float64).reshape(1) / count
    return loss, (image_gradient.mul_(scale / count), text_gradient.div_(count), scale_gradient)


def _beside_each(negatives: list[LogSumExp], positives: list[torch.Tensor], shift: float | None) -> list[LogSumExp]:
    """Return the log-sum-exp of all logits of a text, besides its positive in each view.

    Args:
        negatives: log-sum-exps of the texts' negatives in each view.
        positives: logits of the pairs in each view.
        shift: `common_shift` of all logits, or None.
    """
    both = merge(LogSumExp(*(torch.stack(parts) for parts in zip(*negatives, strict=True))))
    if shift is None:
        both.raise_shift(torch.stack(positives).amax(0))
    own = torch.stack([(positive - both.shift).exp() for positive in positives])
    # Sums without one of them, because a difference would round small ones away.
    others = [torch.cat([own[:view], own[view + 1 :]]).sum(0) for view in range(len(own))]
    return [LogSumExp(both.shift, both.total + rest) for rest in others]


# Each pass over the tiles is one operation to torch. So tracers and fake tensors see two operations a view in any
# world, and need neither a GPU nor a compiler.


@torch.library.custom_op(
    "flipscale::add_negatives", mutates_args=("image_negatives", "text_negatives", "positives", "memory")
)
def add_negatives(
    images: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    first_pair: int,
    shift: float | None,
    image_negatives: Sequence[torch.Tensor],
    text_negatives: Sequence[torch.Tensor],
    positives: torch.Tensor,
    memory: torch.Tensor,
) -> None:
    """Call `tiles.add_negatives` for all tiles of `scale * images @ texts.T`."""
    sums = (LogSumExp(*image_negatives), LogSumExp(*text_negatives), positives, shift)
    for_each_block(tile_functions(images).add_negatives, images, texts, scale, first_pair, memory, *sums)


@torch.library.custom_op("flipscale::add_gradients", mutates_args=("image_gradient", "text_gradient", "memory"))
def add_gradients(
    images: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    first_pair: int,
    shift: float | None,
    image_softmax: Sequence[torch.Tensor],
    text_softmax: Sequence[torch.Tensor],
    positive_gradient: torch.Tensor,
    image_gradient: torch.Tensor,
    text_gradient: torch.Tensor,
    memory: torch.Tensor,
    student: Sequence[torch.Tensor],
) -> None:
    """Call `tiles.add_gradients` for all tiles of `scale * images @ texts.T`."""
    softmax = (Softmax(*image_softmax), Softmax(*text_softmax), positive_gradient)
    sums = (image_gradient, text_gradient, shift, student)
    for_each_block(tile_functions(images).add_gradients, images, texts, scale, first_pair, memory, *softmax, *sums)


def workspace_of(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    return workspace(images, texts, buffers=1 if triton_serves(images) else 2)


def tile_functions(rows: torch.Tensor) -> ModuleType:
    """Return the module that computes the tiles of `rows`: `tiles`, or `contrastive_triton` where it serves them."""
    if not triton_serves(rows):
        return tiles
    from flipscale.objectives import contrastive_triton

    return contrastive_triton


def triton_serves(rows: torch.Tensor) -> bool:
    """Return whether Triton computes the tiles of `rows`: fp32 on a GPU where the kernels compile and run.

    Each process decides by itself: torch's tiles give the same numbers up to rounding.
    """
    if not rows.is_cuda or rows.dtype != torch.float32:
        return False
    if isinstance(rows, FakeTensor):
        return find_spec("triton") is not None
    return _triton_runs_on(rows.device)


@functools.cache
def _triton_runs_on(device: torch.device) -> bool:
    """Try the kernels once. If they fail, one process of each node logs why."""

    def attempt() -> None:
        from flipscale.objectives import contrastive_triton

        contrastive_triton.try_out(device)

    return succeeds(
        attempt,
        "the loss's tiles run in torch, slower than in Triton, because Triton fails",
        "to use it, install the package triton, a C compiler such as gcc, and the headers of this Python",
    )


def loss_dtype(texts: torch.Tensor) -> torch.dtype:
    """Return the precision of the loss for a batch with these `texts` on each process."""
    few = len(texts) * world_size() <= _FEW
    return torch.float64 if few and not texts.is_cuda else torch.float32


def logit_gradients(
    sides: Sequence[tuple[LogSumExp, LogSumExp, torch.Tensor]],
) -> tuple[list[Softmax], list[Softmax], list[torch.Tensor]]:
    """Return the softmax of images, that of texts, and the gradients of the pairs' logits, of each view.

    Args:
        sides: negatives of images and of texts, and the pairs' logits, of each view.
    """
    image_softmax = [image.softmax(pairs) for image, _, pairs in sides]
    text_softmax = [text.softmax(pairs) for _, text, pairs in sides]
    of_pairs = [
        -(image.total * of_image.factor + text.total * of_text.factor)
        for (image, text, _), of_image, of_text in zip(sides, image_softmax, text_softmax, strict=True)
    ]
    return image_softmax, text_softmax, of_pairs


def shift_of_all(views: Sequence[torch.Tensor], texts: torch.Tensor, scale: torch.Tensor) -> float | None:
    """Collective on CPUs. Return the `common_shift` of the global batch; on accelerators always None.

    On an accelerator the host would have to wait for all queued work, and running maxima cost little there.
    """
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
