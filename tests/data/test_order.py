"""The order is a function of the position, whatever the processes, and a node reads its part of the shards only."""

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest

from flipscale.data.loader import StepSampler
from flipscale.data.order import GlobalOrder, Lanes, MixtureOrder, order_of
from flipscale.data.randomness import keyed_permutation, keyed_uniform
from flipscale.data.samples import Source
from flipscale.data.sources.opening import Mixture
from flipscale.recipe.data import DataRecipe, divisors_around

BATCH = 768  # which 1, 2, 3, 8 and 256 processes divide, and 8 and 64 lanes


def source_of(sizes: np.ndarray | list[int]) -> Source:
    """What an order needs of a source."""
    source = Source()
    source.shard_sizes, source.faults = [int(size) for size in sizes], []
    return source


def uneven(seed: int, count: int, usual: int) -> list[int]:
    """Sizes of `count` shards, a few of them empty or cut."""
    rng = np.random.default_rng(seed)
    return (usual * rng.choice([0.0, 0.3, 1.0, 1.1], count, p=[0.05, 0.1, 0.8, 0.05])).astype(int).tolist()


def mixed(seed: int) -> Mixture:
    """Two sources that lanes share out, and one of a few shards."""
    return Mixture([source_of(uneven(seed, n, 40)) for n in (150, 90, 3)], [5, 2, 1])


def digest(located: tuple[np.ndarray, np.ndarray]) -> str:
    return hashlib.sha256(np.stack(located).astype("<i8").tobytes()).hexdigest()[:16]


def test_one_lane_is_the_order_that_version_0_1_had() -> None:
    """A change here breaks runs that go on with `data.lanes 1`."""
    sizes = [30, 17, 0, 1, 48, 29] * 4
    one = DataRecipe(lanes=1, global_batch_size=7, shards_per_block=5)
    assert digest(order_of(source_of(sizes), 3, one).locate(np.arange(2000))) == "40e1a5b9e2eb935f"
    mixture = Mixture([source_of(sizes), source_of([9] * 40)], [2, 1])
    assert digest(order_of(mixture, 3, one).locate(np.arange(64_000, 68_000))) == "eaa08ce7b514d83a"


def test_many_lanes_keep_their_order() -> None:
    """A change here breaks runs that go on."""
    many = DataRecipe(lanes=64, global_batch_size=BATCH, shards_per_block=16)
    assert digest(order_of(source_of(uneven(1, 200, 30)), 3, many).locate(np.arange(12_000))) == "8b293901a510db98"
    assert digest(order_of(mixed(2), 3, many).locate(np.arange(64_000, 76_000))) == "7e6e42ca7a4468ec"


def test_every_epoch_sees_every_sample_once_whatever_the_lanes() -> None:
    """Batches larger than the set, fewer shards than lanes, empty shards: seeded draws of all."""
    for seed in range(120):
        rng = np.random.default_rng(seed)
        sizes = [*rng.integers(0, 20, rng.integers(1, 200)), 1]
        lanes = int(rng.choice([1, 3, 8, 64]))
        batch = lanes * int(rng.integers(1, 30))
        order = GlobalOrder(sizes, seed, int(rng.integers(1, 100)), lanes=Lanes(lanes, batch))
        first_samples = np.concatenate([[0], np.cumsum(sizes)])
        for epoch in (0, 1, 7):
            positions = np.arange(epoch * order.num_samples, (epoch + 1) * order.num_samples)
            shards, numbers = order.locate(positions)
            assert (np.sort(first_samples[shards] + numbers) == np.arange(order.num_samples)).all(), seed
            some = rng.permutation(positions)[:20]
            assert set(order.locate(some)[0].tolist()) <= set(order.shards_ahead(some))


def orders(lanes: int) -> Iterator[tuple[Source, DataRecipe]]:
    recipe = DataRecipe(lanes=lanes, global_batch_size=BATCH, shards_per_block=16)
    yield source_of(uneven(1, 200, 30)), recipe
    yield mixed(2), recipe


@pytest.mark.parametrize(("lanes", "world_size"), [(1, 3), (64, 1), (64, 256)])
def test_the_same_batches_at_any_world_size_with_any_workers_and_from_any_step(lanes: int, world_size: int) -> None:
    """Every worker of every process has an order of its own, and starts at its own step."""
    for source, recipe in orders(lanes):
        first, last = 5, 13  # an epoch of the shards ends in step 7
        whole = np.stack(order_of(source, 4, recipe).locate(np.arange(first * BATCH, last * BATCH)))
        for rank in {*range(0, world_size, max(1, world_size // 20)), world_size - 1}:
            for workers in (1, 4) if rank == 0 else (1,):
                steps = list(StepSampler(first, last, BATCH, rank, world_size))
                for worker in range(workers):
                    order = order_of(source, 4, recipe)
                    for positions in steps[worker::workers]:
                        expected = whole[:, np.array(positions) - first * BATCH]
                        assert (np.stack(order.locate(np.array(positions))) == expected).all()


def test_a_mixture_s_sources_have_epochs_of_their_own() -> None:
    """The positions of a source cover its epochs without gap, so each epoch sees every sample once."""
    mixture = mixed(5)
    order = MixtureOrder(mixture, 5, 16, Lanes(64, BATCH))
    assert [own.lanes.count for own in order.orders] == [64, 64, 1]
    sources, places = order.sources(np.arange(100 * BATCH))
    for number, source in enumerate(mixture.parts):
        mine = np.sort(places[sources == number])
        # A lane may be a few samples ahead of another.
        whole = len(mine) - 8 * 64
        assert (mine[:whole] == np.arange(whole)).all()
        epoch = order.orders[number].locate(np.arange(len(source), 2 * len(source)))
        assert len(set(zip(*(part.tolist() for part in epoch), strict=True))) == len(source)
    shards, numbers = order.locate(np.arange(100 * BATCH))
    smallest = np.bincount(numbers[shards == order.first_shards[2]])
    assert smallest.max() - smallest.min() <= 2


@pytest.mark.parametrize("batch", [64, 4096])
def test_a_mixture_of_lanes_keeps_its_shares(batch: int) -> None:
    """Within two samples in a lane, and within twenty over all 64, in every prefix and wherever the run is."""
    mixture = mixed(6)
    order, shares = MixtureOrder(mixture, 6, 16, Lanes(64, batch)), np.array([5, 2, 1]) / 8
    for start in (0, batch * 10**9):
        positions = np.arange(start, start + 100_000)
        sources, places = order.sources(positions)
        lanes, _ = order.lanes.split(positions)
        for number, share in enumerate(shares):
            mine = sources == number
            assert np.abs(np.cumsum(mine - share)).max() < 40  # the start of the stretch deviates too
            for lane in (0, 1, 63):
                assert np.abs(np.cumsum((mine - share)[lanes == lane])).max() < 5
                counted = places[mine & (lanes == lane)]
                assert (np.diff(counted) == 64).all()
                assert (counted % 64 == lane).all()


def node_reads(source: Source, recipe: DataRecipe, node: int, num_nodes: int, steps: int) -> tuple[set[int], set[int]]:
    """The shards whose samples a node's processes read in `steps` steps, and those that they would fetch for it."""
    order, share = order_of(source, 0, recipe), recipe.global_batch_size // num_nodes
    read: set[int] = set()
    fetched: set[int] = set()
    for step in range(steps):
        positions = np.arange(step * recipe.global_batch_size, (step + 1) * recipe.global_batch_size)
        mine = positions[node * share : (node + 1) * share]
        read.update(order.locate(mine)[0].tolist())
        fetched.update(order.shards_ahead(mine))
    return read, fetched


def test_a_node_fetches_its_part_of_the_bytes() -> None:
    """An epoch of 10,000 shards: 1/32 of the bytes and a shard at each end, and the first one of the next epoch."""
    sizes, num_nodes = np.array(uneven(0, 10_000, 100)), 32
    recipe = DataRecipe(global_batch_size=16_384)
    assert recipe.num_lanes == 64
    steps = int(sizes.sum()) // 16_384
    for node in (0, num_nodes // 3, num_nodes - 1):
        read, fetched = node_reads(source_of(sizes), recipe, node, num_nodes, steps)
        assert read <= fetched
        assert sizes[list(fetched)].sum() <= 1.1 / num_nodes * sizes.sum()
        assert sizes[list(read)].sum() >= 0.95 / num_nodes * sizes.sum()


def test_the_number_of_lanes() -> None:
    for wish, batch, expected in ((None, 16_384, 64), (None, 96, 32), (None, 100, 4), (None, 7, 1), (128, 1024, 128)):
        assert DataRecipe(lanes=wish, global_batch_size=batch).num_lanes == expected
    for wish, fix in ((48, "32 or 64"), (5000, "4096"), (3, "2 or 4")):
        assert divisors_around(4096, wish) == fix


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="the data set is empty: 0 samples in 2 shards"):
        GlobalOrder([0, 0], seed=0)


def test_values_are_pinned() -> None:
    """A change here changes every run's data order: resumed runs would break."""
    assert keyed_uniform(0, "crop", np.array([0, 1, 10**12]), 1)[:, 0] == pytest.approx(PINNED, abs=0)
    assert keyed_permutation(0, "shards", 0, 6).tolist() == [2, 3, 5, 1, 0, 4]


PINNED = [0.25718251856332064, 0.8551889206425617, 0.6418569263434022]
