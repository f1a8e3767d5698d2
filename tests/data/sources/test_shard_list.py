"""Processes that wait for the one that writes a manifest."""

import os
from pathlib import Path

import pytest
from filelock import FileLock

from flipscale.data.sources import manifest as shard_list
from flipscale.data.sources.manifest import in_windows, written_once
from flipscale.data.sources.tar import TarSource


def never() -> None:
    raise AssertionError("it was written")


def test_a_writer_that_gives_no_sign_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_list, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(shard_list, "_SILENT_SECONDS", 0.1)
    with FileLock(tmp_path / ".manifest.lock"), pytest.raises(OSError, match="has indexed no shard for 0 minutes; end"):
        written_once(tmp_path / "manifest", lambda _: None, never)


def test_a_shard_that_is_indexed_is_a_sign(tmp_path: Path) -> None:
    lock = tmp_path / ".manifest.lock"
    lock.touch()
    os.utime(lock, (0, 0))
    for _ in in_windows(str, [1], never, tmp_path / "manifest"):
        assert lock.stat().st_mtime == 0
    assert lock.stat().st_mtime > 0


@pytest.mark.parametrize("shards", ["*.tar", "nothing.tar", "{0..3}.tar"])
def test_where_there_are_no_shards_nothing_is_left(tmp_path: Path, shards: str) -> None:
    with pytest.raises(ValueError, match=r"no shards at|0.tar does not exist"):
        TarSource(f"{tmp_path}/{shards}")
    assert not list(tmp_path.iterdir())
