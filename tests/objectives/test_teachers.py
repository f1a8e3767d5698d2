"""Targets from teachers: the loss and its gradients, against plain formulas in fp64 and open_clip's own loss."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from engines.test_fake_world import Recorder, fake_world
from objectives.test_contrastive import check_against_fp64, embeds_of
from objectives.test_world import INFONCE, Held, on
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from flipscale.engines.launch import Launch
from flipscale.objectives.contrastive import PrecomputedGradients
from flipscale.objectives.teachers import Distilled, loss_difference
from flipscale.planning.memory import loss_bytes
from flipscale.start.complete_recipe import parse_recipe


def teachers_of(batch: int, scales: list[float], width: int = 40, noise: float = 1.0) -> torch.Tensor:
    """Teachers' embeddings of a batch, fp32 `(batch, teachers, 2, width)`; the second teacher has half the width."""
    both = torch.zeros(batch, len(scales), 2, width)
    for number, scale in enumerate(scales):
        images, other = torch.randn(2, batch, width // (number + 1), generator=torch.Generator().manual_seed(number))
        both[:, number, 0, : images.shape[1]] = scale * normalize(images, dim=1)
        both[:, number, 1, : images.shape[1]] = normalize(images + noise * other, dim=1)
    return both


def plain_loss(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, teachers: torch.Tensor, weight: float
) -> torch.Tensor:
    """The mean of both directions' cross-entropies with targets that mix the pairs and the teachers' softmax."""
    losses = []
    for view in image.unflatten(0, (len(text), -1)).unbind(1):
        student = scale * view @ text.T
        for teacher in teachers.double().unbind(1):
            logits = teacher[:, 0] @ teacher[:, 1].T
            for dim in (0, 1):
                target = (1 - weight) * torch.eye(len(text)) + weight * logits.softmax(dim)
                losses.append(-(target * student.log_softmax(dim)).sum() / len(text))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("batch", "dim", "views", "scales", "weight", "noise"),
    [
        (1, 32, 1, [100.0], 1.0, None),
        (7, 32, 3, [14.3, 60.0], 0.3, 0.5),
        (257, 96, 1, [100.0], 1.0, None),
        (1531, 128, 2, [14.3, 60.0], 0.3, 0.5),
    ],
)
def test_value_and_gradients(
    batch: int, dim: int, views: int, scales: list[float], weight: float, noise: float | None
) -> None:
    images, texts = embeds_of(batch, dim, noise)
    images = normalize(images.repeat_interleave(views, 0) + 0.1 * torch.randn(batch * views, dim), dim=1)
    teachers, objective = teachers_of(batch, scales), Distilled(teacher_weight=weight)

    def ours(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return objective.coupled_loss(image, text, logit_scale=scale, teacher_embeds=teachers)

    check_against_fp64([images, texts, torch.tensor([30.0])], ours, lambda *three: plain_loss(*three, teachers, weight))


@pytest.mark.parametrize("contradicts", [False, True])
def test_it_is_open_clip_s_loss(contradicts: bool) -> None:
    """Also where a teacher's pairs are opposites, so that its logits have no common shift."""
    loss = pytest.importorskip("open_clip.loss").DistillClipLoss()
    (images, texts), teachers, scale = embeds_of(300, 64, 1.0), teachers_of(300, [80.0], 64), torch.tensor([50.0])
    if contradicts:
        teachers[::3, :, 1] = -teachers[::3, :, 0] / 80
    theirs = loss(images, texts, scale, *(teachers[:, 0] / torch.tensor([80.0, 1.0])[:, None]).unbind(1), 80.0)
    ours = Distilled(teacher_weight=0.4).coupled_loss(images, texts, logit_scale=scale, teacher_embeds=teachers)
    assert ours.item() == pytest.approx((0.6 * theirs[0] + 0.4 * theirs[1]).item(), abs=1e-6)


def ran(world: int, device: str, held: TorchDispatchMode, pairs: int = 40, dim: int = 8, width: int = 12) -> None:
    """Run the difference that two teachers make, and then the contrastive loss, on one process of a fake world."""
    both = [SimpleNamespace() for _ in range(2)]
    with fake_world(world - 1, world), on(device), torch.no_grad():
        sides = [normalize(torch.randn(pairs, dim, device=device), dim=1) for _ in range(2)]
        inputs = [*sides, torch.full((1,), 10.0, device=device)]
        teachers = torch.randn(pairs, 2, 2, width, device=device)
        with held:
            difference = partial(loss_difference, teachers=teachers)
            PrecomputedGradients.forward(both[0], difference, torch.float32, *inputs)
            if isinstance(held, Held):
                PrecomputedGradients.forward(both[1], INFONCE, torch.float32, *inputs)
    assert [gradient.shape for gradient in both[0].gradients] == [each.shape for each in inputs]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_messages_do_not_grow_with_the_world(device: str) -> None:
    recorders = {world: Recorder() for world in (8, 256)}
    for world, recorder in recorders.items():
        ran(world, device, recorder)
        rows, along = 40 * (2 * 12 + 8), 2 * 2 * 40
        bounds = [("allreduce_", 3, 3)] * 2 if device == "cpu" else []
        softmax = [("allreduce_", world * along // 2, world * along // 2)] * 2
        softmax += [("_allgather_base_", along, world * along)]
        of_gradients = ("alltoall_base_", world * 320) if device == "cpu" else ("_reduce_scatter_base_", 320)
        gather, scatter = ("_allgather_base_", rows, world * rows), (of_gradients[0], world * 320, of_gradients[1])
        assert recorder.collectives == [gather, *bounds, *softmax, scatter]
    if device == "cuda":
        assert recorders[8].counts == recorders[256].counts
        assert recorders[256].devices == {"cuda"}, "the host waits"


@pytest.mark.parametrize("world", [1, 256])
def test_the_dry_run_counts_the_teachers_rows(world: int) -> None:
    """Of two teachers whose folders are elsewhere, so that their embeddings are taken to be as wide as the model's."""
    recipe = parse_recipe(["--config", "b16_cc3m", "--data.teachers", "[a, b]", "--data.global_batch_size", "40960"])
    said, kept = loss_bytes(recipe, Launch(num_processes=world), 1)
    held = Held()
    ran(world, "cuda", held, 40960 // world, 512, 512)
    assert 0.7 * held.peak < said < 1.3 * held.peak
    assert kept == 2 * 4 * 512 * 2 * 40960 // world
