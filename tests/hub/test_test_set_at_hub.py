"""A test set that stays on the Hub: its shards and text files come through the cache of training."""

import dataclasses
import functools
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from accelerate import Accelerator
from evaluation.made_up_sets import NAMES, npy, write_set
from hub.loopback_hub import LoopbackHub, Repo

from flipscale.evaluation import test_set as module
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.test_set import TestSet

DATA = "hf://datasets/org/wds_set"


class Reader(Embedder):
    """Reads labels; embeds nothing."""

    image_size = 32


@pytest.fixture
def cache(hub: LoopbackHub, logged_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Test sets are fetched into a folder of the test's, from `hub`."""
    recipe = dataclasses.replace(module.READ, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(module, "READ", recipe)
    monkeypatch.setattr(module, "open_shards", functools.partial(module.open_shards, recipe=recipe))
    huggingface_hub.HfFileSystem.clear_instance_cache()
    # The file system asks the place that was named when it was imported.
    monkeypatch.setattr(huggingface_hub.hf_file_system.constants, "ENDPOINT", hub.endpoint)
    return tmp_path / "cache"


def upload(hub: LoopbackHub, folder: Path) -> None:
    repo = hub.repos["org/wds_set"] = Repo(private=False)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    repo.commit("main", {name: hub.keep(path.read_bytes(), name.endswith(".tar")) for name, path in files.items()})


def test_a_set_of_eleven_shards_at_the_hub(hub: LoopbackHub, cache: Path, tmp_path: Path) -> None:
    def files(number: int, label: int) -> dict[str, bytes]:
        return {"cls": str(number % 16).encode(), "npy": npy(np.arange(16) == label)}

    folder = write_set(tmp_path / "set", 11, 2, files)
    (folder / "classnames.txt").write_text("\n".join(NAMES))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    upload(hub, folder)
    embedder = Reader(None, None, Accelerator(cpu=True))
    for _ in range(2):
        test_set = TestSet.open(DATA)
        assert test_set.class_names() == NAMES
        assert test_set.templates() == ["a {c}"]
        assert test_set.labels(embedder, 16).tolist() == [number % 16 for number in range(22)]
        assert [test_set.label_set(16, shard, 1).sum() for shard in range(11)] == [1] * 11
    assert len(hub.asked(r"GET .*/resolve/main/.*\.tar$")) == 11, "each shard once"


def test_what_is_not_at_the_hub(hub: LoopbackHub, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no shards at 'hf://datasets/org/wds_set'|wds_set.* does not exist"):
        TestSet.open(DATA)
    folder = write_set(tmp_path / "set", 2, 1, lambda number, label: {})
    (folder / "test" / "1.tar").unlink()
    upload(hub, folder)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    with pytest.raises(ValueError, match=r"shard hf://datasets/org/wds_set/test/1.tar does not exist"):
        TestSet.open(DATA)


def test_a_hub_that_does_not_answer(hub: LoopbackHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flipscale.data.sources.remote._FIRST_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(huggingface_hub.hf_file_system.constants, "ENDPOINT", "http://127.0.0.1:9")
    huggingface_hub.HfFileSystem.clear_instance_cache()
    with pytest.raises((ValueError, OSError), match=r"hf://datasets/org/wds_set/.* c(ould|annot) (not )?be"):
        TestSet.open(DATA)
