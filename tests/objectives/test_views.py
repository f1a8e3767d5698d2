"""Several masks (views) of one crop: their loss, and runs with views."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import metrics, pretrain
from safetensors.torch import load_file

from flipscale.objectives.contrastive import contrastive_loss

LEARNED = ("loss", "grad_norm", "logit_scale")


def test_the_loss_is_the_mean_over_views() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(n, 16, generator=generator) for n in (3 * 8, 8))
    images, texts = (torch.nn.functional.normalize(t, dim=1).requires_grad_() for t in (images, texts))
    scale = torch.tensor([20.0], requires_grad=True)
    together = contrastive_loss(images, texts, scale)
    gradients = torch.autograd.grad(together, (images, texts, scale))
    apart = sum(contrastive_loss(images[view::3], texts, scale) for view in range(3)) / 3
    assert together.item() == pytest.approx(apart.item(), abs=1e-6)
    for ours, expected in zip(gradients, torch.autograd.grad(apart, (images, texts, scale)), strict=True):
        assert torch.allclose(ours, expected, atol=1e-6)
    # Views of one image are no negatives of each other.
    first = contrastive_loss(images[0::3], texts, scale)
    assert all((g[1::3] == 0).all() and (g[2::3] == 0).all() for g in torch.autograd.grad(first, (images,)))


def run(write_recipe: Callable[..., Path], run_dir: Path, processes: int, **changes: object) -> list[dict]:
    done = pretrain(write_recipe(run_dir, **changes), processes)
    assert done.returncode == 0, done.stderr
    return [record for record in metrics(run_dir) if "loss" in record]


def test_runs_on_one_and_two_processes(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    stages = [
        {"name": "masked", "samples": 64, "mask_ratio": 0.75, "text_mask_ratio": 0.5, "base_lr": 0.012},
        {"name": "unmasked", "samples": 32},
    ]
    changes = {"stages": stages, "mask": {"kind": "grid", "views": 3}}
    one, two = (run(write_recipe, tmp_path / f"{n}", n, **changes) for n in (1, 2))
    assert len(one) == 6
    assert one[0]["images_per_s"] > 0
    for name in LEARNED:
        assert [r[name] for r in two] == pytest.approx([r[name] for r in one], rel=1e-4)
    exported = load_file(tmp_path / "1" / "model" / "model.safetensors")
    assert "vision_model.encoder.layers.0.self_attn.q_proj.weight" in exported
    assert json.loads((tmp_path / "1" / "model" / "config.json").read_text())["model_type"] == "flip"
