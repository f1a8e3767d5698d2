"""The contrastive loss on one process, against a plain formula in fp64."""

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.nn.functional import normalize
from torch.overrides import TorchFunctionMode

from flipscale.objectives import contrastive
from flipscale.objectives.contrastive import contrastive_loss
from flipscale.objectives.sigmoid import sigmoid_loss


def plain_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Sum the negatives without the positive, because a difference of both would round a learned loss to 0."""
    logits, pairs = scale * image @ text.T, torch.eye(len(image), dtype=torch.bool)
    negatives, positives = logits.masked_fill(pairs, -torch.inf), logits.diagonal()
    return sum((negatives.logsumexp(dim) - positives).logaddexp(torch.zeros(())).mean() for dim in (0, 1)) / 2


def plain_loss_of_captions(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The cross-entropies of images, with targets spread over their captions, and of captions."""
    owner = torch.arange(len(text)) // (len(text) // len(image))
    logits, own = scale * image @ text.T, (torch.arange(len(image))[:, None] == owner).double()
    of_images = -(own / own.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    return (of_images - (own * logits.log_softmax(0)).sum(0).mean()) / 2


def captions_of(batch: int, captions: int, dim: int, noise: float | None) -> list[torch.Tensor]:
    """Images and several texts of each, as `embeds_of`."""
    images, texts = embeds_of(batch * captions, dim, None)
    images = images[:batch]
    if noise is not None:
        texts = normalize(images.repeat_interleave(captions, dim=0) + noise * texts, dim=1)
    return [images, texts]


def ids_of(batch: int, count: int) -> torch.Tensor:
    """Ids of a batch, as far apart as hashes are, of which about `count` differ."""
    drawn = torch.randint(count, (batch,), generator=torch.Generator().manual_seed(batch))
    return (drawn - count // 2) * 1_234_567_890_123


def embeds_of(batch: int, dim: int, noise: float | None, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Images and texts of unit length. Texts are images plus relative `noise`, or unrelated with None."""
    images, other = torch.randn(2, batch, dim, generator=torch.Generator().manual_seed(batch))
    texts = other if noise is None else images + noise * other
    return [normalize(side, dim=1).to(dtype) for side in (images, texts)]


def leaves_of(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.clone().requires_grad_() for t in inputs]


def signs_of(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(2, shape, generator=generator) * 2 - 1


class _Rounded(torch.autograd.Function):
    """A product in fp64, and its gradients, with errors as large as fp32's.

    The sum of n products errs by about sqrt(n) / 2**24 of the sum of their sizes (Higham and Mary 2019), in any order.
    So do the sums of a softmax, and with them the gradients of its logits, all in one direction if its rows are alike.
    """

    @staticmethod
    def forward(ctx, one: torch.Tensor, other: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        ctx.save_for_backward(one, other)
        ctx.generator = generator
        return _Rounded.product(one, other, generator)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        one, other = ctx.saved_tensors
        gradient = gradient + max(gradient.shape) ** 0.5 * 2**-24 * gradient.abs() * signs_of((), ctx.generator)
        sides = ((gradient, other.T), (one.T, gradient))
        return *(_Rounded.product(*side, ctx.generator) for side in sides), None

    @staticmethod
    def product(one: torch.Tensor, other: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        sizes = one.abs() @ other.abs()
        return one @ other + one.shape[1] ** 0.5 * 2**-24 * sizes * signs_of(sizes.shape, generator)


class _Fp32Products(TorchFunctionMode):
    """A context in which every product of fp64 matrices is `_Rounded`."""

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul):
            return _Rounded.apply(*args, self.generator)
        return function(*args, **(kwargs or {}))


def with_bounds(plain: Callable, inputs: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return a loss in fp64 and each of its gradients, with what fp32 may err by.

    The errors of the logits, and the cancellation in the gradients, are those of this very batch: the formula runs
    again with `_Rounded` products. Each result is also rounded to its type. The effect on a number, such as the loss,
    may be small by chance. So it is the largest of four runs, and the bound is four times that.
    """
    exact, runs = [tensor.double().requires_grad_() for tensor in inputs], []
    for context in (nullcontext(), *map(_Fp32Products, range(4))):
        with context:
            loss = plain(*exact)
        runs.append([loss.detach(), *torch.autograd.grad(loss, exact)])
    found, *runs = runs
    bounds = []
    for place, value in enumerate(found):
        effect = max((rounded[place] - value).abs().max() for rounded in runs)
        dtype = torch.float32 if place == 0 else inputs[place - 1].dtype
        bounds.append(4 * effect + 2 * torch.finfo(dtype).eps * value.abs())
    return list(zip(found, bounds, strict=True))


def floors_of(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> list[float]:
    """Return what underflow may change in the loss and in each gradient of pairs, so that no product is denormal.

    Exponents are at least -80 below the common shift, which is at most the largest logit and at most 50 above any
    positive. A gradient of a logit below 1e-30 becomes 0. Each row and each column sums these for all pairs, and the
    positive takes their sum. Means over pairs follow.
    """
    images, texts, pairs = images.double(), texts.double(), len(images)
    highest = images.norm(dim=1).max() * texts.norm(dim=1).max()
    spread = scale.item() * (highest - (images * texts).sum(dim=1).min()).item()
    clamped = math.exp(min(spread, 50.0) - 80.0)
    least = clamped + 1e-30
    return [pairs * clamped, *[2 * scale.item() * least] * 2, 2 * pairs * least]


def check_against_fp64(
    inputs: list[torch.Tensor],
    loss_of: Callable = contrastive_loss,
    plain: Callable = plain_loss,
    floors: Sequence[float] = (),
) -> None:
    ours = leaves_of(inputs)
    loss = loss_of(*ours)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(leaf.grad.dtype == leaf.dtype for leaf in ours)
    results = [loss.detach(), *(leaf.grad for leaf in ours)]
    bounded = zip(results, with_bounds(plain, inputs), floors or [0.0] * len(results), strict=True)
    for result, (expected, bound), floor in bounded:
        assert ((result - expected).abs() <= bound + floor).all()


# Scale of the logits, and noise of the texts: unrelated, learning, learned and well learned.
STATES = [(1.0, None), (14.3, None), (14.3, 3.0), (100.0, None), (100.0, 0.5), (100.0, 0.05)]


@pytest.mark.parametrize(
    ("batch", "dim", "dtype", "scale", "noise"),
    [
        *((257, 96, torch.float32, *state) for state in STATES),
        *((7, 1024, torch.bfloat16, *state) for state in STATES[::2]),
        (1, 32, torch.float32, *STATES[4]),
        (1531, 33, torch.bfloat16, *STATES[4]),
    ],
)
def test_value_and_gradients(batch: int, dim: int, dtype: torch.dtype, scale: float, noise: float | None) -> None:
    inputs = [*embeds_of(batch, dim, noise, dtype), torch.tensor([scale])]
    check_against_fp64(inputs, floors=floors_of(*inputs))


@pytest.mark.parametrize(("scale", "noise"), [(1.0, None), (14.3, 3.0), (100.0, 0.5)])
@pytest.mark.parametrize(("batch", "dim", "captions"), [(1, 32, 2), (7, 32, 5), (257, 96, 2)])
def test_several_captions_of_an_image(batch: int, dim: int, scale: float, noise: float | None, captions: int) -> None:
    inputs = [*captions_of(batch, captions, dim, noise), torch.tensor([scale])]
    check_against_fp64(inputs, contrastive_loss, plain_loss_of_captions)


@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_captions_that_contradict_each_other(scale: float) -> None:
    """One caption of an image is its opposite, so no common shift exists and the positives lie 200 apart."""
    images, texts = captions_of(300, 3, 16, 0.1)
    texts[::3] *= -1
    check_against_fp64([images, texts, torch.tensor([scale])], contrastive_loss, plain_loss_of_captions)


@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_opposite_pairs(scale: float) -> None:
    """No common shift exists for rows whose largest logits are 200 apart."""
    images, texts = embeds_of(300, 16, 0.1)
    texts[:150] = -texts[:150]
    images[150:] = images[:150].roll(1, dims=0)
    check_against_fp64([images, texts, torch.tensor([scale])])


@pytest.fixture
def threads() -> Callable[[int], None]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("count", "scale"), [(2, 20.0), (4, 100.0)])
def test_blocks_run_on_threads(
    count: int, scale: float, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each product waits until all blocks compute one, which is possible only with a thread each."""
    monkeypatch.setattr(contrastive, "_BLOCK", 100)
    all_blocks = threading.Barrier(count, timeout=60)
    product = torch.mm

    def waiting_product(*factors: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        all_blocks.wait()
        return product(*factors, out=out)

    monkeypatch.setattr(torch, "mm", waiting_product)
    threads(count)
    inputs = [*embeds_of(1031, 64, 1.0), torch.tensor([scale])]
    check_against_fp64(inputs)
    assert torch.get_num_threads() == count
    once, again = (torch.autograd.grad(contrastive_loss(*leaves), leaves) for leaves in [leaves_of(inputs)] * 2)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("noise", [0.05, 1.0])
@pytest.mark.parametrize("loss_of", [contrastive_loss, partial(sigmoid_loss, logit_bias=torch.tensor([-10.0]))])
def test_products_without_denormals(
    loss_of: Callable[..., torch.Tensor], noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Denormals make a product take 200 times as long on a CPU."""
    smallest = []
    product = torch.Tensor.addmm_

    def observed(into: torch.Tensor, weights: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        smallest.append(weights[weights != 0].abs().min().item())
        return product(into, weights, other)

    monkeypatch.setattr(torch.Tensor, "addmm_", observed)
    images, texts = embeds_of(300, 64, noise)
    loss = loss_of(images.requires_grad_(), texts, torch.tensor([100.0]))
    loss.backward()
    assert loss.isfinite()
    assert len(smallest) == 2
    assert min(smallest) >= torch.finfo(torch.float32).tiny


def test_upstream_gradient_autocast_and_nan() -> None:
    embeds, scale = embeds_of(300, 16, 1.0), torch.tensor([10.0])
    once, thrice = (
        torch.autograd.grad(factor * contrastive_loss(*leaves), leaves)
        for factor, leaves in ((1, leaves_of([*embeds, scale])), (3, leaves_of([*embeds, scale])))
    )
    assert all(torch.allclose(3 * a, b) for a, b in zip(once, thrice, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrastive_loss(*embeds, scale)
    assert torch.equal(inside, contrastive_loss(*embeds, scale)), "the loss must be fp32 under autocast"
    embeds[0][5] = float("nan")
    loss = contrastive_loss(embeds[0].requires_grad_(), embeds[1], scale)
    loss.backward()
    assert not loss.isfinite()
    assert not embeds[0].grad.isfinite().all()
