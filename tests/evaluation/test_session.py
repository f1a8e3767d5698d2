"""The evaluation of one model: known tasks are not run again, and processes agree on the rest."""

import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
from conftest import write_shards
from evaluation.made_up_sets import write_overlap
from evaluation.tiny_model import tiny_embedder

from flipscale.evaluation import model_results
from flipscale.evaluation.decontaminated import with_clean_tasks
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.model_results import evaluate_model
from flipscale.evaluation.suite import build_tasks
from flipscale.model import FlipModel

VARYING = ("seconds", "date")


def tasks_in(folder: Path) -> list[Task]:
    listed = []
    for number in range(4):
        data = str(folder / f"set{number}")
        listed += [{"kind": kind, "data": data, "name": f"{kind}{number}"} for kind in ("zero_shot", "retrieval")]
    return build_tasks(listed)


def evaluate(folder: str, home: str, tokenizer_dir: str) -> None:
    embedder = tiny_embedder(tokenizer_dir, batch_size=8)
    evaluate_model(embedder, "tiny", Path(home, "results.jsonl"), tasks_in(Path(folder)))


def lines_of(home: Path) -> list[dict]:
    """The lines of a folder without the fields that vary between runs."""
    lines = [json.loads(line) for line in (home / "results.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in VARYING} for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("suite")
    for number in range(4):
        write_shards(made / f"set{number}", [20, 13], seed=number)
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def test_known_tasks_are_not_run_again(
    embedder: Embedder, path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tasks_in(folder)
    lines = evaluate_model(embedder, "tiny", path, tasks)
    results = [line.result for line in lines]
    assert list(dict.fromkeys(result.task for result in results)) == [task.name for task in tasks]
    assert str(folder) not in path.read_text()
    asked: list[list[str]] = []

    def nothing(embedder: Embedder, left: list[Task]) -> Iterator:
        asked.append([task.name for task in left])
        return iter(())

    monkeypatch.setattr(model_results, "evaluated", nothing)
    # Neither the batch size nor the folder's path changes a figure.
    moved = folder.rename(folder.with_name("moved"))
    try:
        other = Embedder(embedder.model, embedder.tokenizer, embedder.accelerator, batch_size=3)
        assert [line.result for line in evaluate_model(other, "tiny", path, tasks_in(moved))] == [
            line.result for line in lines
        ]
        assert asked == []
        # Other prompts, other data or other weights do.
        (moved / "set1/zeroshot_classification_templates.txt").write_text("{c}\n")
        with pytest.raises(ValueError, match="shorter"):
            evaluate_model(embedder, "tiny", path, tasks_in(moved))
        assert asked == [["zero_shot1", "retrieval1"]]
    finally:
        (moved / "set1/zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}\n")
        moved.rename(folder)
    others = Embedder(FlipModel(embedder.model.config).eval(), embedder.tokenizer, embedder.accelerator)
    with pytest.raises(ValueError, match="shorter"):
        evaluate_model(others, "tiny", path, tasks)
    assert len(asked[1]) == 8


def test_changed_labels_of_the_same_size_are_evaluated_again(embedder: Embedder, path: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "set", [20, 13])
    labels, shard = tmp_path / "set/labels.json", tmp_path / "set/00000.tar"
    tasks = build_tasks([{"kind": "zero_shot", "data": str(tmp_path / "set"), "labels": "labels.json"}])

    def count() -> int:
        evaluate_model(embedder, "tiny", path, tasks)
        return len(path.read_bytes().splitlines())

    labels.write_text(json.dumps([[1]] * 33))
    assert (count(), count()) == (1, 1)
    labels.write_text(json.dumps([[2]] * 33))
    assert (count(), count()) == (2, 2)
    content, state = bytearray(shard.read_bytes()), shard.stat()
    os.utime(shard, (state.st_atime, state.st_mtime + 5))
    assert count() == 2, "another time alone changes no figure"
    with tarfile.open(shard) as tar:
        place = next(member.offset_data for member in tar if member.name.endswith(".cls"))
    content[place : place + 1] = b"1" if content[place : place + 1] == b"0" else b"0"
    shard.write_bytes(content)
    os.utime(shard, (state.st_atime - 5, state.st_mtime - 5))  # an older copy, as `cp -p` leaves it
    assert (count(), count()) == (3, 3)


def test_clean_figures_belong_to_their_prompts_and_images(embedder: Embedder, path: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "set", [20, 13])
    groups = set()
    for number, prompts in ((2, ["{c}"]), (2, ["a {c}"]), (3, ["a {c}"])):
        write_overlap(tmp_path / "audit", tmp_path / "set", [("00000.tar", number)])
        task = {"kind": "zero_shot", "data": str(tmp_path / "set"), "templates": prompts}
        tasks = with_clean_tasks(build_tasks([task]), tmp_path / "audit")
        lines = evaluate_model(embedder, "tiny", path, tasks)
        groups |= {line.about["group"] for line in lines if line.result.task == "zero_shot_clean"}
    assert len(groups) == 3


def ended(folder: Path, home: Path, tokenizer_dir: Path) -> int | None:
    process = processes.start(evaluate, str(folder), str(home), str(tokenizer_dir))
    process.join(120)
    return process.exitcode


def test_two_processes_write_each_line_once(folder: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    alone, several = tmp_path / "alone", tmp_path / "several"
    alone.mkdir()
    assert ended(folder, alone, tokenizer_dir) == 0
    shutil.copytree(alone, several)
    lines = (several / "results.jsonl").read_bytes().splitlines(keepends=True)
    (several / "results.jsonl").write_bytes(b"".join(lines[:20]))
    arguments = str(folder), str(several), str(tokenizer_dir)
    ranks = [processes.start(evaluate, *arguments, environment=one) for one in processes.rank_environments(2)]
    assert processes.exit_codes(ranks) == [0, 0]
    assert lines_of(several) == lines_of(alone)
