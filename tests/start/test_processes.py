"""What is asked before a run begins."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from flipscale.io.paths import check_writable
from flipscale.pretrain import pretrain
from flipscale.start import processes as stages
from flipscale.start.complete_recipe import parse_recipe
from flipscale.start.setup import open_setup


def test_an_output_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ValueError, match=rf"{tmp_path} cannot be written: change its permissions, or name another"):
        check_writable(tmp_path / "run", "output_dir")


def test_checkpoints_that_cannot_be_written(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    recipe = parse_recipe(["--config", str(write_recipe(tmp_path / "run"))])
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "checkpoints")
    with pytest.raises(ValueError, match=f"checkpoints is '{tmp_path}/run/checkpoints'; .* cannot be written"):
        pretrain(recipe)


def test_a_batch_of_more_pairs_than_there_are(
    write_recipe: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for batch_size in (96, 128):
        file = write_recipe(tmp_path / "run", data={"global_batch_size": batch_size})
        open_setup(parse_recipe(["--config", str(file)]))
    (line,) = caplog.messages
    assert line.startswith("data.global_batch_size is 128 and there are 96 pairs: every batch repeats pairs")


def test_workers_inherit_the_cores_that_accelerate_chooses(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = os.sched_getaffinity(0)

    def stop(modules: Sequence[str]) -> None:
        raise InterruptedError(sorted(os.sched_getaffinity(0)))

    monkeypatch.setattr(stages, "start_accelerator", lambda *_, **__: os.sched_setaffinity(0, {min(cores)}))
    monkeypatch.setattr(stages, "prepare_workers", stop)
    recipe = parse_recipe(["--config", str(write_recipe(tmp_path / "run"))])
    try:
        with pytest.raises(InterruptedError, match=rf"^\[{min(cores)}\]$"):
            stages.start_processes(recipe)
    finally:
        os.sched_setaffinity(0, cores)
