"""What is asked before a run begins."""

import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import add_member

from flipscale.engines.launch import place_in_world
from flipscale.evaluation.suite import build_tasks, check_decodable
from flipscale.io.errors import UserError
from flipscale.io.files import check_writable
from flipscale.training.plan import check
from flipscale.training.recipe import parse_recipe


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "output_dir is ''; name a folder"),
        ("~/runs", "output_dir is '~/runs'; name a folder, and in place of ~ the whole path"),
        ("a" * 300, "use names of at most 255 bytes"),
        ("file/run", "output_dir is 'file/run'; .*file is a file: name another folder"),
    ],
)
def test_an_output_folder_that_cannot_be(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    check_writable("new/run", "output_dir")
    with pytest.raises(ValueError, match=message):
        check_writable(name, "output_dir")


def test_an_output_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ValueError, match=rf"{tmp_path} cannot be written: change its permissions, or name another"):
        check_writable(tmp_path / "run", "output_dir")


@pytest.mark.parametrize(
    ("trackers", "message"),
    [(["paper"], "report_to.*'paper'.* aim, comet_ml"), (["tensorboard", "aim"], "report_to.*'aim'.*pip install aim")],
)
def test_trackers_that_are_not_there(write_recipe, tmp_path: Path, trackers: list[str], message: str) -> None:
    recipe = parse_recipe(["--config", str(write_recipe(tmp_path / "run", log={"report_to": trackers}))])
    with pytest.raises(UserError, match=message):
        check(recipe)


def test_a_batch_of_more_pairs_than_there_are(
    write_recipe: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for batch_size in (96, 128):
        file = write_recipe(tmp_path / "run", data={"global_batch_size": batch_size})
        check(parse_recipe(["--config", str(file)]))
    (line,) = caplog.messages
    assert line.startswith("data.global_batch_size is 128 and there are 96 pairs: every batch repeats pairs")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "x"}, "the environment has RANK='x'; it must be a whole number; unset it, or use a launcher"),
        ({"WORLD_SIZE": "-2"}, "the environment has WORLD_SIZE='-2'; it must be a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "the environment has RANK=2 and WORLD_SIZE=2; a launcher sets 0 to 1"),
    ],
)
def test_a_launcher_s_numbers_that_are_none(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_in_world(environment)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("zero_shot", {"txt": b"a red bar"}, "has class None; 16 names are listed"),
        ("retrieval", {"txt": b" "}, "has no caption; every image needs a KEY.txt"),
        ("retrieval", {"txt": b"a red bar", "jpg": b"\xff\xd8\xff no picture"}, "evaluation image .*cannot be decoded"),
    ],
)
def test_a_bad_sample_of_a_test_set_is_found_by_one_process(
    kind: str, fields: dict[str, bytes], message: str, shards: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(shards, folder)
    with tarfile.open(folder / "00000.tar") as tar:
        image = next(tar.extractfile(one).read() for one in tar if one.name.endswith("jpg"))
    with tarfile.open(folder / "00009.tar", "w") as tar:
        for ending, content in {"jpg": image, **fields}.items():
            add_member(tar, f"odd.{ending}", content)
    tasks = build_tasks([{"kind": kind, "data": str(folder)}])
    errors = []
    for rank in range(3):
        try:
            check_decodable(tasks, 32, rank, 3)
        except ValueError as error:
            errors.append(str(error))
    assert len(errors) == 1
    assert re.search(message, errors[0])
