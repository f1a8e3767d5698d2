"""The order, and the random numbers, as pure functions of position."""

import numpy as np
import pytest

from flipscale.data.order import GlobalOrder
from flipscale.data.randomness import keyed_permutation, keyed_uniform

SIZES = [30, 17, 0, 1, 48, 29]


def test_order_changes_with_epoch_and_seed() -> None:
    first, second, other = (
        np.stack(GlobalOrder(SIZES, seed, 2).locate(np.arange(start, start + 125)))
        for seed, start in ((3, 0), (3, 125), (4, 0))
    )
    assert (first != second).any()
    assert (first != other).any()


def test_samples_travel_through_the_whole_epoch() -> None:
    order = GlobalOrder([100] * 64, seed=0, shards_per_block=16)
    shards, numbers = order.locate(np.arange(6400))
    travelled = np.abs((shards * 100 + numbers) - np.arange(6400))
    # A uniform shuffle moves a sample by a third of the set on average.
    assert 0.28 < travelled.mean() / 6400 < 0.39
    neighbours = np.diff(shards) == 0
    assert neighbours.mean() < 0.1


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="the data set is empty: 0 samples in 2 shards"):
        GlobalOrder([0, 0], seed=0)


def test_uniform_is_uniform_and_keyed() -> None:
    draws = keyed_uniform(1, "crop", np.arange(2000), 50)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    assert abs(draws.mean() - 0.5) < 0.005
    assert np.abs(np.corrcoef(draws[:, :6].T) - np.eye(6)).max() < 0.1
    assert np.abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.1
    assert np.unique(draws).size == draws.size
    assert (keyed_uniform(1, "crop", np.arange(7, 9), 50) == draws[7:9]).all()
    assert (keyed_uniform(1, "mask", np.arange(2000), 50) != draws).all()
    assert (keyed_uniform(2, "crop", np.arange(2000), 50) != draws).all()


def test_values_are_pinned() -> None:
    """A change here changes every run's data order: resumed runs would break."""
    assert keyed_uniform(0, "crop", np.array([0, 1, 10**12]), 1)[:, 0] == pytest.approx(PINNED, abs=0)
    assert keyed_permutation(0, "shards", 0, 6).tolist() == [2, 3, 5, 1, 0, 4]


PINNED = [0.25718251856332064, 0.8551889206425617, 0.6418569263434022]
