"""The loss over two real processes: its mean and the mean of its gradients are those of the whole batch."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import normalize

from flipscale.training.contrastive import contrastive_loss


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    embeds = [normalize(torch.randn(12, 16, generator=generator), dim=1) for _ in range(2)]
    return [*embeds, torch.tensor([14.3])]


def one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    image, text, scale = inputs()
    mine = [t[rank * 6 : rank * 6 + 6].clone().requires_grad_() for t in (image, text)] + [scale.requires_grad_()]
    loss = contrastive_loss(*mine)
    loss.backward()
    torch.save([loss.detach(), *(t.grad for t in mine)], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path: Path) -> None:
    whole = [t.requires_grad_() for t in inputs()]
    loss = contrastive_loss(*whole)
    loss.backward()
    mp.spawn(one_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.allclose(torch.stack([r[0] for r in ranks]).mean(), loss.detach(), atol=1e-6)
    # An engine averages gradients over processes; each row's gradient is on one process alone.
    for number in (1, 2):
        rows = torch.cat([r[number] for r in ranks]) / 2
        assert torch.allclose(rows, whole[number - 1].grad, atol=1e-6)
    assert torch.allclose(torch.stack([r[3] for r in ranks]).mean(dim=0), whole[2].grad, atol=1e-6)
