"""One manifest of all shards: what it lists, who writes it, when it is stale, and how few files a rank opens."""

import multiprocessing
import os
import pickle
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import write_shards
from data.conftest import write_tar

from flipscale.cli import main
from flipscale.data.sources import manifest as shard_list
from flipscale.data.sources.tar import StaleManifest, TarSource


def write_tiny(folder: Path, count: int, samples: int = 2) -> None:
    """Shards of a few bytes a sample."""
    for shard in range(count):
        images = {f"{number}.jpg": b"%d of %d" % (number, shard) for number in range(samples)}
        write_tar(folder / f"{shard:05d}.tar", images | {f"{number}.txt": b"caption" for number in range(samples)})


_watched: list[Counter[str]] = []


def _hook(event: str, arguments: tuple) -> None:
    if _watched and event in ("open", "os.listdir", "os.scandir"):
        _watched[-1][f"{event} {arguments[0]}"] += 1


@contextmanager
def file_operations(folder: Path) -> Iterator[list[str]]:
    """Every open and listing of `folder` and what is in it, in the list at the end."""
    if not hasattr(sys, "_flipscale_hook"):
        sys.addaudithook(_hook)
        sys._flipscale_hook = True
    _watched.append(Counter())
    found: list[str] = []
    try:
        yield found
    finally:
        found += [event for event in _watched.pop().elements() if str(folder) in event]


def test_a_rank_opens_the_manifest_and_no_shard_whatever_their_number(tmp_path: Path) -> None:
    """500 shards, 16 ranks in turn: the first writes the manifest, the others open one file each and list none."""
    write_tiny(tmp_path, 500)
    sources = []
    for rank in range(16):
        with file_operations(tmp_path) as operations:
            sources.append(TarSource(str(tmp_path)))
        if rank:
            assert len(operations) == 1, operations
            assert not [operation for operation in operations if "dir" in operation]
    assert all(source.shard_sizes == [2] * 500 for source in sources)
    source = pickle.loads(pickle.dumps(sources[-1]))
    with file_operations(tmp_path) as operations:
        for shard in (3, 499, 3, 499, 7):
            assert source.read(shard, 1).image == b"1 of %d" % shard
    assert len(operations) == 1 + 3, "the manifest for its rows, and each shard once"


def test_a_manifest_is_of_what_was_named(tmp_path: Path) -> None:
    """Folder and glob share one; a range and folders of folders have their own; each knows its own shards."""
    write_tiny(tmp_path / "a", 3)
    write_tiny(tmp_path / "b-c", 2)
    write_tiny(tmp_path / "b", 2)
    assert len(TarSource(f"{tmp_path}/a")) == len(TarSource(f"{tmp_path}/a/")) == len(TarSource(f"{tmp_path}/a/*.tar"))
    assert [path.name for path in (tmp_path / "a").glob("*.manifest")] == ["shards.manifest"]
    some = TarSource(f"{tmp_path}/a/{{00001..00002}}.tar")
    assert [some.shard_name(shard) for shard in range(2)] == [f"{tmp_path}/a/0000{n}.tar" for n in (1, 2)]
    every = TarSource(f"{tmp_path}/*/*.tar")
    paths = sorted(tmp_path.glob("*/*.tar"))
    assert [every.shard_name(shard) for shard in range(7)] == [str(path) for path in paths]
    assert [every.read(shard, 1).image for shard in range(7)] == [b"1 of %d" % int(path.stem) for path in paths]
    assert len(TarSource(f"{tmp_path}/a/00001.tar")) == 2
    shutil.move(tmp_path / "a", tmp_path / "moved")
    manifest = (tmp_path / "moved/shards.manifest").stat().st_ino
    assert TarSource(f"{tmp_path}/moved").read(2, 0).image == b"0 of 2"
    assert (tmp_path / "moved/shards.manifest").stat().st_ino == manifest, "it moves with its folder"


def a_tick_later(folder: Path) -> None:
    """Let the folder's time differ from before: changes within a tick of the system's clock share theirs."""
    os.utime(folder, ns=(folder.stat().st_mtime_ns + 10**9,) * 2)


def test_shards_that_come_and_go_are_seen(tmp_path: Path) -> None:
    write_tiny(tmp_path, 3)
    assert len(TarSource(str(tmp_path)).shard_sizes) == 3
    (tmp_path / "readme").touch()
    a_tick_later(tmp_path)
    for lists in (1, 0):  # the folder changed, its shards did not
        with file_operations(tmp_path) as operations:
            TarSource(str(tmp_path))
        assert sum("dir" in operation for operation in operations) == lists
    write_tiny(tmp_path, 5)
    a_tick_later(tmp_path)
    assert len(TarSource(str(tmp_path)).shard_sizes) == 5
    (tmp_path / "00001.tar").unlink()
    a_tick_later(tmp_path)
    assert len(TarSource(str(tmp_path)).shard_sizes) == 4


def test_a_shard_that_is_replaced_stops_whoever_opens_it(tmp_path: Path) -> None:
    """By another size, by one of the same size, and by nothing; a copy with another time is the same shard."""
    write_tiny(tmp_path, 4)
    shard = tmp_path / "00001.tar"
    fresh = pickle.dumps(TarSource(str(tmp_path)))
    os.utime(shard, ns=(1, 1))
    assert pickle.loads(fresh).read(1, 0).image == b"0 of 1"
    content = shard.read_bytes()

    def refused(why: str) -> None:
        with pytest.raises(StaleManifest, match=rf"shard {shard} {why}.*write the manifest anew"):
            pickle.loads(fresh).read(1, 0)

    shard.write_bytes(content[:512] + bytes(len(content) - 512))
    refused("was rewritten")
    shard.write_bytes(content + bytes(10240))
    refused(f"has {len(content) + 10240} bytes, {len(content)} when")
    shard.unlink()
    refused("is gone")
    with pytest.raises(ValueError, match=rf"shard {shard} does not exist; check data.shards"):
        TarSource(f"{tmp_path}/{{00000..00003}}.tar")


def test_a_damaged_manifest(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It is refused with one sentence, whose command mends it."""
    write_tiny(tmp_path, 2)
    TarSource(str(tmp_path))
    path = tmp_path / "shards.manifest"
    whole = path.read_bytes()
    remedy = re.escape(f"; write the manifest anew with `flipscale prepare index {tmp_path}`")
    for spoilt, message in (
        (whole.replace(b"manifest 2\n", b"manifest 3\n", 1), "is not a manifest of this version"),
        (whole[:-60] + b"\xff" + whole[-59:], f"is cut short or damaged, at {len(whole)} bytes"),
    ):
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match=f"{path} {message}.*{remedy}$"):
            TarSource(str(tmp_path))
    main(["prepare", "index", str(tmp_path)])
    assert "4 samples in 2 shards" in capsys.readouterr().out
    assert len(TarSource(str(tmp_path))) == 4


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest goes to the user's cache; one that is next to the shards already is read there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tiny(tmp_path / "data", 2)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "data" and access(path, mode))
    assert TarSource(str(tmp_path / "data")).read(1, 1).image == b"1 of 1"
    (written,) = (tmp_path / "cache/flipscale/manifests").glob("*-shards.manifest")
    assert not list((tmp_path / "data").glob("*.manifest"))
    with file_operations(tmp_path) as operations:
        TarSource(str(tmp_path / "data"))
    assert len(operations) == 1, "that in the cache"
    written.rename(tmp_path / "data/shards.manifest")
    assert TarSource(str(tmp_path / "data")).manifest.path == tmp_path / "data/shards.manifest"
    (tmp_path / "data/shards.manifest").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"no manifest of .* can be written to .*data nor .*manifests"):
        TarSource(str(tmp_path / "data"))


def _open_in_a_process(folder: str, queue: multiprocessing.Queue) -> None:
    scanned = []
    build = shard_list.load_index
    shard_list.load_index = lambda shard: (scanned.append(1), build(shard))[1]
    queue.put((sum(TarSource(folder).shard_sizes), len(scanned)))


def test_one_process_writes_and_the_others_wait(tmp_path: Path) -> None:
    write_tiny(tmp_path, 30)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_open_in_a_process, args=(str(tmp_path), queue)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(found) == [(60, 0), (60, 0), (60, 0), (60, 30)]


def test_own_files_are_no_shards(tmp_path: Path) -> None:
    """`DIR/*` also matches the indices and the manifest that the first start wrote."""
    write_shards(tmp_path, [3, 2])
    for _ in range(2):
        source = TarSource(f"{tmp_path}/*")
        assert (source.shard_sizes, source.faults) == ([3, 2], [])
