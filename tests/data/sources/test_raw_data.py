"""Raw data where shards are wanted: the error says what it is, and its command makes shards of it."""

import csv
import re
import shlex
from pathlib import Path

import cv2
import datasets
import numpy as np
import pytest
from conftest import COLOURS, SHAPES, draw, write_shards

from flipscale import cli
from flipscale.data.sources.opening import open_source
from flipscale.recipe.data import DataRecipe

PAIRS = 24


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with pictures and their captions in each layout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rng, rows = np.random.default_rng(0), []
    for number in range(PAIRS):
        colour, shape = list(COLOURS)[number % 4], SHAPES[number // 4 % 4]
        file = Path("pictures", f"{number}.jpg")
        file.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(file), draw(colour, shape, rng))
        file.with_suffix(".txt").write_text(f"a {colour} {shape}")
        rows.append({"file_name": str(file), "text": f"a {colour} {shape}"})
    with open("list.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["file_name", "text"])
        table.writeheader()
        table.writerows(rows)
    content = [Path(row["file_name"]).read_bytes() for row in rows]
    columns = {"image": [{"bytes": one} for one in content], "text": [row["text"] for row in rows]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    images = datasets.Dataset.from_dict(columns, features=features)
    images.save_to_disk("saved")
    Path("parts").mkdir()
    images.to_parquet("parts/0.parquet")
    return tmp_path


def refusal(shards: str) -> str:
    before = sorted(Path().rglob("*"))
    with pytest.raises(ValueError, match=re.escape(f"no shards at {shards!r}; ")) as raised:
        open_source(DataRecipe(shards=shards))
    assert sorted(Path().rglob("*")) == before, "an index of what is no shard"
    return str(raised.value)


@pytest.mark.parametrize(
    ("shards", "kind", "source"),
    [
        ("*.csv", "a table", "list.csv"),
        ("pictures/", "pictures", "pictures/"),
        ("pictures/*.jpg", "pictures", "pictures"),
        ("saved", "a saved data set", "saved"),
    ],
)
def test_the_command_of_the_error_makes_shards(shards: str, kind: str, source: str, here: Path) -> None:
    line = refusal(shards)
    assert f"it is {kind}: " in line
    command = shlex.split(line.split("`")[1])
    assert command[:4] == ["flipscale", "prepare", "shards", source]
    cli.main([*command[1:], "--num_workers", "1"])
    assert len(open_source(DataRecipe(shards=command[4]))) == PAIRS
    assert refusal(shards).split("`")[1].split()[4] == f"{command[4]}_shards"


def test_places_that_shards_are_near_to(here: Path) -> None:
    for part in ("train", "test"):
        write_shards(Path("set", part), [3])
    assert refusal("set").endswith("name the folder of its shards: set/test or set/train")
    write_shards(Path("mixed"), [3])
    (here / "mixed/sheet.png").write_bytes(Path("pictures/0.jpg").read_bytes())
    assert len(open_source(DataRecipe(shards="mixed/*", max_bad_fraction=0.5))) == 3
    assert refusal("nowhere").endswith("name a folder of *.tar, a glob, or a range like {00000..00041}.tar")


@pytest.mark.parametrize("shards", ["parts", "parts/*.parquet"])
def test_the_flags_of_the_error_read_parquet_files(shards: str, here: Path, tokenizer_dir: Path) -> None:
    from flipscale.runs.complete_recipe import parse_recipe

    flags = shlex.split(refusal(shards).split(" give ")[1].replace("[caption]", "[text]"))
    recipe = parse_recipe(["--data.shards", "elsewhere", "--data.tokenizer", str(tokenizer_dir), *flags])
    assert (recipe.data.shards, recipe.data.sources[0].dataset) == (None, shards)
    assert open_source(recipe.data).read(0, 5).captions == (b"a green bar",)
