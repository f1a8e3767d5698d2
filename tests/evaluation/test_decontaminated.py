"""Figures again without the images that lie in the training data, against a set that never had them."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import add_member, write_shards
from evaluation.made_up_sets import write_overlap

from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.decontaminated import with_clean_tasks
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.retrieval import Retrieval
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.kinds.zero_shot import ZeroShot
from flipscale.evaluation.suite import run_tasks

LEFT_OUT = [("00000.tar", 2), ("00001.tar", 0), ("00001.tar", 6)]


def without_by_hand(folder: Path, target: Path) -> None:
    """Copy a test set without the members of `LEFT_OUT`."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.tar", "*.npy", "*.manifest"))
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as old, tarfile.open(target / shard.name, "w") as new:
            keys = list(dict.fromkeys(name.split(".")[0] for name in old.getnames()))
            gone = {keys[number] for name, number in LEFT_OUT if name == shard.name}
            for name in old.getnames():
                if name.split(".")[0] not in gone:
                    add_member(new, name, old.extractfile(name).read())


@pytest.fixture
def tested(tmp_path: Path) -> Path:
    write_shards(tmp_path / "tested", [9, 8], seed=3)
    return tmp_path / "tested"


def tasks_of(data: Path) -> list[Task]:
    return [
        ZeroShot("zero_shot", str(data), "zero_shot"),
        ZeroShot("zero_shot", str(data), "real", labels="real.json"),
        Retrieval("retrieval", str(data), "retrieval", group_by_caption=True),
    ]


def write_rows(folder: Path, rows: list[int]) -> None:
    """Write labels by row number for the images that have these rows in the whole set."""
    (folder / "real.json").write_text(json.dumps([[row % 16] for row in rows]))


def test_figures_equal_those_of_a_set_without_the_images(tested: Path, embedder: Embedder, tmp_path: Path) -> None:
    write_overlap(tmp_path / "audit", tested, LEFT_OUT)
    without_by_hand(tested, tmp_path / "bare")
    write_rows(tested, list(range(17)))
    write_rows(tmp_path / "bare", [row for row in range(17) if row not in (2, 9, 15)])
    seen = []
    real = Embedder.image_columns

    def counted(self: Embedder, source: TarSource) -> object:
        seen.append(len(source))
        return real(self, source)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Embedder, "image_columns", counted)
        found = run_tasks(embedder, with_clean_tasks(tasks_of(tested), tmp_path / "audit"))
    assert seen == [17]  # one pass
    by_name = {result.name: result for result in found}
    for result in run_tasks(embedder, tasks_of(tested)):
        assert by_name[result.name].value == pytest.approx(result.value, abs=1e-6)
    for result in run_tasks(embedder, tasks_of(tmp_path / "bare")):
        clean = by_name[f"{result.task}_clean/{result.metric}"]
        assert (clean.value, clean.n) == (pytest.approx(result.value, abs=1e-6), result.n)
        assert clean.made_by["without"] == "3 images that lie in the training data"
        assert clean.kind == result.kind


def test_bad_input(tested: Path, embedder: Embedder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no overlap/NAME\.json; run: flipscale prepare audit"):
        with_clean_tasks(tasks_of(tested), tmp_path)
    write_shards(tmp_path / "other", [3], seed=4)
    write_overlap(tmp_path, tmp_path / "other", [])
    with pytest.raises(ValueError, match="compared other with the training data, but not"):
        with_clean_tasks(tasks_of(tested), tmp_path)
    write_overlap(tmp_path, tested, [])
    assert with_clean_tasks(tasks_of(tested), tmp_path) == tasks_of(tested), "no overlap, so no second figures"
    write_overlap(tmp_path, tested, [("00000.tar", 99)])
    with pytest.raises(ValueError, match="has 0 of the 1 images"):
        run_tasks(embedder, with_clean_tasks(tasks_of(tested)[:1], tmp_path))
