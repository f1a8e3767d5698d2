"""Files written aside: whole or not there."""

from pathlib import Path

import pytest

from flipscale.files.aside import partial_path, write_text, written_aside


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    with written_aside(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["figures.json"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    write_text(path, "old")
    with pytest.raises(FileNotFoundError), written_aside(path) as partial:
        partial.with_name("nowhere").joinpath(str(partial.write_text("half of the n"))).touch()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["figures.json"]


def test_a_folder_is_renamed_and_what_a_kill_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "model"
    partial_path(path).mkdir()
    (partial_path(path) / "stale").touch()
    with written_aside(path) as partial:
        partial.mkdir()
        (partial / "config.json").touch()
    assert [entry.name for entry in path.iterdir()] == ["config.json"]
