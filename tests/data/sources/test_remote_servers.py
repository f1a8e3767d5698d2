"""Servers that are silent, slow or lying, and caches that are not as they should be: an end in time, and bounded."""

import http.server
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_shards

from flipscale.data.sources import remote
from flipscale.data.sources.manifest import manifest_name, write_manifest
from flipscale.data.sources.opening import open_source
from flipscale.data.sources.remote import ShardCache
from flipscale.data.sources.shard_index import ShardIndex, index_path, load_index
from flipscale.recipe.data import DataRecipe


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(remote, "_SILENT_SECONDS", 0.3)
    monkeypatch.setattr(remote, "_TRIES", 3)


Answer = Callable[[http.server.BaseHTTPRequestHandler, bytes | None], None]


@contextmanager
def server(folder: Path, answer: Answer) -> Iterator[str]:
    """The URL of a server that answers each request by `answer`, which gets the file's bytes, None if there is none."""
    ended = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            file = folder / self.path.lstrip("/")
            self.ended = ended
            try:
                answer(self, file.read_bytes() if file.is_file() else None)
            except OSError:
                self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            """Nothing."""

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.daemon_threads = True
    threading.Thread(target=served.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{served.server_port}"
    finally:
        ended.set()
        served.shutdown()
        served.server_close()


def plainly(
    handler: http.server.BaseHTTPRequestHandler, content: bytes | None, length: bool = True, sent: int | None = None
) -> None:
    """Answer with a file, or with its first `sent` bytes."""
    handler.send_response(404 if content is None else 200)
    if length or content is None:
        handler.send_header("Content-Length", str(len(content or b"")))
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write((content or b"")[:sent])
    handler.close_connection = True


def recipe(url: str, cache: Path, **fields: object) -> DataRecipe:
    return DataRecipe(shards=f"{url}/{{00000..00001}}.tar", cache_dir=str(cache), lanes=1, shards_per_block=1, **fields)


@pytest.fixture
def served(tmp_path: Path) -> Path:
    write_shards(tmp_path / "served", [30, 17])
    return tmp_path / "served"


def silent(handler: http.server.BaseHTTPRequestHandler, content: bytes | None) -> None:
    handler.ended.wait()


def trickle(handler: http.server.BaseHTTPRequestHandler, content: bytes | None) -> None:
    """Send a byte of a shard now and then."""
    if not handler.path.endswith(".tar") or handler.command == "HEAD":
        return plainly(handler, content)
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content or b"")))
    handler.end_headers()
    for number in range(len(content or b"")):
        if handler.ended.wait(0.05):
            break
        handler.wfile.write((content or b"")[number : number + 1])
        handler.wfile.flush()
    return None


@pytest.mark.parametrize(("answer", "file"), [(silent, "manifest"), (trickle, "00000.tar")])
def test_a_server_that_is_too_slow(answer: Answer, file: str, served: Path, tmp_path: Path) -> None:
    message = rf"{file} could not be fetched in \d tries \(\d+ bytes came in 0.3 seconds\)"
    with server(served, answer) as url, pytest.raises(OSError, match=message):
        open_source(recipe(url, tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*.tar"))


@pytest.mark.parametrize("length", [False, True])
def test_a_server_that_never_ends(served: Path, tmp_path: Path, length: bool) -> None:
    """Without a length, more than the cache may hold is not written; with one, not more than it."""
    most = [0]

    def endless(handler: http.server.BaseHTTPRequestHandler, content: bytes | None) -> None:
        if content is None or (handler.command == "HEAD" and length):
            return plainly(handler, content)
        handler.send_response(200)
        handler.end_headers()
        while handler.command == "GET":
            handler.wfile.write(bytes(1 << 16))
            sizes = [path.stat().st_size for path in (tmp_path / "cache").glob(".*.partial") if path.exists()]
            most[0] = max([most[0], *sizes])
        return None

    message = r"more than \d+ bytes came" if length else "more than 1000000 bytes came"
    with server(served, endless) as url, pytest.raises(OSError, match=message):
        open_source(recipe(url, tmp_path / "cache", cache_bytes=1_000_000))
    assert most[0] < 3_000_000
    assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.parametrize("flaps", [0, 3])
def test_errors_of_a_server_are_no_missing_shards(served: Path, tmp_path: Path, flaps: int) -> None:
    """503 is tried again; it does not mean that there is no manifest or no shard. Then it answers without lengths."""
    asked = [0]

    def flapping(handler: http.server.BaseHTTPRequestHandler, content: bytes | None) -> None:
        asked[0] += 1
        if not flaps or asked[0] <= flaps:
            handler.send_error(503)
        else:
            plainly(handler, content, length=False)

    with server(served, flapping) as url:
        if flaps:
            assert len(open_source(recipe(url, tmp_path / "cache"))) == 47
        else:
            with pytest.raises(OSError, match=r"shards-.*manifest could not be fetched in \d tries \(503"):
                open_source(recipe(url, tmp_path / "cache"))


def test_an_index_of_another_shard_beside_a_shard(served: Path, tmp_path: Path) -> None:
    """An index of a shard of another size is not used, nor one without a digest."""
    rows = load_index(served / "00000.tar").rows
    first, second = (index_path(served / f"0000{shard}.tar") for shard in (0, 1))
    load_index(served / "00001.tar")
    first.write_bytes(second.read_bytes())
    np.save(second, rows)
    with server(served, plainly) as url:
        assert open_source(recipe(url, tmp_path / "cache")).shard_sizes == [30, 17]


def test_shards_that_have_another_size_now_are_listed_anew(served: Path, tmp_path: Path) -> None:
    with server(served, plainly) as url:
        assert open_source(recipe(url, tmp_path / "cache")).shard_sizes == [30, 17]
        write_shards(served, [30, 5])
        source = open_source(recipe(url, tmp_path / "cache"))
        assert source.shard_sizes == [30, 5]
        assert [source.read(1, number).name for number in range(5)]
        (served / "00001.tar").unlink()
        with pytest.raises(ValueError, match=r"shard \S+/00001.tar does not exist; check data.shards"):
            open_source(recipe(url, tmp_path / "cache"))
        source._open.clear()
        source._indices.clear()
        for path in (tmp_path / "cache").glob("*-00001.tar*"):
            path.unlink()
        with pytest.raises(ValueError, match=r"shard \S+/00001.tar is gone, but its manifest lists it"):
            source.read(1, 0)


@pytest.mark.parametrize("signs", [False, True])
def test_a_way_that_the_environment_or_the_server_names(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signs: bool
) -> None:
    """A proxy, and redirects to addresses that change with each request. The manifest is kept once."""
    with server(served, plainly) as url:
        open_source(recipe(url, tmp_path / "first"))
    (manifest,) = (tmp_path / "first").glob("*.manifest")
    (served / manifest_name("{00000..00001}.tar")).write_bytes(manifest.read_bytes())
    signatures = itertools.count()

    def proxy(handler: http.server.BaseHTTPRequestHandler, content: bytes | None) -> None:
        path, _, signature = handler.path.removeprefix("http://shards.invalid/").partition("?")
        if signature or not signs:
            return plainly(handler, (served / path).read_bytes())
        handler.send_response(302)
        handler.send_header("Location", f"/{path}?{next(signatures)}")
        handler.send_header("Content-Length", "0")
        return handler.end_headers()

    with server(served, proxy) as url:
        monkeypatch.setenv("http_proxy", url)
        monkeypatch.delenv("no_proxy", raising=False)
        for _ in range(2):
            assert len(open_source(recipe("http://shards.invalid", tmp_path / "cache"))) == 47
    assert len(list((tmp_path / "cache").glob("*.manifest"))) == 1


def test_a_manifest_that_names_files_of_this_machine(served: Path, tmp_path: Path) -> None:
    pattern = "{00000..00001}.tar"
    shards = [("file:///etc/passwd", ShardIndex(np.zeros((0, 3, 2), np.uint32), "", 10, 0))]
    write_manifest(served / manifest_name(pattern), pattern, shards, [], rows=False)
    with (
        server(served, plainly) as url,
        pytest.raises(ValueError, match=r"names 'file:///etc/passwd', which is on another server"),
    ):
        open_source(recipe(url, tmp_path / "cache"))


def test_a_copy_in_the_cache_that_is_damaged_is_fetched_again(served: Path, tmp_path: Path) -> None:
    with server(served, plainly) as url:
        source = open_source(recipe(url, tmp_path / "cache"))
        copy = source.cache.path(f"{url}/00001.tar")
        wanted = source.read(1, 3).image
        for spoil in (lambda: os.truncate(copy, 100), copy.unlink, lambda: (copy.unlink(), os.mkfifo(copy))):
            spoil()
            source._open.clear()
            assert source.read(1, 3).image == wanted
        for manifest in (tmp_path / "cache").glob("*.manifest"):
            manifest.write_bytes(b"junk")
        for index in (tmp_path / "cache").glob("*.index.npy"):
            index.write_bytes(b"junk")
        assert open_source(recipe(url, tmp_path / "cache")).read(1, 3).image == wanted


def test_only_shards_read_now_and_next_stay_open_with_their_indices(tmp_path: Path) -> None:
    write_shards(tmp_path / "served", [3] * 4)
    with server(tmp_path / "served", plainly) as url:
        wanted = recipe(url, tmp_path / "cache")
        source = open_source(replace(wanted, shards=wanted.shards.replace("00001", "00003")))
        for before, shard in itertools.pairwise((3, 0, 1, 2, 3, 0)):
            assert source.read(before, 0).image
            assert source.read(shard, 0).image
            assert [*source._open] == [*source._indices] == [before, shard]


def test_a_cache_removes_its_own_files_only(served: Path, tmp_path: Path) -> None:
    cache = tmp_path / "home"
    (cache / "letters").mkdir(parents=True)
    (cache / "thesis.tar").write_bytes(bytes(5000))
    (cache / ".my.partial").write_bytes(b"mine")
    (cache / f"{0:016x}-00009.tar.index.npy").write_bytes(bytes(5000))
    most = (served / "00000.tar").stat().st_size + 100
    kept = ShardCache(cache, most)
    for shard in (0, 1):
        os.close(kept.open(f"file://{served}/0000{shard}.tar"))
    assert {path.name for path in cache.iterdir() if not remote._OURS.fullmatch(path.name)} == {
        "letters", "thesis.tar", ".my.partial", ".lock",
    }  # fmt: skip
    assert len(list(cache.glob("[!.]*-0000*.tar*"))) == 1


def test_caches_that_are_too_small_or_cannot_be_made(served: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"00000.tar has \d+ bytes, which do not fit into data.cache_bytes 10"):
        ShardCache(tmp_path / "cache", 10).open(f"file://{served}/00000.tar")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data.cache_dir is .*file"):
        ShardCache(tmp_path / "file", 10)
