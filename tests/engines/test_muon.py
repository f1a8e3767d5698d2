"""Muon's steps are torch.optim.Muon's."""

import pytest
import torch
from torch import nn

from flipscale.engines.muon import Muon, orthogonalise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_are_torch_s(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (16, 8), (8, 16), *[(8, 8)] * 9]
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    ours_optimizer = Muon(ours, weight_decay=0.1, momentum=0.95, dtype=dtype)
    theirs_optimizer = torch.optim.Muon(theirs, weight_decay=0.1, momentum=0.95)
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in (ours_optimizer, theirs_optimizer):
            optimizer.param_groups[0]["lr"] = 0.01
            optimizer.step()
    # torch's iteration is bf16: 2^-8 of an update of 0.01 * sqrt(2) at most.
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 3 * 0.015 * 2**-6


def test_singular_values_come_near_one() -> None:
    matrices = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3
