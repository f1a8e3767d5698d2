"""Atomic writes of files and folders."""

import errno
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flipscale.io.atomic import FullDisk, atomic_write, new_folder, partial_path, sync, unique_partial_path, write_text


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_file_is_whole_or_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    with atomic_write(path) as partial:
        partial.write_text("old")
        assert not path.exists()
    with pytest.raises(FileNotFoundError), atomic_write(path) as partial:
        partial.with_name("nowhere").joinpath(str(partial.write_text("half of the n"))).touch()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["figures.json"]


def test_folder_replaces_a_folder_and_remains_of_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for folder, file in ((path, "old.txt"), (partial_path(path), "stale")):
        folder.mkdir()
        (folder / file).touch()
    with atomic_write(path) as partial:
        partial.mkdir()
        (partial / "new.txt").touch()
        assert names(path) == ["old.txt"]
    assert names(path) == ["new.txt"]
    assert names(tmp_path) == ["model"]


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    with ThreadPoolExecutor(1) as pool:
        assert unique_partial_path(path) != pool.submit(unique_partial_path, path).result()
    with atomic_write(path, unique_partial_path(path)) as partial:
        assert partial.parent == tmp_path
        write_text(path, "theirs")
        partial.write_text("ours")
    assert path.read_text() == "ours"
    assert names(tmp_path) == ["a.npy"]


def test_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "models" / "small"
    with pytest.raises(FileNotFoundError), new_folder(path) as folder:
        (folder / "nowhere" / str((folder / "half").touch())).touch()
    assert names(path.parent) == []
    with new_folder(path) as folder:
        (folder / "config.json").touch()
    assert names(path) == ["config.json"]
    with pytest.raises(ValueError, match="small is there already; name another folder"), new_folder(path):
        pass


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """By the error of the system, and by numpy's of a short write."""
    for error in (OSError(errno.ENOSPC, "No space left on device"), OSError("122880 requested and 28608 written")):
        path = tmp_path / "rows.npy"
        says = rf"^rows.npy needs more than .* bytes .*{tmp_path} has free"
        with pytest.raises(FullDisk, match=says) as raised:
            _fail(path, error)
        assert pickle.loads(pickle.dumps(raised.value)).errno == errno.ENOSPC  # as it comes from a worker
        assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"^\[Errno 5\] failed$"):
        _fail(path, OSError(errno.EIO, "failed"))


def _fail(path: Path, error: OSError) -> None:
    with atomic_write(path) as partial:
        partial.write_bytes(b"x")
        raise error


def test_a_folder_that_its_file_system_cannot_sync(tmp_path: Path) -> None:
    sync(Path("/proc/self"))  # EINVAL, as in shared folders of SMB
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "none")
