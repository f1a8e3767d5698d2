"""`flipscale prepare weights`: scores with a threshold, clusters of given sizes, and what it refuses."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data.conftest import write_tar
from data.test_caption_kinds import picture

from flipscale import cli
from flipscale.data.sources.opening import open_source
from flipscale.recipe.data import DataRecipe

SIZES = [30, 17, 1, 48]


def prepared(shards: Path, folder: Path, *options: str | Path) -> np.ndarray:
    """Return the weights of all samples, in visits an epoch."""
    cli.main(["prepare", "weights", str(shards), str(folder), "--num_workers", "2", *map(str, options)])
    source = open_source(DataRecipe(shards=str(shards), weights=str(folder)))
    return np.concatenate([source.weights.of_shard(shard) for shard in range(len(source.shard_sizes))])


def test_scores(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CLIP's scores may be negative; a threshold takes those at it, and without one they are the weights."""
    scores = np.random.default_rng(0).normal(0, 0.3, 96)
    scores[[3, 50]] = 0.28
    np.save(tmp_path / "scores.npy", scores)
    name = ["--scores", tmp_path / "scores.npy"]
    assert (prepared(shards, tmp_path / "a", *name, "--at_least", "0.28") == (scores >= 0.28)).all()
    assert f"{(scores < 0.28).sum()} of 96 samples are never drawn" in capsys.readouterr().out
    top = prepared(shards, tmp_path / "b", *name, "--top", "0.25")
    assert set(np.flatnonzero(top)) == set(np.argsort(scores)[-24:])
    np.save(tmp_path / "scores.npy", np.where(np.arange(96) < 9, 0.7, 0.6).astype(np.float32))
    assert prepared(shards, tmp_path / "c", *name, "--at_least", "0.7").sum() == 9
    np.save(tmp_path / "scores.npy", [*[1e-30] * 94, 1e300, 3e300])  # beyond float32
    assert prepared(shards, tmp_path / "e", *name)[90:].tolist() == [0, 0, 0, 0, 0.5, 1.5]
    np.save(tmp_path / "scores.npy", np.arange(96))
    assert prepared(shards, tmp_path / "d", *name) == pytest.approx(np.arange(96) / 48, rel=1e-6)


def test_a_field_of_key_json(tmp_path: Path) -> None:
    """Beside KEY.txt and alone; a sample without a finite number, or with a damaged file, is never drawn."""
    stored = [0.5, 0.1, None, "0.9", True, float("nan"), 0.3, 1]
    files = {f"{number}.jpg": picture() for number in range(10)} | {"8.json": b"{damaged", "9.txt": b"no json"}
    for number, value in enumerate(stored):
        files[f"{number}.json"] = json.dumps({"caption": "a red disc", "similarity": value}).encode()
        files |= {f"{number}.txt": b"a red disc"} if number % 2 else {}
    write_tar(tmp_path / "0.tar", dict(sorted(files.items())))
    weights = prepared(tmp_path, tmp_path / "weights", "--field", "similarity", "--at_least", "0.2")
    assert weights.tolist() == [1, 0, 0, 0, 0, 0, 1, 1, 0, 0]
    weights = prepared(tmp_path, tmp_path / "raw", "--field", "similarity")
    assert weights[[0, 1, 6, 7]] == pytest.approx(np.array([0.5, 0.1, 0.3, 1]) / 1.9 * 4)


def test_counts_of_captions(tmp_path: Path) -> None:
    """Of the first caption that is not blank, in any case and spacing, over all shards; none is never drawn."""
    shards = [
        ["A red  disc", "disc", None, " \n"],
        ["a red disc\n", "DISC ", "caf\u00e9", "Caf\u00c9", "a red disc!", "a red disc"],
    ]
    for number, captions in enumerate(shards):
        files = {f"{key}.jpg": picture() for key in range(len(captions))}
        files |= {f"{key}.txt": caption.encode() for key, caption in enumerate(captions) if caption is not None}
        write_tar(tmp_path / f"{number}.tar", files)
    counts = np.array([3, 2, 0, 0, 3, 2, 2, 2, 1, 3])
    kept = prepared(tmp_path, tmp_path / "kept", "--caption_counts", "--at_least", "3")
    assert kept.tolist() == (counts >= 3).astype(int).tolist()
    assert prepared(tmp_path, tmp_path / "raw", "--caption_counts") == pytest.approx(counts / 18 * 8)


def test_counts_of_no_captions(tmp_path: Path, refused: Callable[..., str]) -> None:
    write_tar(tmp_path / "0.tar", {"0.jpg": picture(), "1.jpg": picture(), "1.txt": b" "})
    words = ("prepare", "weights", tmp_path, tmp_path / "out", "--caption_counts", "--top", "0.5")
    assert "--caption_counts counts captions, and none of 2 samples" in refused(*words)


def test_clusters_are_drawn_by_a_power_of_their_size(shards: Path, tmp_path: Path) -> None:
    """DynamiCS: a cluster of n samples has n ** power visits in proportion. A score filters first."""
    clusters = np.repeat([7, 2, 0, -1], [64, 16, 4, 12])
    scores = np.where(np.arange(96) % 2, 0.1, 0.9)
    np.save(tmp_path / "clusters.npy", clusters)
    np.save(tmp_path / "scores.npy", scores)
    name = ["--clusters", tmp_path / "clusters.npy"]
    filtered = ["--scores", tmp_path / "scores.npy", "--at_least", "0.5"]
    for power, options, sizes in ((0.5, [], [64, 16, 4]), (0.0, [], [64, 16, 4]), (0.2, filtered, [32, 8, 2])):
        weights = prepared(shards, tmp_path / str(power), *name, "--power", str(power), *options)
        visits = np.array([weights[clusters == cluster].sum() for cluster in (7, 2, 0)])
        assert visits / visits[0] == pytest.approx((np.array(sizes) / sizes[0]) ** power, rel=1e-5)
        assert not weights[clusters < 0].any()
        assert not (options and weights[1::2].any())
    assert prepared(shards, tmp_path / "whole", *name, "--power", "1").tolist() == [1.0] * 84 + [0.0] * 12


def features(folder: Path) -> np.ndarray:
    """Write features of the 96 samples in three directions, whatever their length, and return the directions."""
    rng = np.random.default_rng(0)
    directions = rng.choice(3, 96, p=[0.7, 0.2, 0.1])
    rows = (np.eye(3, 16)[directions] + rng.normal(0, 0.05, (96, 16))) * rng.uniform(0.5, 9, (96, 1))
    rows[5] = np.nan
    folder.mkdir()
    for shard, part in enumerate(np.split(rows.astype(np.float16), np.cumsum(SIZES)[:-1])):
        np.save(folder / f"{shard:05d}.npy", part)
    return directions


def test_features_are_clustered_and_two_runs_give_the_same_bytes(shards: Path, tmp_path: Path) -> None:
    directions = features(tmp_path / "images")
    options = ["--features", tmp_path / "images", "--num_clusters", "3", "--power", "0"]
    weights = prepared(shards, tmp_path / "a", *options)
    prepared(shards, tmp_path / "b", *options)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == ["clusters.npy", "shards.npy", "weights.json", "weights.npy"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    directions[5] = -1
    assert weights[5] == 0
    assert [weights[directions == one].sum() for one in range(3)] == pytest.approx([95 / 3] * 3, rel=1e-5)
    again = prepared(shards, tmp_path / "c", "--clusters", tmp_path / "a/clusters.npy", "--power", "0")
    assert (again == weights).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --scores"),
        (["--scores", "ones", "--field", "x"], "--scores is ones.npy and --field is x"),
        (["--scores", "ones", "--top", "0.1", "--at_least", "2"], "--at_least is 2.0 and --top is 0.1"),
        (["--clusters", "whole", "--top", "0.1"], "--top is 0.1 and there are no scores"),
        (["--features", "x"], "--features is x.npy and --num_clusters None"),
        (["--scores", "nan", "--top", "0.5"], "sample 40, number 10 of .*00001.tar, has nan"),
        (["--scores", "negative"], "sample 40, .* has -1.0; .* --at_least"),
        (["--scores", "zero"], "none of 96 samples"),
        (["--scores", "square"], r"--scores square.npy has float64 \(96, 2\); expected 96"),
        (["--scores", "text"], "--scores text.npy has <U1"),
        (["--scores", "junk"], "--scores: junk.npy"),
        (["--clusters", "ones"], r"--clusters ones.npy has float64"),
        (["--field", "similarity"], "--field is 'similarity'"),
        (["--features", "images", "--num_clusters", "97"], "--num_clusters is 97 and 95 samples"),
        (["--features", "other", "--num_clusters", "2"], "--features: other.*/00000.npy"),
    ],
    ids=str,
)
def test_refusals(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    ones = np.ones(96)
    for name, array in {
        "nan": np.where(np.arange(96) == 40, np.nan, 1.0), "negative": np.where(np.arange(96) == 40, -1.0, 1.0),
        "ones": ones, "zero": 0 * ones, "square": np.ones((96, 2)), "text": ones.astype("U1"),
        "whole": ones.astype(int),
    }.items():  # fmt: skip
        np.save(name, array)
    Path("junk.npy").write_bytes(b"\x93NUMPY junk")
    features(tmp_path / "images.npy")
    files = ("--scores", "--clusters", "--features")
    words = [f"{word}.npy" if flag in files else word for flag, word in zip(["", *options], options, strict=False)]
    assert re.search(message, refused("prepare", "weights", shards, "weights", *words))
    assert not Path("weights").exists()
