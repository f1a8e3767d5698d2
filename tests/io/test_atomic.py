"""Files written aside: whole or not there."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flipscale.io.atomic import atomic_write, new_folder, partial_path, unique_partial_path, write_text


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["figures.json"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    write_text(path, "old")
    with pytest.raises(FileNotFoundError), atomic_write(path) as partial:
        partial.with_name("nowhere").joinpath(str(partial.write_text("half of the n"))).touch()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["figures.json"]


def test_a_folder_is_renamed_and_what_a_kill_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "model"
    partial_path(path).mkdir()
    (partial_path(path) / "stale").touch()
    with atomic_write(path) as partial:
        partial.mkdir()
        (partial / "config.json").touch()
    assert [entry.name for entry in path.iterdir()] == ["config.json"]


def test_a_folder_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "old.txt").touch()
    with atomic_write(path) as partial:
        partial.mkdir()
        (partial / "new.txt").touch()
        assert [entry.name for entry in path.iterdir()] == ["old.txt"]
    assert [entry.name for entry in path.iterdir()] == ["new.txt"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_two_writers_of_one_file_have_names_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    with ThreadPoolExecutor(1) as pool:
        names = {unique_partial_path(path), pool.submit(unique_partial_path, path).result()}
    assert len(names) == 2
    for name in names:
        assert name.parent == tmp_path
        assert name.name.startswith(".a.npy.partial.")
    with atomic_write(path, unique_partial_path(path)) as partial:
        write_text(path, "theirs")
        partial.write_text("ours")
    assert path.read_text() == "ours"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npy"]


def test_a_new_folder_must_be_new(tmp_path: Path) -> None:
    path = tmp_path / "models" / "small"
    with pytest.raises(FileNotFoundError), new_folder(path) as folder:
        (folder / "nowhere" / str((folder / "half").touch())).touch()
    assert list(path.parent.iterdir()) == []
    with new_folder(path) as folder:
        (folder / "config.json").touch()
    assert [entry.name for entry in path.iterdir()] == ["config.json"]
    with pytest.raises(ValueError, match="small is there already; name another folder or remove it"), new_folder(path):
        pass
