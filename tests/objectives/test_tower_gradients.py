"""The gradient norms of two losses on the image tower, against autograd."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import pytest
import torch
from objectives import test_captioning, test_reconstruction

from flipscale.engines.engine import Engine
from flipscale.loop.step import forward_backward
from flipscale.objectives import captioning, reconstruction
from flipscale.objectives.captioning import WithCaptions
from flipscale.objectives.contrastive import Contrastive
from flipscale.objectives.objective import Objective
from flipscale.objectives.reconstruction import ReconstructingFlipModel, WithReconstruction
from flipscale.objectives.sigmoid import Sigmoid

Inputs = dict[str, torch.Tensor]


class OneProcess:
    """An engine of one process that takes micro-batches."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, **batch: torch.Tensor) -> Any:
        return self.model(**batch, return_logits=False)

    def accumulate(self, batch: list) -> list:
        return batch

    def autocast(self) -> AbstractContextManager:
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def check_gradients(self) -> None:
        """Accept parameters without gradients."""


OBJECTIVES: dict[str, WithCaptions | WithReconstruction] = {
    "caption": WithCaptions(other=Contrastive(), weight=2.0, prediction="mixed"),
    "caption, sigmoid": WithCaptions(other=Sigmoid(), weight=0.5, prediction="mixed"),
    "reconstruction": WithReconstruction(other=Contrastive(), weight=3.0),
}


def build(objective: Objective) -> tuple[Any, Inputs]:
    if isinstance(objective, WithCaptions):
        return test_captioning.build(objective), test_captioning.batch()
    return test_reconstruction.build(ReconstructingFlipModel), test_reconstruction.batch()


def learn(model: Any, inputs: Inputs, objective: Objective, parts: int) -> dict[str, torch.Tensor]:
    chunks = zip(*(value.chunk(parts) for value in inputs.values()), strict=True)
    batch = [dict(zip(inputs, part, strict=True)) for part in chunks]
    return forward_backward(cast(Engine, OneProcess(model)), batch, objective).metrics


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_norms_of_each_loss(name: str, parts: int) -> None:
    objective = OBJECTIVES[name]
    model, inputs = build(objective)
    output = model(**inputs, return_logits=False)
    first = objective.coupled_loss(*objective.loss_inputs(output), **objective.parameters(output))
    tokens = output.vision_model_output.last_hidden_state
    expected = [
        torch.autograd.grad(loss, tokens, retain_graph=True)[0].norm().item()
        for loss in (first, objective.per_sample_loss(output))
    ]
    second = f"{name.partition(',')[0]}_grad_norm"
    found = learn(model, inputs, objective, parts)
    assert [found["contrastive_grad_norm"].item(), found[second].item()] == pytest.approx(expected, rel=1e-5)
    assert min(expected) > 1e-4


MODULES = {"caption": captioning, "reconstruction": reconstruction}


@pytest.mark.parametrize("name", MODULES)
def test_norms_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = OBJECTIVES[name]
    model, inputs = build(objective)
    learn(model, inputs, objective, 1)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    monkeypatch.setattr(MODULES[name], "watch_gradients", lambda tokens, means: (tokens, torch.zeros(2)))
    learn(model, inputs, objective, 1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name
