"""Operations and messages of the losses in fake worlds of 8, 256 and 1,024 processes, on a CPU and on a fake GPU.

Their numbers are the same in each world, and their sizes are in `flipscale.objectives.contrastive`.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from engines.test_fake_world import Recorder, fake_world
from objectives.test_tower_gradients import OneProcess
from simulated.fake_gpu import fake_gpu
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flipscale.loop.step import forward_backward
from flipscale.model import FlipOutput
from flipscale.objectives import contrastive, sigmoid
from flipscale.objectives.contrastive import Contrastive, PrecomputedGradients, exchange_bytes, tile_bytes

WORLDS = (8, 256, 1024)
PAIRS, DIM = 40, 8
INFONCE = partial(contrastive._loss_and_gradients, spreads=False, pending=None)
SIGMOID = partial(sigmoid._loss_and_gradients, pending=None)


@contextmanager
def on(device: str) -> Iterator[None]:
    """Compute on a CPU, or on a fake GPU."""
    if device == "cpu":
        yield
        return
    with fake_gpu(lambda _: None, []) as fake_tensors, fake_tensors:
        yield


def recorded(function: partial, world: int, views: int, device: str, rank: int = 1, has_ids: bool = False) -> Recorder:
    """Record a loss with its gradients on one process, with equal captions as positives if it `has_ids`.

    `forward` is called directly, because autograd aborts at fake GPU tensors without a GPU.
    """
    recorder, found = Recorder(), SimpleNamespace()
    with fake_world(rank, world), on(device), torch.no_grad():
        sides = [normalize(torch.randn(PAIRS * n, DIM, device=device), dim=1) for n in (views, 1)]
        head = [torch.full((1,), n, device=device) for n in (10.0, -10.0)]
        inputs = [*sides, *(head if function is SIGMOID else head[:1])]
        ids = torch.arange(PAIRS, device=device) % 7 if has_ids else None
        compute = partial(function, ids=ids) if function is SIGMOID else function
        with recorder:
            loss = PrecomputedGradients.forward(found, compute, torch.float32, *inputs)
        assert [g.shape for g in found.gradients] == [t.shape for t in inputs]
        assert {t.device.type for t in (loss, *found.gradients)} == {device}
    return recorder


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(("function", "has_ids"), [(INFONCE, False), (SIGMOID, False), (SIGMOID, True)])
def test_operations_do_not_grow_with_the_world(function: partial, has_ids: bool, views: int) -> None:
    """On a GPU, whose host launches each. It waits for none of them."""
    first, *others = (recorded(function, world, views, "cuda", has_ids=has_ids) for world in WORLDS)
    last = recorded(function, WORLDS[-1], views, "cuda", rank=WORLDS[-1] - 1, has_ids=has_ids)
    assert all(other.counts == first.counts for other in (*others, last))
    # These are launches and views of tensors.
    assert first.counts.total() <= 60 + 130 * views
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
    assert not [name for name in first.counts if name.split(".")[1] in waits]
    assert first.devices == {"cuda"}


class Products(TorchDispatchMode):
    """Counts the operations of matrix products by their type and the precision of cuBLAS."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        if (name := str(function._overloadpacket).removeprefix("aten.")) in ("mm", "addmm_"):
            left, right = arguments[-2:]
            assert left.dtype == right.dtype == torch.float32
            precision = torch.backends.cuda.matmul.fp32_precision
            self.operations[name, precision] += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("function", "logits"), [(INFONCE, 2), (SIGMOID, 1)])
def test_products_by_precision(function: partial, logits: int, bf16: bool) -> None:
    """Under autocast, gradients take TF32. The logits never do, which torch computes here; a GPU has Triton."""
    before, products = torch.backends.cuda.matmul.fp32_precision, Products()
    torch.set_autocast_enabled("cuda", bf16)  # torch.autocast would look for a GPU
    try:
        with products:
            recorded(function, 8, 1, "cuda")
    finally:
        torch.set_autocast_enabled("cuda", False)
    one = 2 * PAIRS * 8 * PAIRS * DIM
    assert products.operations == {("mm", before): logits * one, ("addmm_", "tf32" if bf16 else before): 2 * one}
    assert torch.backends.cuda.matmul.fp32_precision == before


class TwoLinearTowers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towers, self.scale = torch.nn.Linear(6, 2 * DIM), torch.nn.Parameter(torch.tensor([10.0]))

    def forward(self, inputs: torch.Tensor, return_logits: bool, on_texts: Any = None) -> FlipOutput:
        sides = [normalize(side, dim=1) for side in self.towers(inputs).chunk(2, dim=1)]
        if on_texts is not None:
            on_texts(sides[1])
        return FlipOutput(image_embeds=sides[0], text_embeds=sides[1], logit_scale=self.scale)


@pytest.mark.parametrize("parts", [1, 4])
def test_messages_do_not_grow_with_micro_batches(parts: int) -> None:
    with fake_world(1, 256), Recorder() as recorder:
        batch = [{"inputs": torch.randn(PAIRS // parts, 6)} for _ in range(parts)]
        forward_backward(cast(Any, OneProcess(TwoLinearTowers())), batch, Contrastive())
    assert len(recorder.collectives) == 6


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("world", "views"), [(8, 1), (1024, 2)])
def test_collectives_and_their_sizes(world: int, views: int, device: str) -> None:
    texts, along = PAIRS * DIM, 2 * views * PAIRS
    gather = ("_allgather_base_", texts, world * texts)
    of_gradients = [("alltoall_base_", world * texts), ("_reduce_scatter_base_", texts)][device == "cuda"]
    scatter = (of_gradients[0], world * texts, of_gradients[1])
    bounds = [("allreduce_", 3, 3)] if device == "cpu" else []
    every_text = world * views * PAIRS
    softmax = [*[("allreduce_", every_text, every_text)] * 2, ("_allgather_base_", along, world * along)]
    assert recorded(INFONCE, world, views, device).collectives == [gather, *bounds, *softmax, scatter]
    assert recorded(SIGMOID, world, views, device).collectives == [gather, scatter]
    ids = ("_allgather_base_", PAIRS, world * PAIRS)
    assert recorded(SIGMOID, world, views, device, has_ids=True).collectives == [gather, ids, scatter]


class Held(TorchDispatchMode):
    """Counts the bytes of live results of operations; `peak` is the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize(("world", "views"), [(8, 1), (256, 2)])
def test_memory_of_an_exchange(world: int, views: int) -> None:
    dim, held = 1024, Held()
    with fake_world(1, world), on("cuda"), torch.no_grad():
        images, texts = (torch.empty(PAIRS * n, dim, device="cuda") for n in (views, 1))
        with held:
            scale = torch.ones(1, device="cuda")
            PrecomputedGradients.forward(SimpleNamespace(), INFONCE, torch.float32, images, texts, scale)
    said = exchange_bytes(PAIRS, world, dim, views)
    tile = tile_bytes(PAIRS, PAIRS * world, dim)
    gradients = 4 * PAIRS * dim * views
    assert said + gradients < held.peak < 1.02 * said + 3 * gradients + tile


def test_gpu_tiles_of_few_rows_are_wide() -> None:
    """The number of tiles must grow with the process's part of the matrix, not with the world."""
    logits = 4096 * 8192
    assert tile_bytes(256, 512 * 256, 1024) == 4 * (256 * 1024 + 2 * logits)
    assert tile_bytes(256, 1024 * 256, 1024) == 4 * (256 * 1024 + 2 * logits)
    assert tile_bytes(2**16, 2**16, 512) == 4 * (4096 * 512 + 2 * logits)
    assert tile_bytes(40, 8 * 40, 1024) == 4 * (40 * 1024 + 2 * 40 * 320)
