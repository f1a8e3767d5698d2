"""Sets of pairs by name: downloaded from a Hub of the test's own, or read there."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from hub.loopback_hub import LoopbackHub, Repo
from hub.test_task_sets import shard

from flipscale import cli
from flipscale.data.sources import pair_set
from flipscale.data.sources.opening import open_source
from flipscale.data.sources.pair_set import read_set, set_names
from flipscale.recipe.data import DataRecipe

pytestmark = pytest.mark.usefixtures("logged_in")
CC3M = read_set("cc3m")


@pytest.fixture
def cc3m(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Repo:
    """Five shards of training and one held out, at the branch that stands for the set's commit."""
    files = {f"cc3m-train-{number:04d}.tar": shard(3 * number, 3, "txt") for number in range(5)}
    files |= {"cc3m-validation-0000.tar": shard(50, 2, "txt"), "README.md": b"# pairs", "_info.json": b"{}"}
    repo = hub.repos[CC3M.repo] = Repo(private=False)
    repo.commit(CC3M.revision, {name: hub.keep(content, name.endswith(".tar")) for name, content in files.items()})
    huggingface_hub.HfFileSystem.clear_instance_cache()
    # The file system asks the place that was named when it was imported.
    monkeypatch.setattr(huggingface_hub.hf_file_system.constants, "ENDPOINT", hub.endpoint)
    return repo


def downloads(hub: LoopbackHub) -> list[str]:
    return sorted(re.findall(r"[\w-]+\.tar", " ".join(map(str, hub.asked(r"GET .*/resolve/.*\.tar$")))))


def test_a_set_is_downloaded_once(
    hub: LoopbackHub, cc3m: Repo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cc3m"
    cli.main(["prepare", "pairs", "cc3m", str(folder)])
    assert "15 pairs in 5 shards" in capsys.readouterr().out
    assert sorted(path.name for path in (folder / "validation").glob("*.tar")) == ["cc3m-validation-0000.tar"]
    assert (folder / "train/cc3m-train-0003.tar").read_bytes() == shard(9, 3, "txt")
    assert json.loads((folder / "source.json").read_text())["commit"] == cc3m.branches[CC3M.revision]
    (folder / "train/cc3m-train-0001.tar").unlink()  # as after a kill
    (folder / "train/cc3m-train-0002.tar").write_bytes(b"cut")
    assert len(downloads(hub)) == 6
    cli.main(["prepare", "pairs", "cc3m", str(folder)])
    assert len(downloads(hub)) == 8
    assert (folder / "train/cc3m-train-0002.tar").read_bytes() == shard(6, 3, "txt")
    assert not (folder / ".download").exists()


def test_a_shard_that_arrives_otherwise_is_not_kept(
    hub: LoopbackHub, cc3m: Repo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = cc3m.files(CC3M.revision)["cc3m-train-0004.tar"]
    hub.blobs[stored.sha256] = bytes(stored.size)
    with pytest.raises(SystemExit):
        cli.main(["prepare", "pairs", "cc3m", str(tmp_path / "cc3m")])
    assert "cc3m-train-0004.tar" in capsys.readouterr().err
    assert not (tmp_path / "cc3m/train/cc3m-train-0004.tar").exists()


def test_a_set_is_read_where_it_lies(
    hub: LoopbackHub, cc3m: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = DataRecipe(shards="cc3m", cache_dir=str(tmp_path / "cache"))
    source = open_source(recipe)
    assert len(source) == 15
    assert source.read(4, 2).caption == b"picture 14"
    # A folder of this name is the user's own data.
    cli.main(["prepare", "pairs", "cc3m", "downloaded"])
    Path("downloaded/validation").rename("cc3m")
    assert len(open_source(dataclasses.replace(recipe, cache_dir=None))) == 2


def test_refusals(
    hub: LoopbackHub, cc3m: Repo, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "cc3m" in refused("prepare", "pairs", "cc4m", tmp_path / "x")
    assert "--list" in refused("prepare", "pairs", "cc3m")
    cli.main(["prepare", "pairs", "cc3m", str(tmp_path / "cc3m")])
    other = dataclasses.replace(CC3M, repo="org/other")
    monkeypatch.setattr(pair_set, "read_set", lambda name: other)
    assert CC3M.repo in refused("prepare", "pairs", "cc3m", tmp_path / "cc3m")
    assert "org/other" in refused("prepare", "pairs", "cc3m", tmp_path / "y")
    missing = dataclasses.replace(CC3M, train="train/*.tar")
    monkeypatch.setattr(pair_set, "read_set", lambda name: missing)
    assert "part train" in refused("prepare", "pairs", "cc3m", tmp_path / "z")


def test_every_set_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["prepare", "pairs", "--list"])
    printed = capsys.readouterr().out
    for name in set_names():
        one = read_set(name)
        assert one.title in printed
        assert one.sample in printed
        assert one.url.startswith(f"hf://datasets/{one.repo}@")
        assert one.train.endswith(".tar")
        assert one.pairs > 0
