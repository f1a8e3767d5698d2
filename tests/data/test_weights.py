"""Draws by weight: as often as the weights say, the same whatever the processes, and nothing of weight 0."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import cut, losses, pretrain, trained, write_shards
from data.conftest import assert_equal
from data.sources.test_remote import batches, recipe_of, web

from flipscale.cli.status import as_table, read_status
from flipscale.data.order import GlobalOrder, Lanes, order_of
from flipscale.data.samples import Source, candidates, shard_sizes_digest
from flipscale.data.sources.opening import Mixture, open_source, open_weights
from flipscale.preparation.weighing import WeightOptions, make_weights
from flipscale.recipe.data import DataRecipe, SourceRecipe

BATCH = 96


class Sizes(Source):
    """What an order needs of a source, with weights."""

    def __init__(self, folder: Path, sizes: list[int], weights: np.ndarray, name: str = "data.weights"):
        self.shard_sizes, self.faults = sizes, []
        weigh(self, "made up", folder, weights)
        self.weights = open_weights(name, str(folder), self, "made up")

    def shard_name(self, shard: int) -> str:
        return f"{shard:05d}.tar"


def weigh(source: Source, name: str, folder: Path, scores: np.ndarray) -> None:
    """Write the weights of a source, called `name`, into a new folder."""
    folder.mkdir()
    np.save(folder.with_suffix(".npy"), scores)
    make_weights(source, name, WeightOptions(scores=folder.with_suffix(".npy")), folder, 1)


def uneven(seed: int = 0, shards: int = 40) -> tuple[list[int], np.ndarray]:
    """Sizes of shards, some empty, and weights of six orders of magnitude, a third of them 0, one shard all 0."""
    rng = np.random.default_rng(seed)
    sizes = [0, *rng.integers(0, 60, shards - 2).tolist(), 50]
    weights = rng.lognormal(0, 1.5, sum(sizes)) * (rng.random(sum(sizes)) > 0.33)
    weights[-50:] = 0.0
    return sizes, weights


def rows(source: Source, order: GlobalOrder, positions: np.ndarray) -> np.ndarray:
    """Return the row in the source of each position."""
    shards, numbers = order.locate(positions)
    return np.cumsum([0, *source.shard_sizes])[shards] + numbers


def test_the_order_by_weights_is_pinned(tmp_path: Path) -> None:
    """A change here breaks runs that go on, and may lose the measured spread of a sample's visits."""
    sizes, _ = uneven()
    source = Sizes(tmp_path / "weights", sizes, np.arange(sum(sizes)) * 7 % 5 * 1.0)
    located = order_of(source, 4, DataRecipe(lanes=8, global_batch_size=BATCH)).locate(np.arange(5000))
    assert hashlib.sha256(np.stack(located).astype("<i8").tobytes()).hexdigest()[:16] == "9a0a136943bfca5f"


@pytest.mark.parametrize("lanes", [1, 8])
def test_visits_are_as_frequent_as_the_weights(tmp_path: Path, lanes: int) -> None:
    """Over 60 epochs, each of the exact length; a sample of weight 2.3 has two or three visits in each."""
    sizes, weights = uneven()
    source, epochs = Sizes(tmp_path / "weights", sizes, weights), 60
    order = GlobalOrder(sizes, 3, 16, lanes=Lanes(lanes, BATCH), weights=source.weights)
    expected = weights / weights[weights > 0].mean()
    length = np.count_nonzero(weights)
    assert order.num_samples == length == source.num_drawn
    counts = np.array(
        [
            np.bincount(rows(source, order, np.arange(length) + epoch * length), minlength=len(weights))
            for epoch in range(epochs)
        ]
    )
    assert (counts.sum(1) == length).all()
    assert (counts >= np.floor(expected - 1e-4)).all()
    assert (counts <= np.ceil(expected + 1e-4)).all()
    assert not counts[:, weights == 0].any()
    rest = expected % 1
    deviation = np.sqrt(np.maximum(rest * (1 - rest), 1e-3) / epochs)
    assert (np.abs(counts.mean(0) - expected) < 5 * deviation).all()
    composition = source.weights.composition
    assert (counts > 0).sum(1).mean() == pytest.approx(composition.distinct, rel=0.01)
    assert composition.never == np.count_nonzero(weights == 0)
    heaviest = np.sort(expected)[-math.ceil(length / 100) :].sum() / length
    assert composition.heaviest_share == pytest.approx(heaviest, rel=1e-4)
    assert composition.most_visits == pytest.approx(expected.max(), rel=1e-4)


@pytest.mark.parametrize("lanes", [1, 8])
def test_equal_weights_give_the_order_without_weights(tmp_path: Path, lanes: int) -> None:
    sizes, _ = uneven()
    source = Sizes(tmp_path / "weights", sizes, np.full(sum(sizes), 7e-9))
    plain, weighted = (
        GlobalOrder(sizes, 5, 16, lanes=Lanes(lanes, BATCH), weights=weights) for weights in (None, source.weights)
    )
    positions = np.arange(5 * sum(sizes))
    assert (np.stack(plain.locate(positions)) == np.stack(weighted.locate(positions))).all()


@pytest.mark.parametrize("lanes", [1, 8])
def test_only_drawn_samples_and_shards_are_read(tmp_path: Path, lanes: int) -> None:
    sources = [Sizes(tmp_path / str(n), *uneven(n, 30), f"data.sources[{n}].weights") for n in range(2)]
    plain = Sizes(tmp_path / "c", [20, 30], np.ones(50))
    plain.weights = None
    source = Mixture([*sources, plain], [5, 2, 1])
    recipe = DataRecipe(lanes=lanes, global_batch_size=BATCH, shards_per_block=16)
    whole = np.stack(order_of(source, 4, recipe).locate(np.arange(24 * BATCH)))
    drawn = [source.drawn(shard) for shard in range(len(source.shard_sizes))]
    assert all(drawn[shard] is None or number in drawn[shard] for shard, number in {*map(tuple, whole.T.tolist())})
    for step in (0, 7, 13, 23):  # from which a run goes on, in the process of the first lanes
        order, where = order_of(source, 4, recipe), np.arange(step * BATCH, step * BATCH + BATCH // 4)
        assert (np.stack(order.locate(where)) == whole[:, where]).all()
        ahead = order.shards_ahead(where)
        assert set(whole[0, where].tolist()) <= set(ahead)
        assert all(drawn[shard] is None or len(drawn[shard]) for shard in ahead if source.shard_sizes[shard])


def test_a_sample_of_weight_0_replaces_no_bad_sample(shards: Path, tmp_path: Path) -> None:
    """The first of 96 samples in four shards, one of them of weight 0 as a whole, has all others as replacements."""
    kept = np.flatnonzero(np.random.default_rng(0).random(96) < 0.2)
    kept = np.union1d(kept[kept >= 30], [0, 3])
    source = open_source(DataRecipe(shards=str(shards)))
    plain = list(candidates(source, 0, 3))
    assert (plain[:3], len(set(plain))) == ([(0, 3), (0, 4), (0, 5)], 49)
    weigh(source, str(shards), tmp_path / "weights", np.isin(np.arange(96), kept).astype(float))
    mixture = open_source(
        DataRecipe(shards=None, sources=[SourceRecipe(shards=str(shards), weights=str(tmp_path / "weights"))] * 2)
    )
    assert mixture.num_drawn == 2 * len(kept)
    for source, first in ((mixture.parts[0], 0), (mixture, 4)):
        starts = np.cumsum([0, 30, 17, 1, 48])
        replacements = list(candidates(source, first, 3))
        assert replacements[:2] == [(first, 3), (first, 0)]
        assert {int(starts[shard % 4]) + number for shard, number in replacements} <= set(kept.tolist())


@pytest.mark.long
def test_a_run_with_weights_is_the_same_resumed_and_on_two_processes(
    shards: Path, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    rng = np.random.default_rng(1)
    folders = [tmp_path / "weights", tmp_path / "others"]
    for folder in folders:
        scores = rng.lognormal(0, 1, 96) * (rng.random(96) > 0.5)
        weigh(open_source(DataRecipe(shards=str(shards))), str(shards), folder, scores)
    changes = {
        "data": {"shards": str(shards), "weights": str(folders[0])},
        "save": {"every_samples": 160, "total_limit": 9},
    }
    one, resumed, two = (tmp_path / name for name in ("one", "resumed", "two"))
    done = trained(write_recipe(one, **changes))
    composition = open_source(DataRecipe(shards=str(shards), weights=str(folders[0]))).weights.composition
    assert f"  weights     {composition}\n" in done.stderr
    (started,) = [json.loads(line) for line in (one / "starts.jsonl").read_text().splitlines()]
    assert started["composition"]["data.weights"]["never"] == composition.never
    assert str(composition) in as_table(read_status(one, 0.0))

    cut(one, resumed, 20)
    trained(write_recipe(resumed, **changes))
    assert losses(resumed)[-20:] == losses(one)[-20:]
    trained(write_recipe(two, **changes), 2)
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)

    shutil.rmtree(resumed)
    cut(one, resumed, 20)
    shutil.rmtree(folders[0])
    folders[1].rename(folders[0])
    done = pretrain(write_recipe(resumed, **changes))
    assert done.returncode == 2
    assert "96 samples; the data has 96, or other shards, data.weights or" in done.stderr


def test_shards_at_a_url_are_drawn_alike_and_fetched_only_if_they_have_visits(
    shards: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    """The weights are made for the local copy. The second and the last of four shards have none above 0."""
    folder, scores = tmp_path / "weights", np.repeat([1.0, 0.0, 3.0, 0.0], [30, 17, 1, 48])
    here = recipe_of(shards, tmp_path, num_workers=0, weights=str(folder))
    weigh(open_source(replace(here, weights=None)), str(shards), folder, scores)
    with web(shards, breaks=0) as (url, _):
        there = recipe_of(f"{url}/{{00000..00003}}.tar", tmp_path / "cache", weights=str(folder))
        open_source(there)
        for file in (tmp_path / "cache").glob("*.tar"):  # fetched for their indices
            file.unlink()
        assert_equal(batches(there, tokenizer_dir), batches(here, tokenizer_dir))
    assert {file.name[-9:] for file in (tmp_path / "cache").glob("[!.]*.tar")} == {"00000.tar", "00002.tar"}


def test_rows_of_a_data_set_are_drawn_by_weight(tmp_path: Path) -> None:
    rows = [{"image": bytes([number]), "caption": "a red disc"} for number in range(20)]
    file = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).to_parquet(file)
    plain = SourceRecipe(dataset=file)
    scores = (np.arange(20) % 4 == 1).astype(int)
    weigh(open_source(DataRecipe(sources=[plain])), file, tmp_path / "weights", scores)
    recipe = DataRecipe(sources=[replace(plain, weights=str(tmp_path / "weights"))])
    source = open_source(recipe)
    assert sorted(order_of(source, 0, recipe).locate(np.arange(5))[1].tolist()) == [1, 5, 9, 13, 17]
    assert source.weights.name == "data.sources[0].weights"
    rows[3]["image"] = b"another"
    datasets.Dataset.from_list(rows).to_parquet(file)
    with pytest.raises(ValueError, match=r"data.sources\[0\].weights.*contents"):
        open_source(recipe)


def test_weights_are_refused_by_name(shards: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "weights", tmp_path / "other"
    write_shards(other, [30, 17, 48, 1])
    recipe = DataRecipe(shards=str(shards), weights=str(folder))
    source = open_source(replace(recipe, weights=None))
    weigh(source, str(shards), folder, np.ones(96))
    assert shard_sizes_digest(open_source(recipe)) != shard_sizes_digest(source)
    for changed, message in (
        (replace(recipe, shards=str(other)), rf"data.weights '.*weights' has weights of 96 samples in 4 .*{shards}"),
        (replace(recipe, weights="nowhere"), "data.weights is 'nowhere'; .* `flipscale prepare weights .* FOLDER`"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(changed)
    # A file that is changed or cut after it was made.
    opened, made = open_source(recipe), np.load(folder / "weights.npy")
    np.save(folder / "weights.npy", np.where(np.arange(96) == 40, np.float32(np.nan), made))
    opened.weights.of_shard(0)
    with pytest.raises(ValueError, match=r"data.weights '.*': weights.npy has changed at shard 1; make it anew"):
        opened.weights.of_shard(1)
    np.save(folder / "weights.npy", made[:-1])
    with pytest.raises(ValueError, match=r"data.weights '.*weights' is damaged .*lengths or types"):
        open_source(recipe)
