"""The gradients of a step: in one pass, by accumulation, or in two passes if the batch exceeds the memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

from flipscale.data.randomness import keyed_uniform

if TYPE_CHECKING:
    from flipscale.engines.engine import Engine
    from flipscale.model import FlipOutput
    from flipscale.objectives.objective import Objective

Batch = TypeVar("Batch", bound=dict[str, torch.Tensor])


class StepLoss(NamedTuple):
    """This process's part of the loss, fp32 `()`, and the objective's metrics of its part of the batch."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def seed_dropout(seed: int, step: int) -> None:
    """Seed torch's generators by the recipe's seed and the step, so that a resumed run drops the same."""
    draw = keyed_uniform(seed, "dropout/0", np.array([step]), 1)
    torch.manual_seed(int(draw[0, 0] * 2**53))


def forward_backward(engine: Engine, batch: list[Batch], objective: Objective) -> StepLoss:
    """Collective. Compute the gradients of this process's part of a batch, micro-batches of one size.

    The list is emptied, which frees the batch's memory although the caller holds the list.
    """
    # Arguments of the coupled loss, and of the model.
    coupled: dict[str, Any] = {name: torch.cat([part.pop(name) for part in batch]) for name in objective.global_columns}
    options: dict[str, Any] = {}
    if gather := objective.pending_gather(len(batch)):
        coupled["pending"], options["on_texts"] = gather, gather.add
    compute = two_passes if objective.needs_global_batch and len(batch) > 1 else one_pass
    loss = compute(engine, batch, objective, coupled, options)
    engine.check_gradients()
    batch.clear()
    return loss


def one_pass(
    engine: Engine, batch: Sequence[Batch], objective: Objective, coupled: dict[str, Any], options: dict[str, Any]
) -> StepLoss:
    """Collective. Compute the gradients of one micro-batch, or of several by plain accumulation for a mean of samples.

    Args:
        coupled: keywords of `coupled_loss` for all micro-batches.
        options: keywords of the model besides a batch.
    """
    losses, metrics, squares = [], [], []
    for micro_batch in engine.accumulate(batch):
        output = engine(**micro_batch, **options)
        loss = objective.per_sample_loss(output) / len(batch)
        if objective.needs_global_batch:
            rows, parameters = objective.loss_inputs(output), objective.parameters(output)
            with engine.autocast():
                rest = objective.coupled_loss(*rows, **parameters, **coupled)
        else:
            rest = _zero_of_the_rest(output, objective)
        metrics.append(_copied_metrics(output, objective))
        engine.backward(loss + rest)
        losses.append((loss + rest).detach())
        squares.append(objective.gradient_squares(output))
    return StepLoss(torch.stack(losses).sum(), {**_mean_metrics(metrics), **_gradient_norms(squares)})


def two_passes(
    engine: Engine, batch: Sequence[Batch], objective: Objective, coupled: dict[str, Any], options: dict[str, Any]
) -> StepLoss:
    """Collective. Compute the gradients of all micro-batches, with one micro-batch's activations in memory at a time
    (Gao et al. 2021, arXiv 2101.06983). The arguments are those of `one_pass`.

    The first pass embeds all micro-batches without activations, and the loss gives each embedding its gradient. The
    second pass passes these gradients on to the weights. Masks and crops are part of the batch, so both passes see the
    same images.
    """
    embedded, means, metrics, squares = [], [], [], []
    with torch.no_grad():
        for micro_batch in batch:
            output = engine(**micro_batch, **options)
            embedded.append(objective.loss_inputs(output))
            # Copies, because a sharding engine frees a parameter's memory.
            parameters = {name: value.clone() for name, value in objective.parameters(output).items()}
            metrics.append(_copied_metrics(output, objective))
            means.append(objective.per_sample_loss(output))
    rows = [torch.cat(parts) for parts in zip(*embedded, strict=True)]
    # The second pass needs their memory.
    del output, embedded
    cache = [*rows, *parameters.values()]
    for tensor in cache:
        tensor.requires_grad_()
    with engine.autocast():
        loss = objective.coupled_loss(*rows, **parameters, **coupled)
    gradients = torch.autograd.grad(loss, cache, allow_unused=True)
    # All parameters are in every pass, so each micro-batch gets an equal part of their gradients.
    unused = [None] * len(batch)
    of_rows = [unused if g is None else g.chunk(len(batch)) for g in gradients[: len(rows)]]
    of_parameters = [unused if g is None else [g / len(batch)] * len(batch) for g in gradients[len(rows) :]]
    for micro_batch, *handed in engine.accumulate(list(zip(batch, *of_rows, *of_parameters, strict=True))):
        output = engine(**micro_batch)
        values = [*objective.loss_inputs(output), *objective.parameters(output).values()]
        products = [(value * g).sum() for value, g in zip(values, handed, strict=True) if g is not None]
        engine.backward(torch.stack(products).sum() + objective.per_sample_loss(output) / len(batch))
        squares.append(objective.gradient_squares(output))
    loss = loss.detach() + torch.stack(means).sum() / len(batch)
    return StepLoss(loss, {**_mean_metrics(metrics), **_gradient_norms(squares)})


def _copied_metrics(output: FlipOutput, objective: Objective) -> dict[str, torch.Tensor]:
    """Return copies of the metrics in fp64, because `forward` may return a parameter itself, whose memory a sharding
    engine frees after the backward pass."""
    metrics = objective.metrics(output).items()
    return {name: value.detach().to(torch.float64, copy=True).squeeze() for name, value in metrics}


def _mean_metrics(metrics: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean over micro-batches; in fp64, the mean of equal numbers is that number."""
    return {name: torch.stack([part[name] for part in metrics]).mean() for name in metrics[0]}


def _gradient_norms(squares: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return gradient norms in fp64 from the micro-batches' sums of squares."""
    return {name: torch.stack([part[name] for part in squares]).double().sum().sqrt() for name in squares[0]}


def _zero_of_the_rest(output: FlipOutput, objective: Objective) -> torch.Tensor:
    """Return 0 with a gradient of 0 for outputs that the loss leaves out, because engines expect all gradients."""
    values = [*objective.loss_inputs(output), *objective.parameters(output).values()]
    return 0.0 * torch.stack([value.float().sum() for value in values]).sum() if values else torch.zeros(())
