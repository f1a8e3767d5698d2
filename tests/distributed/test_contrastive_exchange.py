"""The loss over real processes: its mean and the mean of its gradients are those of the whole batch in fp64."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import processes
import pytest
import torch
import torch.distributed as dist
from objectives import test_contrastive as infonce
from objectives import test_sigmoid as sigmoid
from torch.nn.functional import normalize

from flipscale.objectives.contrastive import PendingGather, contrastive_loss
from flipscale.objectives.sigmoid import sigmoid_loss

WORLDS = (2, pytest.param(4, marks=pytest.mark.long))
Loss = Callable[..., torch.Tensor]


class Case(NamedTuple):
    """A global batch, of which each process has a part of images, texts and ids; and the plain loss of the whole."""

    loss_of: Loss
    plain: Loss
    inputs: list[torch.Tensor]
    ids: torch.Tensor | None = None


def of_views(plain: Loss) -> Loss:
    """Return the mean of the losses of two views of each image, which are neighbouring rows."""
    return lambda images, *others: (plain(images[0::2], *others) + plain(images[1::2], *others)) / 2


def cases() -> dict[str, Case]:
    bias, found = torch.tensor([-7.0]), {}
    for pairs, dim, scale, noise, dtype in (
        (4, 33, 100.0, None, torch.float32),
        (1036, 128, 1.0, 1.0, torch.bfloat16),
        (2300, 512, 30.0, 0.5, torch.float32),
    ):
        inputs = [*infonce.embeds_of(pairs, dim, noise, dtype), torch.tensor([scale])]
        found[f"infonce of {pairs}"] = Case(contrastive_loss, infonce.plain_loss, inputs)
        found[f"sigmoid of {pairs}"] = Case(sigmoid_loss, sigmoid.plain_loss, [*inputs, bias])
    generator = torch.Generator().manual_seed(2)
    many, few = (normalize(torch.randn(n, 16, generator=generator), dim=1) for n in (600, 300))
    head, ids = [torch.tensor([30.0]), bias], infonce.ids_of(300, 5)
    plain_of_ids = of_views(partial(sigmoid.plain_loss_of_ids, ids=ids))
    return {
        **found,
        "infonce of views": Case(contrastive_loss, of_views(infonce.plain_loss), [many, few, head[0]]),
        "sigmoid of views": Case(sigmoid_loss, of_views(sigmoid.plain_loss), [many, few, *head]),
        "sigmoid of ids": Case(sigmoid_loss, plain_of_ids, [many, few, *head], ids),
        "infonce of captions": Case(contrastive_loss, infonce.plain_loss_of_captions, [few, many, head[0]]),
        "sigmoid of captions": Case(sigmoid_loss, sigmoid.plain_loss_of_captions, [few, many, *head]),
    }


NAMES = list(cases())


def one_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = {}
    for name, (loss_of, _, (images, texts, *head), ids) in cases().items():
        mine = [side.chunk(world)[rank].clone() for side in (images, texts)] + [tensor.clone() for tensor in head]
        options = {} if ids is None else {"ids": ids.chunk(world)[rank]}
        loss = loss_of(*(tensor.requires_grad_() for tensor in mine), **options)
        loss.backward()
        found[name] = [loss.detach(), *(tensor.grad for tensor in mine)]
        if "of 2300" in name:
            pending = PendingGather(5)
            for part in mine[1].chunk(5):
                pending.add(part)
            assert torch.equal(loss, loss_of(*mine, pending=pending))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each process found for every case."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    started = [processes.start(one_rank, rank, world, str(folder)) for rank in range(world)]
    assert processes.exit_codes(started) == [0] * world
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_over_processes_is_the_whole_batch(ranks: list[dict], name: str) -> None:
    _, plain, inputs, _ = cases()[name]
    loss = torch.stack([rank[name][0] for rank in ranks]).double().mean()
    # An engine averages gradients over processes; each row's gradient is on one process alone.
    rows = [torch.cat([rank[name][side].double() for rank in ranks]) / len(ranks) for side in (1, 2)]
    head = [torch.stack(values).mean(dim=0) for values in zip(*(rank[name][3:] for rank in ranks), strict=True)]
    for ours, (expected, bound) in zip([loss, *rows, *head], infonce.with_bounds(plain, inputs), strict=True):
        assert ((ours - expected).abs() <= bound).all()
