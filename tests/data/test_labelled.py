"""Labelled images as batches: RandAugment, mixup and cutmix are functions of the seed and the position."""

import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from flipscale.data.batches import BatchDataset
from flipscale.data.image_augmentation import Augment
from flipscale.data.pairs import InputShape
from flipscale.data.sources.opening import open_source
from flipscale.objectives.classify import Classify
from flipscale.recipe.augment import AugmentRecipe
from flipscale.recipe.data import DataRecipe

PAPER = AugmentRecipe("rand-m9-mstd0.5-inc1", 0.8, 1.0)


@pytest.fixture
def dataset(shards: Path) -> Callable[..., BatchDataset]:
    def build(augment: AugmentRecipe, num_classes: int = 16, mask_ratio: float = 0.0, seed: int = 5) -> BatchDataset:
        recipe = DataRecipe(shards=str(shards), global_batch_size=16, num_workers=0, augment=augment)
        objective, shape = Classify(num_classes=num_classes), InputShape(32, 8, 8)
        return objective.dataset(open_source(recipe), None, recipe, shape, seed, mask_ratio)

    return build


def test_a_batch_has_the_class_numbers_of_the_shards(dataset: Callable[..., BatchDataset]) -> None:
    data = dataset(AugmentRecipe())
    batch = data.__getitems__(list(range(12)))
    assert set(batch) == {"patches", "labels", "faults"}
    shards, numbers = data.order.locate(np.arange(12))
    expected = [data.source.read(*place).label for place in zip(shards.tolist(), numbers.tolist(), strict=True)]
    assert batch["labels"].tolist() == [[label] for label in expected]


@pytest.mark.parametrize("augment", [PAPER, AugmentRecipe(mixup_alpha=0.8), AugmentRecipe("rand-m9-n3")])
def test_the_parts_of_a_batch_are_those_of_the_whole(
    dataset: Callable[..., BatchDataset], augment: AugmentRecipe
) -> None:
    """So neither the number of processes nor a resume changes what is learned; nor do draws of other code."""
    whole = dataset(augment, mask_ratio=0.5).__getitems__(list(range(16)))
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    state = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    parts = [dataset(augment, mask_ratio=0.5).__getitems__(list(range(first, first + 4))) for first in (0, 4, 8, 12)]
    assert random.getstate() == state[0], "other code's draws are left alone"
    assert np.array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
    for name in whole.keys() - {"faults"}:
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name]), name
    carried = pickle.loads(pickle.dumps(dataset(augment, mask_ratio=0.5))).__getitems__(list(range(16)))
    assert all(torch.equal(carried[name], whole[name]) for name in whole.keys() - {"faults"}), "as a worker has it"
    other = dataset(augment, mask_ratio=0.5, seed=6).__getitems__(list(range(16)))
    assert not torch.equal(other["patches"], whole["patches"])


def test_mixed_images_are_the_plain_ones_by_the_shares_of_their_labels(
    dataset: Callable[..., BatchDataset],
) -> None:
    plain = dataset(AugmentRecipe()).__getitems__(list(range(16)))
    mixed = dataset(AugmentRecipe(mixup_alpha=0.8)).__getitems__(list(range(16)))
    partner = [number ^ 1 for number in range(16)]
    assert mixed["labels"].tolist() == torch.cat([plain["labels"], plain["labels"][partner]], dim=1).tolist()
    shares = mixed["label_shares"]
    assert torch.allclose(shares.sum(dim=1), torch.ones(16))
    assert torch.equal(shares[::2], shares[1::2])
    expected = shares[:, 0, None, None] * plain["patches"] + shares[:, 1, None, None] * plain["patches"][partner]
    assert (mixed["patches"].float() - expected).abs().max() <= 0.51

    cut = dataset(AugmentRecipe(cutmix_alpha=1.0)).__getitems__(list(range(16)))
    own, others = cut["patches"] == plain["patches"], cut["patches"] == plain["patches"][partner]
    assert (own | others).all()
    # Where the two differ, what is the image's own is as much as its label's share.
    differ = plain["patches"] != plain["patches"][partner]
    found = (own & differ).sum(dim=(1, 2)) / differ.sum(dim=(1, 2))
    assert (found - cut["label_shares"][:, 0]).abs().max() < 0.1


def test_the_draws_are_those_of_the_papers() -> None:
    one, other = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    augment = Augment(PAPER, 3, 16)
    mixed = [augment.mixed(one, other, position) for position in range(0, 4000, 2)]
    is_cut = np.array([set(np.unique(first)) <= {0, 255} for first, _, _ in mixed])
    assert is_cut.mean() == pytest.approx(0.5, abs=0.05)
    blended = np.array([share for (_, _, share), cut in zip(mixed, is_cut, strict=True) if not cut])
    # Of Beta(0.8, 0.8): mean 1/2, variance 1 / (4 * 2.6).
    assert blended.mean() == pytest.approx(0.5, abs=0.03)
    assert blended.var() == pytest.approx(1 / 10.4, abs=0.01)
    for first, second, share in mixed[:50]:
        assert share == pytest.approx(1 - first.mean() / 255, abs=0.003)
        assert share == pytest.approx(second.mean() / 255, abs=0.003)


def test_timm_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm.data", None)
    with pytest.raises(ValueError, match=r"cutmix_alpha is 1\.0, which needs timm.*; pip inst"):
        Augment(AugmentRecipe(cutmix_alpha=1.0), 0, 32)


def test_a_label_beyond_the_head(dataset: Callable[..., BatchDataset]) -> None:
    with pytest.raises(ValueError, match=r"0000\d\.tar#\d+ has class \d+, .*num_classes is 3"):
        dataset(AugmentRecipe(), num_classes=3).__getitems__(list(range(16)))
