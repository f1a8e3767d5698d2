"""Raw data where shards are wanted: the error says what it is, and names the command or the flags for it."""

import re
import shlex
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


def refusal(shards: str) -> str:
    before = sorted(Path().rglob("*"))
    with pytest.raises(ValueError, match=re.escape(f"no shards at {shards!r}; ")) as raised:
        open_source(DataRecipe(shards=shards))
    assert sorted(Path().rglob("*")) == before, "an index of what is no shard"
    return str(raised.value)


@pytest.mark.parametrize(
    ("shards", "source"),
    [
        ("list.jsonl", "list.jsonl"),
        ("*.csv", "list.csv"),
        ("parts/0.parquet", "parts/0.parquet"),
        ("pictures/", "pictures/"),
        ("pictures/*.jpg", "pictures"),
        ("saved", "saved"),
    ],
)
def test_the_error_has_the_command_that_makes_shards(shards: str, source: str, here: Path) -> None:
    folder = f"data/{Path(source).stem}"
    assert shlex.split(refusal(shards).split("`")[1]) == ["flipscale", "prepare", "shards", source, folder]
    Path(folder).mkdir()
    assert refusal(shards).split("`")[1].split()[4] == f"{folder}_shards"


@pytest.mark.parametrize(
    ("shards", "writes"),
    [("data/demo/train", True), ("data/demo", True), ("data/demographics", False), ("data/mine2", False)],
)
def test_only_the_folders_of_the_pages_name_their_commands(shards: str, writes: bool, here: Path) -> None:
    assert ("writes them" in refusal(shards)) == writes


@pytest.mark.parametrize("shards", ["parts", "parts/*.parquet"])
def test_the_flags_of_the_error_read_parquet_files(shards: str, here: Path, tokenizer_dir: Path) -> None:
    from flipscale.start.complete_recipe import parse_recipe

    flags = shlex.split(refusal(shards).split(" give ")[1].replace("[caption]", "[text]"))
    recipe = parse_recipe(["--data.shards", "elsewhere", "--data.tokenizer", str(tokenizer_dir), *flags])
    assert (recipe.data.shards, recipe.data.sources[0].dataset) == (None, shards)
    assert open_source(recipe.data).read(0, 0).captions == (b"a green bar",)


@pytest.mark.parametrize("shards", ["saved", pytest.param("parts", marks=pytest.mark.long)])
def test_init_takes_data_sets(shards: str, here: Path) -> None:
    cli.main(["prepare", "tokenizer", shards, "tokenizer", "--vocab_size", "40"])
    cli.main(["init", "mine.yaml", "--shards", shards, "--tokenizer", "tokenizer", "--gpu", "h100", "--hours", "1"])
    data = yaml.safe_load(Path("mine.yaml").read_text())["data"]
    assert data["sources"] == [{"dataset": shards, "image_column": "image", "caption_columns": ["text"]}]
