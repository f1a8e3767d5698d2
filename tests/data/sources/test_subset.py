"""A fraction of the data: the same samples for every seed, a smaller one inside a larger one, from any source."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import write_shards

from flipscale.data.order import order_of
from flipscale.data.samples import Source
from flipscale.data.sources.opening import open_source
from flipscale.recipe.data import DataRecipe, SourceRecipe


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> DataRecipe:
    """130 tar samples in seven shards of three folders, one of them empty."""
    folder = tmp_path_factory.mktemp("three")
    for number, sizes in enumerate(([40, 41], [17], [30, 0, 1, 1])):
        write_shards(folder / str(number), sizes, seed=number)
    return DataRecipe(sources=[SourceRecipe(shards=str(folder / str(n))) for n in range(3)], global_batch_size=8)


def images(source: Source) -> list[bytes]:
    """All images in their order, which are all different."""
    return [source.read(shard, n).image for shard, size in enumerate(source.shard_sizes) for n in range(size)]


def test_fractions_lie_inside_each_other(mixture: DataRecipe) -> None:
    whole = images(open_source(mixture))
    kept = {fraction: images(open_source(replace(mixture, fraction=fraction))) for fraction in (0.1, 0.25, 0.5, 0.9)}
    for fraction, part in kept.items():
        assert len(set(part)) == len(part) == pytest.approx(130 * fraction, abs=4)
        assert [image for image in whole if image in set(part)] == part, "they keep their order"
    for smaller, larger in pairwise([*kept.values(), whole]):
        assert set(smaller) < set(larger)
    assert not set(whole[:13]) <= set(kept[0.9])
    assert not set(kept[0.25]) <= set(whole[:40])
    assert images(open_source(replace(mixture, fraction=1.0))) == whole


def test_small_shards_have_their_share_together(tmp_path: Path) -> None:
    for number in range(3):
        write_shards(tmp_path / "small", [1] * 40, seed=number)
    found = open_source(DataRecipe(shards=str(tmp_path / "small"), fraction=0.25))
    assert 5 <= len(found) <= 15
    assert set(found.shard_sizes) == {0, 1}


def test_every_epoch_has_each_sample_once_in_an_order_of_the_seed(mixture: DataRecipe) -> None:
    recipe = replace(mixture, sources=mixture.sources[:1], fraction=0.5)
    source, orders = open_source(recipe), []
    for seed in (0, 1):
        order = order_of(source, seed, recipe)
        for epoch in (0, 3):
            shards, numbers = order.locate(np.arange(len(source)) + epoch * len(source))
            orders.append([source.read(shard, n).image for shard, n in zip(shards, numbers, strict=True)])
    assert all(sorted(one) == sorted(images(source)) for one in orders)
    assert len({tuple(one) for one in orders}) == 4


def test_a_fraction_that_leaves_nothing(shards: Path, mixture: DataRecipe) -> None:
    message = "data.fraction 0.0001 leaves none of 96 samples of data.shards; raise it"
    with pytest.raises(ValueError, match=message):
        open_source(DataRecipe(shards=str(shards), fraction=1e-4))
    with pytest.raises(ValueError, match=r"data.fraction 0.02 leaves none of 17 samples of data.sources\[1\]; raise"):
        open_source(replace(mixture, fraction=0.02))
