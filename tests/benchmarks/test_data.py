"""benchmarks/data.py: its figures add up, and its peers are the real ones."""

from pathlib import Path

import pytest
import torch

from benchmarks import data as bench
from benchmarks.data import DataSetting, compare_data, measure_data, open_clip_batches, webdataset_batches
from flipscale.data.pairs import InputShape
from flipscale.recipe.data import DataRecipe

SHAPE = InputShape(image_size=32, patch_size=8, max_tokens=8)
SMALL = ["--image_size", "32", "--patch_size", "8", "--batch_size", "8", "--batches", "1"]


def setting(shards: Path, num_workers: int = 0) -> DataSetting:
    data = DataRecipe(shards=str(shards), tokenizer="captions", global_batch_size=8, num_workers=num_workers)
    return DataSetting(data, SHAPE, num_batches=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_figures_add_up(shards: Path, num_workers: int) -> None:
    figures = measure_data(setting(shards, num_workers))
    assert figures["images_per_s"] == pytest.approx(max(1, num_workers) * figures["images_per_s_per_worker"])
    assert figures["images_per_s_per_core"] >= figures["images_per_s_per_worker"]
    assert figures["bytes_to_device_per_image"] == 4 * 3 * 8 * 8
    assert figures["other_bytes_to_device_per_image"] == 4 * 2 + 8 * 4 + 8
    assert figures["peak_memory_bytes_per_worker"] > 2**20
    shares = [value for name, value in figures.items() if name.endswith("_share")]
    assert len(shares) == 7
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0
    assert 0 < figures["read_mb_per_s"] < figures["images_per_s"] * 0.02


def test_peers_are_the_trainers_own(shards: Path) -> None:
    pytest.importorskip("open_clip_train")
    for batches in (open_clip_batches, webdataset_batches):
        batch = next(batches(setting(shards)))
        assert (batch["pixel_values"].shape, batch["pixel_values"].dtype) == ((8, 3, 32, 32), torch.float32)
        assert (batch["input_ids"].shape, batch["input_ids"].dtype) == ((8, 8), torch.int64)
        assert -3 < batch["pixel_values"].min() < 0 < batch["pixel_values"].max() < 3


@pytest.mark.long
def test_comparison(shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("open_clip_train")
    rows = compare_data(setting(shards), ("flipscale", "open_clip"))
    assert [row["code"] for row in rows] == ["flipscale", "open_clip"]
    for row in rows:
        assert row["ratio"] == pytest.approx(rows[0]["images_per_s_per_worker"] / row["images_per_s_per_worker"])
        assert row["bytes_to_device_per_image"] == (768 if row["code"] == "flipscale" else 32 * 32 * 3 * 4)
        assert row["peak_memory_bytes_per_worker"] > 2**20
    monkeypatch.setattr(bench, "compare_data", lambda _: rows)
    bench.main(["--shards", str(shards), *SMALL])
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[2].strip() for line in table[2:]] == ["flipscale", "open_clip"]
