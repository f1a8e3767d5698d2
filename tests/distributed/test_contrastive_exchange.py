"""The loss over real processes: its mean and the mean of its gradients are those of the whole batch in fp64."""

from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import normalize

from flipscale.training.contrastive import contrastive_loss
from flipscale.training.exchange import EXCHANGES


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


class Embedder(torch.nn.Module):
    """Two linear towers and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.towers = torch.nn.ModuleList([torch.nn.Linear(24, 16), torch.nn.Linear(24, 16)])
        self.logit_scale = torch.nn.Parameter(torch.tensor([3.0]))

    def forward(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        embeds = [normalize(tower(side), dim=1) for tower, side in zip(self.towers, inputs, strict=True)]
        return [*embeds, self.logit_scale.exp()]


def towers_input(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, 300, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def written_out(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale * image @ text.T
    pairs = logits.diagonal()
    return ((logits.logsumexp(1) - pairs).mean() + (logits.logsumexp(0) - pairs).mean()) / 2


def one_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = {}
    for number, exchange in product(range(len(CASES)), EXCHANGES):
        image, text, scale = CASES[number].inputs()
        mine = [side.chunk(world)[rank].clone().requires_grad_() for side in (image, text)] + [scale.requires_grad_()]
        loss = contrastive_loss(*mine, exchange=exchange)
        loss.backward()
        found[number, exchange] = [loss.detach(), *(t.grad for t in mine)]
    for exchange in EXCHANGES:
        model = torch.nn.parallel.DistributedDataParallel(Embedder())
        contrastive_loss(*model(towers_input(torch.float32).chunk(world, dim=1)[rank]), exchange=exchange).backward()
        found["ddp", exchange] = [p.grad for p in model.parameters()]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of some processes found for every case."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(one_rank, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.fixture(scope="module")
def exact() -> list[list[torch.Tensor]]:
    """The loss and the gradients of every case, written out in fp64 on one process."""
    found = []
    for case in CASES:
        inputs = [t.double().requires_grad_() for t in case.inputs()]
        loss = written_out(*inputs)
        found.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    return found


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_the_mean_over_processes_is_the_whole_batch(
    ranks: list[dict], exact: list[list[torch.Tensor]], number: int, exchange: str
) -> None:
    mine = [rank[number, exchange] for rank in ranks]
    loss, *gradients = exact[number]
    assert torch.stack([m[0] for m in mine]).double().mean().item() == pytest.approx(loss.item(), rel=1e-6, abs=1e-6)
    # An engine averages gradients over processes; each row's gradient is on one process alone.
    rows = [torch.cat([m[side].double() for m in mine]) / len(ranks) for side in (1, 2)]
    scale = torch.stack([m[3] for m in mine]).mean(dim=0)
    rounding = 2**-8 if CASES[number].dtype == torch.bfloat16 else 0.0
    for ours, theirs in zip([*rows, scale], gradients, strict=True):
        assert ((ours - theirs).abs() <= 1e-5 * theirs.abs().max() + rounding * theirs.abs()).all()


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_ddp_s_average_is_the_whole_batch_s_gradient(ranks: list[dict], exchange: str) -> None:
    model = Embedder().double()
    written_out(*model(towers_input(torch.float64))).backward()
    for rank in ranks:
        for ours, parameter in zip(rank["ddp", exchange], model.parameters(), strict=True):
            assert (ours - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max()
