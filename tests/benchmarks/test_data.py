"""The loader's benchmark: its figures add up, its peers are the real ones, and its errors say what to do."""

import importlib.metadata
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flipscale.benchmarks import data_peer
from flipscale.benchmarks.data import DataSetting, device_bytes, measure_data, workers_for_gpu
from flipscale.benchmarks.data_peer import LoaderProcess, compare_data, open_clip_batches, shards_in, webdataset_batches
from flipscale.cli import main
from flipscale.data.pairs import InputShape
from flipscale.data.recipe import DataRecipe
from flipscale.model import FlipConfig
from flipscale.planning.flops import forward_flops
from flipscale.training.recipe import parse_recipe

needs_open_clip = pytest.mark.skipif(
    importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed: pip install 'flipscale[peers]'"
)
SHAPE = InputShape(image_size=32, patch_size=8, max_tokens=8)
SMALL = ["--image_size", "32", "--patch_size", "8", "--batch_size", "8", "--batches", "1"]


def setting(shards: Path, **fields: int) -> DataSetting:
    fields = {"global_batch_size": 8, "num_workers": 0, **fields}
    data = DataRecipe(shards=str(shards), tokenizer="captions", **fields)
    return DataSetting(data, SHAPE, num_batches=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_figures_add_up(shards: Path, num_workers: int) -> None:
    figures = measure_data(setting(shards, num_workers=num_workers))
    assert figures["images_per_s"] == pytest.approx(max(1, num_workers) * figures["images_per_s_per_worker"])
    assert figures["bytes_to_device_per_image"] == 4 * 3 * 8 * 8
    assert figures["other_bytes_to_device_per_image"] == 4 * 2 + 8 * 4 + 8
    assert figures["peak_memory_bytes_per_worker"] > 2**20
    shares = [value for name, value in figures.items() if name.endswith("_share")]
    assert len(shares) == 7
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0
    assert 0 < figures["read_mb_per_s"] < figures["images_per_s"] * 0.02


def test_pixels_are_a_sixteenth_of_what_others_send(shards: Path) -> None:
    data = DataRecipe(shards=str(shards), tokenizer="captions", global_batch_size=4)
    batch = DataSetting(data).dataset().__getitems__([0, 1, 2, 3])
    assert device_bytes(batch, 4)["bytes_to_device_per_image"] == 224 * 224 * 3 * 4 / 16


def test_workers_for_a_gpu_are_its_rate_over_theirs() -> None:
    flops = forward_flops(FlipConfig.from_size("l16"), 0.75).training
    found = workers_for_gpu("l16", 0.75, 400.0, 1000.0)
    assert found["gpu_images_per_s"] == pytest.approx(400e12 / flops)
    assert found["workers_for_gpu"] == math.ceil(400e12 / flops / 1000)


def test_json_is_one_line_and_text_ends_with_the_workers(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "data", "--shards", str(shards), "--num_workers", "0", *SMALL]
    main([*command, "--json"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert json.loads(printed)["mask_ratio"] == 0.75
    main(command)
    text = capsys.readouterr().out
    assert "l16 at 75% on a GPU that reaches 400 TFLOP/s takes" in text.splitlines()[-1]
    assert "\nresize_share" in text


def test_a_recipe_says_what_is_measured(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_recipe(tmp_path / "run")
    main(
        ["bench", "data", "--recipe", str(file), "--num_workers", "0", "--batch_size", "8", "--batches", "1", "--json"]
    )
    figures = json.loads(capsys.readouterr().out)
    recipe = parse_recipe(["--config", str(file)])
    assert (figures["image_size"], figures["shards"]) == (32, recipe.data.shards)
    assert figures["mask_ratio"] == recipe.stages[0].mask_ratio


@needs_open_clip
def test_peers_make_the_batches_of_their_own_trainers(shards: Path) -> None:
    for batches in (open_clip_batches, webdataset_batches):
        batch = next(batches(setting(shards)))
        assert (batch["pixel_values"].shape, batch["pixel_values"].dtype) == ((8, 3, 32, 32), torch.float32)
        assert (batch["input_ids"].shape, batch["input_ids"].dtype) == ((8, 8), torch.int64)
        assert -3 < batch["pixel_values"].min() < 0 < batch["pixel_values"].max() < 3


@needs_open_clip
def test_comparison_has_a_row_a_loader(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = compare_data(setting(shards), ("flipscale", "open_clip"))
    assert [row["code"] for row in rows] == ["flipscale", "open_clip"]
    for row in rows:
        assert row["ratio"] == pytest.approx(rows[0]["images_per_s_per_worker"] / row["images_per_s_per_worker"])
        assert row["bytes_to_device_per_image"] == (768 if row["code"] == "flipscale" else 32 * 32 * 3 * 4)
        assert row["peak_memory_bytes_per_worker"] > 2**20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flipscale.benchmarks.data_peer.compare_data", lambda setting: rows)
        main(["bench", "compare_data", "--shards", str(shards), *SMALL])
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[2].strip() for line in table[2:]] == [row["code"] for row in rows]


def test_a_loader_that_dies_is_said_so(tmp_path: Path, shards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        LoaderProcess("flipscale", setting(tmp_path / "gone")) as loader,
        pytest.raises(OSError, match="process died; its trace"),
    ):
        loader.next_batch()
    assert "no shards at" in capfd.readouterr().err


def test_folders_of_folders_are_opened(shards: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(shards)
    assert shards_in([str(tmp_path)]) == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert shards_in([str(shards)]) == [str(shards)]
    with pytest.raises(ValueError, match="no shards at"):
        shards_in([str(tmp_path / "c")])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--mask_ratio", "1.5"], "--mask_ratio is 1.5"),
        (["--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
        (["--num_workers", "-1"], "--num_workers is -1; it must be at least 0"),
        (["--batches", "0"], "--batches is 0; it must be at least 1"),
        (["--image_size", "30"], "image_size 30 is not divisible by patch_size 8"),
        (["--shards", ""], "no shards to read; name them with --shards, or a recipe that does with --recipe"),
        (["--gpu_tflops", "0"], "--gpu_tflops is 0; it must be above 0"),
    ],
)
def test_a_wrong_setting_is_one_line(
    wrong: list[str], message: str, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "data", "--shards", str(shards), "--num_workers", "0", *SMALL, *wrong])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"flipscale: error: {message}")


def test_a_peer_that_cannot_run_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.0.2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package)
    with pytest.raises(ValueError, match=r"webdataset is 1.0.2; open_clip's loader needs 0.2.86: pip install webdat"):
        data_peer.require_data_peer()
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == "webdataset" else package)
    with pytest.raises(ValueError, match=r"webdataset is not installed; pip install 'flipscale\[peers\]'"):
        data_peer.require_data_peer()
