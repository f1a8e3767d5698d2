"""Every kind of source feeds the same loader; a mixture keeps its shares."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, Features, Image, List, Value

from flipscale.data.samples import MissingCaption
from flipscale.data.sources.opening import Mixture, open_source
from flipscale.data.sources.tar import TarSource
from flipscale.recipe.data import DataRecipe, SourceRecipe
from flipscale.recipe.recipe import differences, to_yaml
from flipscale.start.complete_recipe import parse_recipe


@pytest.fixture(scope="module")
def rows(shards: Path) -> list[dict]:
    """The pairs of the shards as rows, the second without a caption."""
    source = TarSource(str(shards))
    found = [source.read(shard, number) for shard, size in enumerate(source.shard_sizes) for number in range(size)]
    return [
        {
            "picture": {"bytes": sample.image, "path": None},
            "title": None if row == 1 else sample.caption.decode(),
            "more": [] if row == 1 else ["a red disc", "a blue bar"],
            "raw": sample.image,
        }
        for row, sample in enumerate(found)
    ]


FEATURES = Features(
    {"picture": Image(), "title": Value("string"), "more": List(Value("string")), "raw": Value("binary")}
)


def as_arrow(rows: list[dict], folder: Path) -> str:
    Dataset.from_list(rows, FEATURES).save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_folder_of_parquet(rows: list[dict], folder: Path) -> str:
    (folder / "parts").mkdir()
    for part in range(2):
        Dataset.from_list(rows[48 * part : 48 * part + 48], FEATURES).to_parquet(folder / f"parts/{part}.parquet")
    return str(folder / "parts")


@pytest.mark.parametrize("write", [as_arrow, as_folder_of_parquet])
@pytest.mark.parametrize("image_column", ["picture", "raw"])
def test_a_dataset_by_its_columns(
    rows: list[dict], tmp_path: Path, write: Callable[[list[dict], Path], str], image_column: str
) -> None:
    recipe = SourceRecipe(dataset=write(rows, tmp_path), image_column=image_column, caption_columns=["title", "more"])
    source = open_source(DataRecipe(sources=[recipe]))
    assert source.shard_sizes == [96]
    for number in (0, 2, 95):
        sample = source.read(0, number)
        assert sample.image == rows[number]["raw"]
        assert sample.captions == (rows[number]["title"].encode(), b"a red disc", b"a blue bar")
    with pytest.raises(MissingCaption):
        source.read(0, 1)


def test_a_dataset_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"dataset 'no/such\.parquet', split 'train'"):
        open_source(DataRecipe(sources=[SourceRecipe(dataset="no/such.parquet")]))


def test_a_mixture_that_cannot_be(shards: Path, rows: list[dict], tmp_path: Path) -> None:
    source = TarSource(str(shards))
    with pytest.raises(ValueError, match=r"data.sources\[1\].weight is 0 of 1; .* at least 0.0001"):
        Mixture([source, source], [1, 0])
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(ValueError, match=r"data.sources\[1\] is empty: 0 samples in 1 shards"):
        Mixture([source, TarSource(str(tmp_path / "empty.tar"))], [1, 1])
    with pytest.raises(ValueError, match="has no column 'image'; it has picture, title, more, raw"):
        open_source(DataRecipe(sources=[SourceRecipe(dataset=as_arrow(rows, tmp_path))]))


def test_sources_in_a_recipe(tmp_path: Path) -> None:
    """They are read from YAML and written back; on resume a source may move, its weight may not change."""
    (tmp_path / "r.yaml").write_text("data: {sources: [{shards: a, weight: 2}, {dataset: b, weight: 1}]}")
    recipe = parse_recipe(["--config", str(tmp_path / "r.yaml")])
    assert recipe.data.sources == [SourceRecipe(shards="a", weight=2.0), SourceRecipe(dataset="b", weight=1.0)]
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert parse_recipe(["--config", str(tmp_path / "again.yaml")]) == recipe
    saved = yaml.safe_load(to_yaml(recipe))
    saved["data"]["sources"][0]["shards"] = "elsewhere"
    assert differences(recipe, saved) == []
    saved["data"]["sources"][0]["weight"] = 3.0
    assert differences(recipe, saved) == ["data.sources[0].weight: 3.0, now 2.0"]


def test_missing_data_of_the_demo_is_told_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for shards, command in (("demo/train", "python examples/demo/data.py"), ("mine/train", "flipscale prepare shards")):
        with pytest.raises(ValueError, match=f"no shards at 'data/{shards}'; `{command} .*`.* writes them"):
            open_source(DataRecipe(shards=f"data/{shards}"))
