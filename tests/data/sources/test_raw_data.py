"""Raw data where shards are wanted: the error names the command that makes shards of it."""

import re
from pathlib import Path

import cv2
import datasets
import numpy as np
import pytest
import yaml

from flipscale import cli
from flipscale.data.sources.opening import open_source
from flipscale.recipe.data import DataRecipe


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with pictures and their captions in each layout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for folder in ("pictures", "parts", "data"):
        Path(folder).mkdir()
    for file in ("pictures/0.jpg", "pictures/0.txt", "list.csv", "list.jsonl"):
        Path(file).touch()
    picture = cv2.imencode(".png", np.zeros((16, 16, 3), np.uint8))[1].tobytes()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    images = datasets.Dataset.from_dict(
        {"image": 16 * [{"bytes": picture}], "text": 16 * ["a green bar"]}, features=features
    )
    images.save_to_disk("saved")
    images.to_parquet("parts/0.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("shards", "source"),
    [("list.jsonl",) * 2, ("*.csv", "list.csv"), ("pictures/*.jpg", "pictures"), ("saved",) * 2, ("parts",) * 2],
)
def test_the_error_has_the_command_that_makes_shards(shards: str, source: str, here: Path) -> None:
    before = sorted(Path().rglob("*"))
    with pytest.raises(ValueError, match=re.escape(f"no shards at {shards!r}; `flipscale prepare shards {source} ")):
        open_source(DataRecipe(shards=shards))
    assert sorted(Path().rglob("*")) == before, "an index of what is no shard"


def test_init_takes_data_sets(here: Path) -> None:
    cli.main(["prepare", "tokenizer", "saved", "tokenizer", "--vocab_size", "40"])
    cli.main(["init", "mine.yaml", "--shards", "saved", "--tokenizer", "tokenizer", "--gpu", "h100", "--hours", "1"])
    data = yaml.safe_load(Path("mine.yaml").read_text())["data"]
    assert data["sources"] == [{"dataset": "saved", "image_column": "image", "caption_columns": ["text"]}]
