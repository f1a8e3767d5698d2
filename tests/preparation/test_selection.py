"""Sampling weights by id: tables of uids, hashes and scores, joined with shards."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data.conftest import encoded, write_tar
from data.test_caption_kinds import picture
from preparation.test_sampling_weights import prepared
from pyarrow import parquet

from flipscale import cli
from flipscale.preparation.selection import capped

UIDS = [hashlib.md5(str(number).encode()).hexdigest() for number in range(6)]


@pytest.fixture
def datacomp(tmp_path: Path) -> Path:
    """Two shards of six pairs, the last without a KEY.json."""
    for shard in range(2):
        files = {}
        for number in range(3 * shard, 3 * shard + 3):
            files[f"{number}.jpg"] = picture()
            files[f"{number}.txt"] = b"a red disc"
            if number < 5:
                files[f"{number}.json"] = json.dumps({"uid": UIDS[number], "row": number}).encode()
        write_tar(tmp_path / "shards" / f"{shard}.tar", files)
    return tmp_path / "shards"


def table(file: Path, **columns: list) -> Path:
    parquet.write_table(pa.table(columns), file)
    return file


def test_rows_choose_samples(datacomp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = table(tmp_path / "chosen.parquet", uid=[UIDS[3], UIDS[0], "f" * 32, UIDS[3]])
    weights = prepared(datacomp, tmp_path / "visits", "--table", file, "--key", "uid")
    assert weights == pytest.approx([2 / 3, 0, 0, 4 / 3, 0, 0])
    printed = capsys.readouterr().out
    assert "1 of 4 rows" in printed
    assert "3 samples have no row, 1 no id" in printed
    matches = json.loads((tmp_path / "visits/weights.json").read_text())["matches"]
    assert matches == {"rows": 4, "other_rows": 1, "other_samples": 3, "without_key": 1}
    once = prepared(datacomp, tmp_path / "once", "--table", file, "--key", "uid", "--at_least", "1")
    assert once.tolist() == [1, 0, 0, 1, 0, 0]


def test_scores_of_a_column(datacomp: Path, tmp_path: Path) -> None:
    file = table(tmp_path / "scores.parquet", row=[4, 0, 2, 1, 3], similarity=[9.0, 0.5, 0.25, 0.25, 0.0])
    options = ["--table", file, "--key", "row", "--score", "similarity"]
    assert prepared(datacomp, tmp_path / "a", *options) == pytest.approx([0.2, 0.1, 0.1, 0, 3.6, 0])
    assert prepared(datacomp, tmp_path / "b", *options, "--top", "0.4").tolist() == [1, 0, 0, 0, 1, 0]
    most = prepared(datacomp, tmp_path / "c", *options, "--most_repeats", "2")
    assert most == pytest.approx([1, 0.5, 0.5, 0, 2, 0])


def test_uids_of_datacomp(datacomp: Path, tmp_path: Path) -> None:
    """Pairs of uint64, as DataComp and DFN publish theirs."""
    pairs = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in (UIDS[1], UIDS[4])]
    np.save(tmp_path / "uids.npy", np.array(pairs, np.dtype("u8,u8")))
    weights = prepared(datacomp, tmp_path / "weights", "--table", tmp_path / "uids.npy", "--key", "uid")
    assert weights.tolist() == [0, 1, 0, 0, 1, 0]


def test_hashes_of_images(tmp_path: Path) -> None:
    """KEY.json has the hash of the bytes before they were resized; without it, the image's own counts."""
    red, blue = (encoded(np.full((8, 8, 3), colour, np.uint8), "PNG") for colour in ((255, 0, 0), (0, 0, 255)))
    stored = hashlib.sha256(b"as it was downloaded").hexdigest()
    files = {"0.jpg": red, "1.jpg": blue, "2.jpg": red, "2.json": json.dumps({"sha256": stored}).encode()}
    write_tar(tmp_path / "shards/0.tar", files)
    file = table(tmp_path / "hashes.parquet", sha256=[hashlib.sha256(red).hexdigest()])
    options = ["--table", file, "--key", "sha256"]
    assert prepared(tmp_path / "shards", tmp_path / "a", *options).tolist() == [1, 0, 0]
    table(file, sha256=[stored])
    assert prepared(tmp_path / "shards", tmp_path / "b", *options).tolist() == [0, 0, 1]


@pytest.mark.parametrize("most", [1.0, 1.5, 7.0])
def test_a_cap_keeps_the_sum_and_the_order(most: float) -> None:
    weights = np.random.default_rng(0).lognormal(0, 3, 1000) * (np.arange(1000) % 10 > 0)
    visits = capped(weights, most)
    assert visits.max() <= most
    assert visits.sum() == pytest.approx(900)
    free = (visits < most) & (visits > 0)
    assert np.ptp(visits[free] / weights[free]) <= 1e-9 * (visits[free] / weights[free]).max() if free.any() else True
    assert (np.diff(visits[np.argsort(weights)]) >= 0).all()


@pytest.mark.parametrize(
    ("columns", "options", "parts"),
    [
        ({"uid": UIDS}, ["--key", "id"], ["--key", "'id'", "no KEY.json"]),
        ({"id": UIDS}, ["--key", "uid"], ["--key", "'uid'", "id"]),
        ({"uid": UIDS}, ["--key", "uid", "--score", "clip"], ["--score", "'clip'", "uid"]),
        ({"uid": UIDS, "clip": list("abcdef")}, ["--key", "uid", "--score", "clip"], ["--score", "'clip'"]),
        ({"uid": UIDS, "clip": [*range(5), None]}, ["--key", "uid", "--score", "clip"], ["t.parquet", "clip"]),
        ({"uid": UIDS, "clip": [*range(5), -1]}, ["--key", "uid", "--score", "clip"], []),
        ({"uid": UIDS[:2] * 2, "clip": [1, 2, 1, 3]}, ["--key", "uid", "--score", "clip"], ["1 rows", "clip"]),
        ({"uid": [*UIDS, None]}, ["--key", "uid"], ["t.parquet", "uid"]),
        ({"uid": ["0", "1"]}, ["--key", "uid"], ["t.parquet", "5 of 6 samples"]),
        ({"uid": pa.array([], pa.string())}, ["--key", "uid"], ["t.parquet", "no rows"]),
        (None, ["--key", "uid"], ["t.parquet", "Parquet"]),
        ({"uid": UIDS}, [], ["--table", "--key None"]),
    ],
    ids=[
        "another key",
        "another column",
        "no score",
        "words as scores",
        "a score without a value",
        "a negative score without a sample",
        "two scores",
        "an id without a value",
        "ids of few samples",
        "an empty table",
        "no Parquet",
        "no key",
    ],
)
def test_tables_that_do_not_fit(
    datacomp: Path, tmp_path: Path, refused: Callable[..., str], columns: dict | None, options: list[str], parts: list
) -> None:
    file = tmp_path / "t.parquet"
    file.write_bytes(b"PAR1") if columns is None else table(file, **columns)
    command = ["prepare", "weights", datacomp, tmp_path / "weights", "--table", file, *options, "--num_workers", "1"]
    if not parts:  # the negative score is the last sample's, which has no id
        cli.main([str(word) for word in command])
        return
    message = refused(*command)
    assert all(part in message for part in parts), message
    assert not (tmp_path / "weights").exists()


def test_a_score_needs_its_table(datacomp: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "--table" in refused("prepare", "weights", datacomp, tmp_path / "w", "--field", "row", "--score", "x")
