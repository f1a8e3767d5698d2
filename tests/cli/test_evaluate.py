"""`flipscale evaluate` from the names of models to a table: of several models, resumed, refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from conftest import write_shards
from hub.conftest import export_small
from hub.native import export_native
from huggingface_hub import ModelCard

from flipscale.cli import main
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.model_results import Line, read_result_lines
from flipscale.evaluation.results import Result
from flipscale.evaluation.task_page import PREPARED, read_page, suite_pages
from flipscale.hub.card import folder_lines, model_index, refresh_card
from flipscale.hub.push import split_own_files

CARD = """---
tags:
- flipscale
license: mit
---

# tiny

## Results

Not evaluated.

## Licence

MIT.
"""


@pytest.fixture
def place(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two models, `runs/a/model` and `b`, and in data/tasks two prepared tasks and a part of one."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("runs/a/model", "b")):
        export_small(tokenizer_dir, tmp_path / name, seed=seed)
    (tmp_path / "runs/a/model/README.md").write_text(CARD)
    for name in ("cars", "dtd", "mnist"):
        folder = tmp_path / "data/tasks" / name
        write_shards(folder / "test", [9, 7], seed=len(name))
        for text in ("classnames.txt", "zeroshot_classification_templates.txt"):
            (folder / "test" / text).rename(folder / text)
        if name != "mnist":
            files = {"test/00000.tar": {"bytes": (folder / "test/00000.tar").stat().st_size}}
            (folder / PREPARED).write_text(json.dumps({"files": files, "revision": "c0ffee"}))
    return tmp_path


def evaluate(*arguments: str) -> None:
    main(["evaluate", *arguments, "--num_workers", "0"])
    AcceleratorState._reset_state(reset_partial_state=True)


def test_several_models_stand_in_one_table(
    place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate("runs/a/model", "b", "--suite", "paper")
    printed, said = capsys.readouterr()
    cars = read_page("cars")
    head, _, first, *_ = [line for line in printed.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in head.split("|")[1:5]] == ["task", "metric", "a", "b"]
    assert first.split("|")[1].strip() == cars.title
    assert "[1] Not comparable with the paper: 16 images here, 8,041 there" in printed
    total = len(suite_pages("paper"))
    assert f"No mean for a: {total - 2} of the suite's {total} tasks are missing" in printed
    assert "not prepared in data/tasks, so left out: birdsnap, " in said
    assert "a: cars top-1 " in said
    assert (place / "evaluations/results.md").read_text().count("| a ") >= 1
    assert (place / "evaluations/results.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(Embedder, "image_batches", None)  # which would be needed to run any again
    evaluate("runs/a/model", "b", "--suite", "paper", "--json")
    again, said = capsys.readouterr()
    found = json.loads(again)
    assert list(found) == ["a", "b"]
    assert {name.partition("/")[0] for name in found["a"]} == {"cars", "dtd"}
    assert "a: 2 of 2 tasks are in runs/a/model/results.jsonl and are not run again" in said


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_mended_model_is_evaluated_anew(place: Path, capsys: pytest.CaptureFixture, prefix: str) -> None:
    """Its pixels or its tokenizer decide its figures as its weights do; its card and the layout of JSON do not."""
    folder = export_native("clip", place / "clip") if prefix else place / "b"

    def is_known() -> bool:
        evaluate(f"{prefix}{folder.relative_to(place)}", "--retrieval", "data/tasks/cars/test")
        return "1 of 1 tasks are in" in capsys.readouterr().err

    def mended(name: str, change: Callable[[dict], object]) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    assert [is_known(), is_known()] == [False, True]
    pixels = "preprocessor_config.json" if prefix else "config.json"
    mended(pixels, lambda content: content.get("vision_config", content).update(image_mean=[0.9, 0.8, 0.7]))
    assert [is_known(), is_known()] == [False, True]
    mended("tokenizer.json", lambda content: content.update(normalizer={"type": "Lowercase"}))
    assert [is_known(), is_known()] == [False, True]
    (folder / "README.md").write_text("A card.")
    mended("config.json", lambda content: content.update(transformers_version="0"))
    assert is_known()


def test_several_widths_stand_in_one_table(place: Path, capsys: pytest.CaptureFixture) -> None:
    evaluate("runs/a/model", "--retrieval", "data/tasks/cars/test", "--dims", "1", "16", "--json")
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["a, 1 numbers", "a, 16 numbers"]
    assert {line.about["dims"] for line in read_result_lines(place / "runs/a/model/results.jsonl")} == {1, 16}
    evaluate("runs/a/model", "--retrieval", "data/tasks/cars/test", "--json")
    assert json.loads(capsys.readouterr().out) == found["a, 16 numbers"], "the whole width"


def test_a_width_that_is_none_is_refused_before_the_others(place: Path, refused: Callable[..., str]) -> None:
    said = refused("evaluate", "b", "--retrieval", "data/tasks/cars/test", "--dims", 8, 99, "--num_workers", 0)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "dims is 99, and the embeddings of b have 16 numbers" in said
    assert not (place / "b/results.jsonl").exists()


def test_what_is_prepared_is_evaluated_by_default(place: Path, capsys: pytest.CaptureFixture) -> None:
    evaluate("b", "--tasks", "data/tasks", "--output_dir", "out", "--json")
    assert {name.partition("/")[0] for name in json.loads(capsys.readouterr().out)} == {"cars", "dtd"}
    assert sorted(path.name for path in (place / "out").iterdir()) == ["b", "results.md", "results.png"]
    assert not (place / "b/results.jsonl").exists()


def test_several_folders_of_a_kind(place: Path, capsys: pytest.CaptureFixture) -> None:
    """A flag takes several folders, and may be given again; a folder named twice is one."""
    cars, dtd = (str(place / f"data/tasks/{name}/test") for name in ("cars", "dtd"))
    evaluate("b", "--retrieval", cars, "--retrieval", dtd, f"{cars}/", "--zero_shot", "data/tasks/dtd", "--json")
    found = json.loads(capsys.readouterr().out)
    assert {name.partition("/")[0] for name in found} == {"retrieval_cars-test", "retrieval_dtd-test", "zero_shot"}
    by_folder = {line.result.task: line.about["data"]["name"] for line in read_result_lines(place / "b/results.jsonl")}
    assert (by_folder["retrieval_cars-test"], by_folder["retrieval_dtd-test"]) == ("cars/test", "dtd/test")
    (place / "other").mkdir()
    (place / "other/cars").symlink_to(place / "data/tasks/cars")
    evaluate("b", "--retrieval", cars, "other/cars/test", "--json")
    assert len({name.partition("/")[0] for name in json.loads(capsys.readouterr().out)}) == 2, "two of one name"


def test_the_card_of_a_model_folder_has_its_results(place: Path) -> None:
    folder = place / "runs/a/model"
    for _ in range(2):
        evaluate("runs/a/model", "--only", "cars")
    text = (folder / "README.md").read_text()
    assert "Not evaluated" not in text
    assert text.endswith("\n\n## Licence\n\nMIT.\n")
    (row,) = [
        line for line in text.splitlines() if line.startswith("| Stanford Cars, 8 prompts | top-1 | this model |")
    ]
    card = ModelCard(text)
    assert (card.data.license, card.data.model_name) == ("mit", "tiny")
    result = card.data.eval_results[0]
    assert (result.dataset_name, result.dataset_type) == ("Stanford Cars", "clip-benchmark/wds_cars")
    assert (result.dataset_split, result.dataset_revision) == ("test", "c0ffee")
    assert (result.task_type, result.metric_type) == ("zero-shot-image-classification", "accuracy")
    assert float(row.split("|")[4].split()[0]) == pytest.approx(result.metric_value, abs=0.05)
    assert len(card.data.eval_results) == len(folder_lines(folder))

    assert {"results.jsonl", "results.md", "results.png"} <= set(split_own_files(folder)[0])
    lines = read_result_lines(folder / "results.jsonl")
    (folder / "README.md").write_text("# My own card\n")
    refresh_card(folder, lines)
    assert (folder / "README.md").read_text() == "# My own card\n"
    (folder / "README.md").unlink()
    refresh_card(folder, lines)
    assert not (folder / "README.md").exists()
    # Lines of other weights say nothing of these.
    (place / "b/results.jsonl").write_text((folder / "results.jsonl").read_text())
    assert folder_lines(place / "b") == []


@pytest.mark.parametrize("family", ["clip", "siglip", "towers"])
def test_lines_of_any_family_are_of_the_folder_s_weights(place: Path, family: str) -> None:
    folder = export_native(family, place / "other")
    evaluate("other", "--only", "cars")
    lines = read_result_lines(folder / "results.jsonl")
    assert lines
    assert [line.result for line in folder_lines(folder)] == [line.result for line in lines]


def test_the_index_of_a_card_tells_methods_apart() -> None:
    data = {"data": "data/a/test"}
    results = [
        Result("zero_shot", "zero_shot", "top1", 60.0, made_by=data),
        Result("seven", "zero_shot", "top1", 61.0, made_by={**data, "templates": "imagenet7"}),
        Result("likelihood", "likelihood", "top1", 20.0, made_by=data),
        Result("probe", "probe", "top1", 80.0, made_by={**data, "solver": "lbfgs", "folds": 5}),
        Result("small", "probe", "top1", 30.0, made_by={**data, "image_size": 32, "solver": "lbfgs"}),
    ]
    found = {entry.metric_name: entry.metric_value for entry in model_index(Line(result, {}) for result in results)}
    assert found == {
        "top-1, %": 60.0,
        "top-1, %, templates imagenet7": 61.0,
        "top-1, %, by likelihood": 20.0,
        "top-1, %, by probe, solver lbfgs": 80.0,
        "top-1, %, by probe, image_size 32, solver lbfgs": 30.0,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["b", "--only", "carz"], "'carz'"),
        (["b", "--suite", "papers"], "'papers'"),
        (["b", "--only", "cars", "--suite", "paper"], "--only and --suite are both given"),
        (["b", "--suite", "fairness"], "suite fairness is prepared in data/tasks"),
        (["b", "--tasks", "elsewhere"], "prepared in elsewhere"),
        (["b", "--only", "mnist"], "data of task mnist was prepared only in part"),
        (["b", "--only", "pets"], "data of task pets is missing"),
        (["b", "./b", "--only", "cars"], "'b'"),
        (["runs/b", "b", "--only", "cars"], "'runs/b'"),
        (["data/tasks/cars/test/00000.tar", "--only", "cars"], "00000.tar' is a file"),
        (["b", "--only", "cars", "--output_dir", "b/config.json"], "b/config.json is a file"),
        (["b"], "nothing to evaluate"),
        (["b", "--task", "[]"], "--task is '[]'"),
    ],
)
def test_refusals(refused: Callable[..., str], place: Path, arguments: list[str], message: str) -> None:
    assert message in refused("evaluate", *arguments, "--num_workers", 0)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not list(place.glob("**/results.md"))
