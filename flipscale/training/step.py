"""The gradients of a step, in one pass over this process's batch or, where that is too large for it, in two."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch

from flipscale.engines.engine import Engine
from flipscale.model import FlipConfig, FlipOutput
from flipscale.objectives.recipe import LossRecipe, pair_loss
from flipscale.objectives.reconstruction import reconstruction_loss

Batch = TypeVar("Batch", bound=dict[str, torch.Tensor])


class Learned(NamedTuple):
    """This process's part of the loss, fp32 `()`, and the `(1,)` inverse temperature it was taken at."""

    loss: torch.Tensor
    logit_scale: torch.Tensor


def one_pass(engine: Engine, batch: Sequence[Batch], recipe: LossRecipe) -> Learned:
    """Collective. Gives the weights the gradients of a batch that is one micro-batch."""
    (whole,) = batch
    output = engine(**whole)
    images, texts, *head = _compared(output)
    loss = pair_loss(images, texts, head, recipe) + reconstruction_loss(output, recipe)
    engine.backward(loss)
    return Learned(loss.detach(), head[0].detach())


def cached(engine: Engine, batch: Sequence[Batch], recipe: LossRecipe) -> Learned:
    """Collective. The same gradients as `one_pass` on all micro-batches together, with the activations of one at a time
    in memory, for one more forward pass (Gao et al. 2021, arXiv 2101.06983).

    All are embedded without activations, the loss gives each embedding its gradient, and a second pass hands that on to
    the weights. Masks and crops are the batch's, so both passes see the same.
    """
    with torch.no_grad():
        outputs = (engine(**micro_batch) for micro_batch in batch)
        first, reconstructions = zip(*((_compared(o), reconstruction_loss(o, recipe)) for o in outputs), strict=True)
    images, texts, *heads = zip(*first, strict=True)
    cache = [torch.cat(images), torch.cat(texts), *(values[0].clone() for values in heads)]
    for part in cache:
        part.requires_grad_()
    loss = pair_loss(cache[0], cache[1], cache[2:], recipe)
    image_gradient, text_gradient, *head_gradients = torch.autograd.grad(loss, cache)
    # Every micro-batch has its share of the head's gradients: all parameters are in every pass.
    shares = [[gradient / len(batch)] * len(batch) for gradient in head_gradients]
    sides = (image_gradient.chunk(len(batch)), text_gradient.chunk(len(batch)))
    for micro_batch, *upstream in engine.accumulate(list(zip(batch, *sides, *shares, strict=True))):
        output = engine(**micro_batch)
        parts = zip(_compared(output), upstream, strict=True)
        of_pairs = torch.stack([(part * gradient).sum() for part, gradient in parts]).sum()
        engine.backward(of_pairs + reconstruction_loss(output, recipe) / len(batch))
    return Learned(loss.detach() + sum(reconstructions) / len(batch), cache[2].detach())


def _compared(output: FlipOutput) -> list[torch.Tensor]:
    """Embeddings of images and texts, `logit_scale`, and `logit_bias` where there is one."""
    parts = (output.image_embeds, output.text_embeds, output.logit_scale, output.logit_bias)
    return [part for part in parts if part is not None]


def gradients(engine: Engine, batch: list[Batch], recipe: LossRecipe) -> Learned:
    """Collective. Gives the weights the gradients of this process's part of a batch, micro-batches of one size, and
    empties it: the next one gathers while the caller still holds this list."""
    learned = (one_pass if len(batch) == 1 else cached)(engine, batch, recipe)
    batch.clear()
    return learned


def check_cacheable(config: FlipConfig) -> None:
    """Nothing, for a model whose two passes over a micro-batch are the same.

    Raises:
        ValueError: it has dropout.
    """
    for name in ("vision_config", "text_config"):
        dropout = getattr(config, name).attention_dropout
        if dropout > 0.0:
            raise ValueError(
                f"model.{name}.attention_dropout is {dropout} and data.micro_batch_size is set: the second pass would "
                "drop other weights than the first; leave one of them out"
            )
