"""The loss over real processes: its mean and the mean of its gradients are those of the whole batch in fp64."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import processes
import pytest
import torch
import torch.distributed as dist
from objectives.test_contrastive import ids_of, plain_loss
from objectives.test_contrastive import plain_loss_of_captions as infonce_of_captions
from objectives.test_sigmoid import plain_loss as plain_sigmoid
from objectives.test_sigmoid import plain_loss_of_captions as sigmoid_of_captions
from objectives.test_sigmoid import plain_loss_of_ids as plain_sigmoid_of_ids
from torch.nn.functional import normalize

from flipscale.objectives.contrastive import contrastive_loss
from flipscale.objectives.sigmoid import sigmoid_loss


class Case(NamedTuple):
    """A global batch; `noise` relative to the images makes the texts, none makes them unrelated."""

    pairs: int
    dim: int
    scale: float
    noise: float | None
    dtype: torch.dtype

    def inputs(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.pairs)
        images, other = torch.randn(2, self.pairs, self.dim, generator=generator)
        texts = other if self.noise is None else images + self.noise * other
        embeds = [normalize(side, dim=1).to(self.dtype) for side in (images, texts)]
        return [*embeds, torch.tensor([self.scale])]


CASES = [
    Case(4, 32, 14.3, None, torch.float32),
    Case(36, 1024, 100.0, None, torch.bfloat16),
    Case(276, 33, 100.0, None, torch.float32),
    Case(516, 64, 100.0, 1.0, torch.float32),
    Case(1036, 128, 1.0, 1.0, torch.bfloat16),
    Case(2300, 512, 30.0, None, torch.float32),
    Case(4096, 512, 100.0, None, torch.float32),
]


BIAS = torch.tensor([-7.0])
LOSSES = {"infonce": contrastive_loss, "sigmoid": sigmoid_loss}
# Ids of the 300 texts of `views_input`: of a few classes, and with few repetitions.
IDS = {"no ids": None, "few": ids_of(300, 5), "many": ids_of(300, 400)}
VIEWS = [("infonce", "no ids"), *(("sigmoid", known) for known in IDS)]


def views_input() -> list[torch.Tensor]:
    """Two views of each of 300 images, in a row, their texts, a scale and a bias."""
    generator = torch.Generator().manual_seed(2)
    embeds = [normalize(torch.randn(n, 16, generator=generator), dim=1) for n in (600, 300)]
    return [*embeds, torch.tensor([30.0]), BIAS.clone()]


def captions_input() -> list[torch.Tensor]:
    """300 images, two captions of each in a row, a scale and a bias."""
    texts, images, *head = views_input()
    return [images, texts, *head]


def one_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = {}
    for number in range(len(CASES)):
        image, text, scale = CASES[number].inputs()
        mine = [side.chunk(world)[rank].clone().requires_grad_() for side in (image, text)] + [scale.requires_grad_()]
        loss = contrastive_loss(*mine)
        loss.backward()
        found[number, "infonce"] = [loss.detach(), *(t.grad for t in mine)]
        if CASES[number].scale < 100.0:
            mine = [t.detach().clone().requires_grad_() for t in (*mine, BIAS)]
            loss = sigmoid_loss(*mine)
            loss.backward()
            found[number, "sigmoid"] = [loss.detach(), *(t.grad for t in mine)]
    for name, known in VIEWS:
        loss_of, ids = LOSSES[name], IDS[known]
        *sides, scale, bias = views_input()
        mine = [side.chunk(world)[rank].clone() for side in sides] + ([scale, bias] if name == "sigmoid" else [scale])
        my_ids = None if ids is None else ids.chunk(world)[rank]
        loss = loss_of(*(t.requires_grad_() for t in mine), **({} if my_ids is None else {"ids": my_ids}))
        loss.backward()
        found["views", name, known] = [loss.detach(), *(t.grad for t in mine)]
    for name, loss_of in LOSSES.items():
        *sides, scale, bias = captions_input()
        mine = [side.chunk(world)[rank].clone() for side in sides] + ([scale, bias] if name == "sigmoid" else [scale])
        loss = loss_of(*(t.requires_grad_() for t in mine))
        loss.backward()
        found["captions", name] = [loss.detach(), *(t.grad for t in mine)]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of some processes found for every case."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    started = [processes.start(one_rank, rank, world, str(folder)) for rank in range(world)]
    for process in started:
        process.join(300)
    assert [process.exitcode for process in started] == [0] * world
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


Exact = tuple[torch.Tensor, ...]


def exact(loss_of: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> Exact:
    """Return the loss of inputs in fp64, and its gradients."""
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    loss = loss_of(*inputs)
    return loss.detach(), *torch.autograd.grad(loss, inputs)


@cache
def exact_of_case(number: int, name: str) -> Exact:
    """Return them for a case, once for all numbers of processes: in fp64 this takes most of the time."""
    inputs = CASES[number].inputs()
    return exact(plain_sigmoid, [*inputs, BIAS]) if name == "sigmoid" else exact(plain_loss, inputs)


def check(ranks: list[list[torch.Tensor]], expected: Exact) -> None:
    """The mean over `ranks`, each with its loss and gradients, is the loss and the gradients of the whole batch."""
    loss, *gradients = expected
    mean = torch.stack([rank[0] for rank in ranks]).double().mean()
    assert mean.item() == pytest.approx(loss.item(), rel=1e-6, abs=1e-6)
    # An engine averages gradients over processes; each row's gradient is on one process alone.
    rows = [torch.cat([rank[side].double() for rank in ranks]) / len(ranks) for side in (1, 2)]
    head = [torch.stack(values).mean(dim=0) for values in zip(*(rank[3:] for rank in ranks), strict=True)]
    rounding = 2**-8 if ranks[0][1].dtype == torch.bfloat16 else 0.0
    for ours, theirs in zip([*rows, *head], gradients, strict=True):
        assert ((ours - theirs).abs() <= 1e-5 * theirs.abs().max() + rounding * theirs.abs()).all()


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_the_mean_over_processes_is_the_whole_batch(ranks: list[dict], number: int) -> None:
    for name in LOSSES if CASES[number].scale < 100.0 else ["infonce"]:
        check([rank[number, name] for rank in ranks], exact_of_case(number, name))


@pytest.mark.parametrize(("name", "known"), VIEWS)
def test_views_are_the_mean_of_each_view_s_loss(ranks: list[dict], name: str, known: str) -> None:
    loss_of = plain_sigmoid if name == "sigmoid" else plain_loss
    if IDS[known] is not None:
        loss_of = partial(plain_sigmoid_of_ids, ids=IDS[known])

    def mean_of_views(images: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return (loss_of(images[0::2], *others) + loss_of(images[1::2], *others)) / 2

    inputs = views_input() if name == "sigmoid" else views_input()[:3]
    check([rank["views", name, known] for rank in ranks], exact(mean_of_views, inputs))


@pytest.mark.parametrize("name", LOSSES)
def test_several_captions_of_an_image(ranks: list[dict], name: str) -> None:
    inputs, plain = captions_input(), sigmoid_of_captions
    if name != "sigmoid":
        inputs, plain = inputs[:3], infonce_of_captions
    check([rank["captions", name] for rank in ranks], exact(plain, inputs))
