"""The contrastive loss on one process, against a plain formula in fp64."""

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.nn.functional import normalize

from flipscale.objectives import contrastive
from flipscale.objectives.contrastive import contrastive_loss
from flipscale.objectives.sigmoid import sigmoid_loss


def plain_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale * image @ text.T
    pairs = logits.diagonal()
    return ((logits.logsumexp(1) - pairs).mean() + (logits.logsumexp(0) - pairs).mean()) / 2


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


def check_against_fp64(
    inputs: list[torch.Tensor], loss_of: Callable = contrastive_loss, plain: Callable = plain_loss
) -> None:
    ours = leaves_of(inputs)
    exact = [t.double().requires_grad_() for t in inputs]
    loss, expected = loss_of(*ours), plain(*exact)
    assert loss.dtype == torch.float32
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    for a, b in zip(ours, exact, strict=True):
        assert a.grad.dtype == a.dtype
        rounding = 2**-8 if a.dtype == torch.bfloat16 else 0.0
        assert ((a.grad - b.grad).abs() <= 1e-5 * b.grad.abs().max() + rounding * b.grad.abs() + 1e-12).all()


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
    check_against_fp64([*embeds_of(batch, dim, noise, dtype), torch.tensor([scale])])


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
