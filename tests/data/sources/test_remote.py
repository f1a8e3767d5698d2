"""Shards on real servers on loopback: one that speaks S3, and plain HTTP that breaks off."""

import dataclasses
import http.server
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import numpy as np
import pytest
from conftest import write_shards
from data.conftest import Batches, assert_equal, pair_dataset
from data.sources.test_remote_servers import plainly, server
from filelock import FileLock
from moto.server import ThreadedMotoServer

from flipscale.cli import main
from flipscale.data.features import shard_fault
from flipscale.data.loader import restartable_batches
from flipscale.data.sources import remote
from flipscale.data.sources.opening import open_shards, open_source
from flipscale.data.sources.remote import ShardCache
from flipscale.data.sources.shard_index import index_path, load_index
from flipscale.recipe.data import DataRecipe


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)


@pytest.fixture(scope="module")
def bucket(shards: Path) -> Iterator[str]:
    """The shards in a bucket of an S3 server, the index of the last one next to it."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}".replace("0.0.0.0", "127.0.0.1")
    settings = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="pairs")
        load_index(shards / "00003.tar")
        for path in [*shards.glob("*.tar"), index_path(shards / "00003.tar")]:
            client.upload_file(str(path), "pairs", f"train/{path.name}")
        yield "s3://pairs/train"
    server.stop()


@contextmanager
def web(folder: Path, breaks: int) -> Iterator[tuple[str, Counter[str]]]:
    """The URL of a folder on an HTTP server, and how often each file was asked for.

    The first `breaks` times that a shard is asked for, the connection ends in its middle.
    """
    asked: Counter[str] = Counter()

    def answer(handler: http.server.BaseHTTPRequestHandler, content: bytes | None) -> None:
        breaks_off = False
        if content is not None and handler.command == "GET":
            asked[handler.path] += 1
            breaks_off = handler.path.endswith(".tar") and asked[handler.path] <= breaks
        plainly(handler, content, sent=5000 if breaks_off else None)

    with server(folder, answer) as url:
        yield url, asked


def batches(recipe: DataRecipe, tokenizer_dir: Path, steps: int = 12) -> Batches:
    return [batch for (batch,) in restartable_batches(pair_dataset(recipe, tokenizer_dir), 0, steps, 0, 1)]


def recipe_of(shards: object, cache: Path, **fields: object) -> DataRecipe:
    common = {"global_batch_size": 24, "lanes": 1, "shards_per_block": 1, "num_workers": 2, "cache_dir": str(cache)}
    return DataRecipe(shards=str(shards), **{**common, **fields})


def held(folder: Path) -> int:
    """The bytes of the files in a folder from which another process may remove some."""
    return sum(os.stat(path).st_size for path in folder.iterdir() if path.exists())


def test_s3_through_a_cache_that_holds_its_bound(
    bucket: str, shards: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three epochs by two workers, with room for two shards of four: the batches of local shards, never more bytes."""
    sizes = sorted(path.stat().st_size for path in shards.glob("*.tar"))
    bound = sizes[-1] + sizes[-2] + 4096
    assert bound < sum(sizes)
    cache, transfer, seen = tmp_path / "cache", remote.fetch, tmp_path / "seen"

    def measured(url: str, path: Path, *limits: int | None) -> None:  # by two workers
        transfer(url, path, *limits)
        with FileLock(cache / ".lock"), open(seen, "a") as file:  # no process removes a shard meanwhile
            print(held(cache), file=file)

    monkeypatch.setattr(remote, "fetch", measured)
    fetched = batches(recipe_of(f"{bucket}/*.tar", cache, cache_bytes=bound), tokenizer_dir)
    assert_equal(fetched, batches(recipe_of(shards, cache), tokenizer_dir))
    assert sizes[-1] < max(map(int, seen.read_text().split())) <= bound
    left = {path.name.rsplit("-")[-1] for path in cache.glob("[!.]*.tar")}
    assert 0 < len(left) < 4
    assert len(list(cache.glob("*.index.npy"))) == 4
    # A worker that ends amid a transfer leaves its file, which the next one to make room removes.
    ShardCache(cache, bound)._make_room(0)
    assert not list(cache.glob(".*.partial"))


def test_http_that_breaks_off_in_the_middle(shards: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Every shard's first transfer is cut; then each comes once, for all processes together."""
    served = tmp_path / "served"
    served.mkdir()
    for path in shards.glob("*.tar"):
        (served / path.name).write_bytes(path.read_bytes())
    with web(served, breaks=1) as (url, asked):
        recipe = recipe_of(f"{url}/{{00000..00003}}.tar", tmp_path / "cache")
        assert_equal(batches(recipe, tokenizer_dir), batches(recipe_of(shards, tmp_path), tokenizer_dir))
        assert {path: count for path, count in asked.items() if path.endswith(".tar")} == {
            f"/0000{number}.tar": 2 for number in range(4)
        }


def test_indices_are_written_beside_shards_in_a_bucket(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    main(["prepare", "index", bucket])
    assert "96 samples in 4 shards" in capsys.readouterr().out
    source = open_source(recipe_of(bucket, tmp_path / "another"))
    assert source.shard_sizes == [30, 17, 1, 48]
    assert not list((tmp_path / "another").glob("*.tar"))
    assert source.shard_name(1) == f"{bucket}/00001.tar"
    assert source.read(1, 3).name == "00001.tar#3"
    assert source.key(1, 3) == "000033"


def test_what_cannot_be(shards: Path, tmp_path: Path) -> None:
    missing = r"shard http://.*/00004.tar does not exist; check data.shards"
    with web(shards, breaks=0) as (url, _), pytest.raises(ValueError, match=missing):
        open_source(recipe_of(f"{url}/{{00003..00004}}.tar", tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"'nonsense://x/.*' cannot be read: .*nonsense"):
        open_source(recipe_of("nonsense://x", tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"no shards at 'file://.*nowhere"):
        open_source(recipe_of(f"file://{tmp_path}/nowhere", tmp_path / "cache"))


def test_a_node_fetches_its_lanes_shards_only(tokenizer_dir: Path, tmp_path: Path) -> None:
    """An epoch of 48 shards by one of four processes that has two lanes of eight, by two workers."""
    write_shards(tmp_path / "served", [4] * 48)
    with web(tmp_path / "served", breaks=0) as (url, asked):
        recipe = recipe_of(f"{url}/{{00000..00047}}.tar", tmp_path / "cache", lanes=8)
        source = open_source(recipe)
        asked.clear()  # without indices next to them, each was fetched once
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "cache").mkdir()
        data = pair_dataset(source, tokenizer_dir, lanes=8, shards_per_block=1, num_workers=2)
        assert len(list(restartable_batches(data, 0, 8, 1, 4))) == 8
        read = set(data.order.locate(np.array([24 * step + 6 + n for step in range(8) for n in range(6)]))[0].tolist())
        fetched = {path for path in asked if path.endswith(".tar")}
        assert len(read) == 12
        # The workers also ask for the first shards that the two lanes read in the next epoch.
        assert {f"/{shard:05d}.tar" for shard in read} <= fetched
        assert len(fetched) <= 12 + 2
        assert all(asked[f"/{shard:05d}.tar"] == 1 for shard in read)


@pytest.mark.parametrize(("num_nodes", "lanes", "held"), [(1, 3, 4), (3, 3, 2), (1, 1, 2)])
def test_the_cache_must_hold_what_a_node_reads_now_and_next(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_nodes: int, lanes: int, held: int
) -> None:
    """A shard of each of its lanes and the next one, of four shards in all."""
    monkeypatch.setenv("WORLD_SIZE", str(8 * num_nodes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    enough = sum(sorted(path.stat().st_size for path in shards.glob("*.tar"))[-held:])
    with web(shards, breaks=0) as (url, _):
        recipe = recipe_of(f"{url}/{{00000..00003}}.tar", tmp_path, lanes=lanes, cache_bytes=enough - 1)
        with pytest.raises(
            ValueError,
            match=f"cannot hold the {held} shards of .*, {enough} bytes; raise it, or lower data.lanes and data.shards",
        ):
            open_source(recipe)
        open_source(dataclasses.replace(recipe, cache_bytes=enough))


def test_what_a_killed_process_left_makes_room(shards: Path, tmp_path: Path) -> None:
    shard = shards / "00000.tar"
    cache = ShardCache(tmp_path / "cache", shard.stat().st_size + 1000)
    (tmp_path / "cache/.0123456789abcdef-00009.tar.100000.partial").write_bytes(b"half")
    other = cache.path(f"file://{shard}")
    other.with_name(f".{other.name}.{shard.stat().st_size}.partial").write_bytes(b"half")
    os.close(cache.open(f"file://{shard}"))
    assert other.read_bytes() == shard.read_bytes()
    assert not list((tmp_path / "cache").glob(".*.partial"))


def test_a_shard_whose_url_has_other_content_now(shards: Path, tmp_path: Path) -> None:
    served = tmp_path / "served"
    write_shards(served, [3, 4])
    with web(served, breaks=0) as (url, _):
        source = open_source(recipe_of(f"{url}/{{00000..00001}}.tar", tmp_path / "cache"))
        write_shards(served, [3, 30])
        for path in (tmp_path / "cache").glob("*.tar"):
            path.unlink()
        with pytest.raises(ValueError, match=r"00001.tar has \d+ bytes, \d+ when it was listed; give the new shard"):
            source.read(1, 0)


def test_a_changed_shard_in_a_bucket_is_noticed_without_its_bytes(
    bucket: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a shard with another version is fetched again; its copy here is of the earlier one."""
    source = open_shards(f"{bucket}/{{00000..00003}}.tar", recipe_of("", tmp_path / "cache"))
    (tmp_path / "shards").mkdir()
    for shard in range(4):
        content = {"state": source.shard_state(shard), "digest": source.shard_digest(shard)}
        (tmp_path / f"shards/{shard:05d}.json").write_text(json.dumps(content))
    fetched, transfer = list[str](), remote.fetch
    monkeypatch.setattr(remote, "fetch", lambda url, *rest: [fetched.append(url), transfer(url, *rest)])
    assert not any(shard_fault(tmp_path, source, shard) for shard in range(4))
    assert not fetched
    content, client = (shards / "00003.tar").read_bytes(), boto3.client("s3", region_name="us-east-1")
    try:
        client.put_object(Bucket="pairs", Key="train/00003.tar", Body=content.replace(b"a red ", b"a ted ", 1))
        assert ["00003.tar has the digest" in shard_fault(tmp_path, source, shard) for shard in range(4)] == [
            *(False, False, False, True),
        ]
    finally:
        client.put_object(Bucket="pairs", Key="train/00003.tar", Body=content)
    assert not shard_fault(tmp_path, source, 3), "the same bytes written anew are accepted"
    assert len(fetched) == 2
