"""`loss.prefix_dims`: the losses of cut embeddings and their gradients, against plain formulas in fp64."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from engines.test_fake_world import fake_world
from objectives import test_contrastive as infonce
from objectives import test_sigmoid as sigmoid
from objectives.test_contrastive import captions_of, check_against_fp64, embeds_of
from objectives.test_teacher import plain_loss as plain_loss_of_teachers
from objectives.test_teacher import teachers_of
from objectives.test_tower_gradients import OneProcess
from objectives.test_world import DIM, INFONCE, PAIRS, Held, TwoLinearTowers, on, recorded
from torch.nn.functional import normalize

from flipscale.engines.launch import Launch
from flipscale.loop.step import forward_backward
from flipscale.objectives.build import build_config
from flipscale.objectives.contrastive import (
    Contrastive,
    Distilled,
    PrecomputedGradients,
    contrastive_loss,
    exchange_bytes,
    prefix_bytes,
    tile_bytes,
)
from flipscale.objectives.sigmoid import sigmoid_loss
from flipscale.planning.flops import pair_flops
from flipscale.planning.memory import loss_bytes
from flipscale.start.complete_recipe import parse_recipe

Loss = Callable[..., torch.Tensor]
DIMS = [1, 5, 16]


def of_prefixes(plain: Loss, dims: list[int]) -> Loss:
    """Return half the loss of whole embeddings, and half the mean of those of cut ones, of unit length again."""

    def loss(images: torch.Tensor, texts: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        cut = [(normalize(images[:, :dim], dim=1), normalize(texts[:, :dim], dim=1)) for dim in dims]
        return (torch.stack([plain(*sides, *others) for sides in cut]).mean() + plain(images, texts, *others)) / 2

    return loss


@pytest.mark.parametrize(
    ("batch", "dim", "dtype", "scale", "noise"),
    [
        (1, 32, torch.float32, 100.0, 0.5),
        (7, 1024, torch.bfloat16, 14.3, 3.0),
        (1031, 33, torch.float32, 1.0, None),
        (1031, 33, torch.float32, 100.0, 0.5),
    ],
)
def test_value_and_gradients(batch: int, dim: int, dtype: torch.dtype, scale: float, noise: float | None) -> None:
    inputs = [*embeds_of(batch, dim, noise, dtype), torch.tensor([scale])]
    check_against_fp64(inputs, partial(contrastive_loss, prefix_dims=DIMS), of_prefixes(infonce.plain_loss, DIMS))
    inputs.append(torch.tensor([-0.5 * scale]))
    check_against_fp64(inputs, partial(sigmoid_loss, prefix_dims=DIMS), of_prefixes(sigmoid.plain_loss, DIMS))


@pytest.mark.parametrize("batch", [7, 300])
def test_several_captions_of_an_image(batch: int) -> None:
    inputs = [*captions_of(batch, 3, 24, 0.5), torch.tensor([30.0])]
    plain = of_prefixes(infonce.plain_loss_of_captions, DIMS)
    check_against_fp64(inputs, partial(contrastive_loss, prefix_dims=DIMS), plain)
    plain = of_prefixes(sigmoid.plain_loss_of_captions, DIMS)
    check_against_fp64([*inputs, torch.tensor([-9.0])], partial(sigmoid_loss, prefix_dims=DIMS), plain)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("batch", [7, 300])
def test_teachers(batch: int, views: int) -> None:
    """At each width, the targets mix the pairs and the teachers' softmax."""
    images, texts = embeds_of(batch, 24, 0.5)
    images = normalize(images.repeat_interleave(views, 0) + 0.1 * torch.randn(batch * views, 24), dim=1)
    teachers, objective = teachers_of(batch, [14.3, 60.0]), Distilled(teacher_weight=0.3, prefix_dims=tuple(DIMS))

    def ours(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return objective.coupled_loss(image, text, logit_scale=scale, teacher_embeds=teachers)

    plain = of_prefixes(partial(plain_loss_of_teachers, teachers=teachers, weight=0.3), DIMS)
    check_against_fp64([images, texts, torch.tensor([30.0])], ours, plain)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_embeddings_are_exchanged_once(device: str) -> None:
    """With two prefixes, only the log-sum-exps of texts are more: those of three widths."""
    world, texts, of_texts = 8, PAIRS * DIM, 3 * 2 * PAIRS
    gather, *_, scatter = recorded(INFONCE, world, 2, device).collectives
    assert gather == ("_allgather_base_", texts, world * texts)
    bounds = [("allreduce_", 3, 3)] if device == "cpu" else []
    sums = [("allreduce_", world * of_texts, world * of_texts)] * 2
    softmax = [*sums, ("_allgather_base_", 2 * of_texts, world * 2 * of_texts)]
    cut = recorded(partial(INFONCE, prefix_dims=[2, 4]), world, 2, device).collectives
    assert cut == [gather, *bounds, *softmax, scatter]


@pytest.mark.parametrize("parts", [1, 4])
def test_micro_batches(parts: int) -> None:
    torch.manual_seed(0)
    model, inputs = TwoLinearTowers().double(), torch.randn(40, 6, dtype=torch.float64)
    batch = [{"inputs": part} for part in inputs.chunk(parts)]
    found = forward_backward(cast(Any, OneProcess(model)), batch, Contrastive(prefix_dims=(2, 5)))
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    output = model(inputs, return_logits=False)
    plain = of_prefixes(infonce.plain_loss, [2, 5])(output.image_embeds, output.text_embeds, output.logit_scale)
    assert found.loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for ours, exact in zip(gradients, torch.autograd.grad(plain, list(model.parameters())), strict=True):
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize(("world", "views"), [(8, 1), (64, 2)])
def test_memory_is_planned(world: int, views: int) -> None:
    pairs, dim, dims, held = 40, 1024, [128, 512], Held()
    with fake_world(1, world), on("cuda"), torch.no_grad():
        images, texts = (torch.empty(pairs * n, dim, device="cuda") for n in (views, 1))
        with held:
            compute, scale = partial(INFONCE, prefix_dims=dims), torch.ones(1, device="cuda")
            PrecomputedGradients.forward(SimpleNamespace(), compute, torch.float32, images, texts, scale)
    said = exchange_bytes(pairs, world, dim, 3 * views) + prefix_bytes(pairs, world, dims, views)
    gradients = 4 * pairs * dim * views
    assert said < held.peak < 1.05 * said + 3 * gradients + tile_bytes(pairs, pairs * world, dim)


def recipe_of(*flags: str) -> Any:
    return parse_recipe(["--config", "small_cpu", *flags])


def test_the_plan_counts_prefixes() -> None:
    whole, cut = recipe_of(), recipe_of("--loss.prefix_dims", "[16, 32]")
    assert pair_flops(cut) == pair_flops(whole)
    (peak, kept), (more, same) = (loss_bytes(recipe, Launch(num_processes=2), 1) for recipe in (whole, cut))
    assert same == kept
    pairs = whole.data.global_batch_size // 2
    assert more - peak == prefix_bytes(pairs, 2, [16, 32]) == 8 * 48 * pairs * 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["[0]"], r"loss.prefix_dims\[0\] is 0"),
        (["[16, WIDTH]"], r"loss.prefix_dims is \[16, WIDTH\] and the embeddings have WIDTH numbers"),
    ],
)
def test_refusals_name_the_field(flags: list[str], message: str) -> None:
    width = str(build_config(recipe_of()).projection_dim)
    with pytest.raises(ValueError, match=message.replace("WIDTH", width)):
        build_config(recipe_of("--loss.prefix_dims", *(flag.replace("WIDTH", width) for flag in flags)))
