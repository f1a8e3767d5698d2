"""One's own pictures: every layout is recognised and said, classes and a test part are written, mistakes are told."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import datasets
import numpy as np
import pytest
from conftest import COLOURS, SHAPES, draw

from flipscale import cli
from flipscale.data.sources.tar import TarSource
from flipscale.data.tokenizers import load_tokenizer
from flipscale.evaluation.suite import build_tasks
from flipscale.evaluation.test_set import TestSet
from flipscale.preparation.lists import open_pairs

NAMES = [f"{colour}_{shape}" for colour in COLOURS for shape in SHAPES]
CLASSES = sorted(name.replace("_", " ") for name in NAMES)


@pytest.fixture(scope="module")
def by_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 pictures in 16 class folders, named as people name folders."""
    root, rng = tmp_path_factory.mktemp("own") / "pictures", np.random.default_rng(0)
    for name in NAMES:
        (root / name).mkdir(parents=True)
        for number in range(8):
            image = cv2.cvtColor(draw(*name.split("_"), rng), cv2.COLOR_RGB2BGR)
            (root / name / f"{number}.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
    return root


def rows(by_class: Path) -> list[dict[str, str]]:
    """What a table of the pictures has."""
    files = sorted(str(file.relative_to(by_class)) for file in by_class.rglob("*.png"))
    return [
        {"file_name": file, "text": f"a {file.split('/')[0].replace('_', ' ')}", "kind": file.split("_")[0]}
        for file in files
    ]


def as_folder(by_class: Path, folder: Path, captions: bool) -> Path:
    """The pictures in one folder, with or without a text next to each."""
    folder.mkdir()
    for number, row in enumerate(rows(by_class)):
        shutil.copy(by_class / row["file_name"], folder / f"{number}.png")
        if captions:
            (folder / f"{number}.txt").write_text(row["text"])
    return folder


def as_table(by_class: Path, folder: Path, name: str, delimiter: str = ",") -> Path:
    """A table beside the pictures; returns it."""
    shutil.copytree(by_class, folder)
    with open(folder / name, "w", newline="") as file:
        table = csv.DictWriter(file, ["file_name", "text", "kind"], delimiter=delimiter)
        table.writeheader()
        table.writerows(rows(by_class))
    return folder / name


def as_saved(by_class: Path, folder: Path) -> Path:
    """A data set that was saved to disk, its classes numbers with names."""
    kinds = sorted(COLOURS)
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "kind": datasets.ClassLabel(names=kinds)}
    images = [str(by_class / row["file_name"]) for row in rows(by_class)]
    columns = {"image": images, "text": [row["text"] for row in rows(by_class)]}
    columns["kind"] = [kinds.index(row["kind"]) for row in rows(by_class)]  # type: ignore[misc]
    datasets.Dataset.from_dict(columns, datasets.Features(features)).save_to_disk(str(folder))
    return folder


def prepare(*arguments: object) -> None:
    cli.main(["prepare", *map(str, arguments)])


def contents(folder: Path) -> list[tuple[str, int | None, bytes]]:
    """Caption, class and image of each sample."""
    source = TarSource(str(folder))
    places = [(shard, row) for shard, size in enumerate(source.shard_sizes) for row in range(size)]
    samples = [source.read(*place) for place in places]
    return [(sample.captions[0].decode(), sample.label, sample.image) for sample in samples]


def test_a_column_is_caption_and_class(by_class: Path, tmp_path: Path) -> None:
    words = ["--caption_column", "text", "--labels", "text", "--num_workers", 1]
    prepare("shards", as_saved(by_class, tmp_path / "saved"), tmp_path / "out", *words)
    assert {(caption, label) for caption, label, _ in contents(tmp_path / "out")} == {
        (f"a {name}", number) for number, name in enumerate(CLASSES)
    }


def test_class_folders_are_captions(by_class: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare("shards", by_class, tmp_path / "out", "--num_workers", 1)
    said = capsys.readouterr().out.splitlines()
    assert "--labels folder --split 0.1" in said[0]
    assert said[-2] == f"next: flipscale prepare tokenizer {tmp_path}/out {tmp_path}/out/tokenizer"
    assert said[-1].endswith(f": flipscale init RECIPE.yaml --start MODEL --shards {tmp_path}/out")
    found = contents(tmp_path / "out")
    assert sorted({caption for caption, _, _ in found}) == CLASSES
    assert len(found) == 128
    assert all(label is None for _, label, _ in found)
    assert len({caption for caption, _, _ in found[:16]}) > 5, "a shard has one class after the other"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda own, out: as_folder(own, out, True), "128 images: captions are the .txt or .json files beside 128"),
        (lambda own, out: as_table(own, out, "metadata.csv").parent, "128 rows in {}/metadata.csv: images of the "
         "column file_name, captions of text"),
        (lambda own, out: as_table(own, out, "list.csv", ";"), "128 rows in {}/list.csv: images of"),
        (lambda own, out: as_table(own, out, "list.tsv", "\t"), "128 rows in {}/list.tsv: images of"),
        (as_saved, "128 rows of the data set {}, train: images of the column image, captions of text"),
    ],
)  # fmt: skip
def test_every_layout_is_said(by_class: Path, tmp_path: Path, make: Callable[[Path, Path], Path], says: str) -> None:
    pairs = open_pairs(str(make(by_class, tmp_path / "own")))
    assert pairs.layout.startswith(says.format(tmp_path / "own"))
    assert sorted({pairs.captions(number)[0] for number in range(128)}) == [f"a {name}" for name in CLASSES]


@pytest.mark.parametrize("columns", [("text", "file_name"), ("kind", "text", "file_name"), ("file_name", "text")])
def test_captions_of_several_lines(by_class: Path, tmp_path: Path, columns: tuple[str, ...]) -> None:
    file = as_table(by_class, tmp_path / "own", "list.csv")
    captions = ["a red\nsquare, sold", "plain", "a list:\n\nwood, steel"] * 4 + ["two\nlines"]
    with open(file, "w", newline="") as table:
        writer = csv.DictWriter(table, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "text": text} for row, text in zip(rows(by_class), captions, strict=False))
    pairs = open_pairs(str(file))
    assert [pairs.captions(number)[0] for number in range(len(pairs))] == [" ".join(text.split()) for text in captions]


def test_a_split_that_was_saved_alone_is_no_other(by_class: Path, tmp_path: Path) -> None:
    saved = datasets.load_from_disk(str(as_saved(by_class, tmp_path / "own")))
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    test = datasets.Dataset(saved.data, info=saved.info, split=datasets.Split("test"))
    test.save_to_disk(str(tmp_path / "test"))
    for split in ("train", "test"):  # the first is the default
        assert len(open_pairs(str(tmp_path / "test"), split=split)) == 128
    with pytest.raises(ValueError, match="'test' alone; expected 'validation'"):
        open_pairs(str(tmp_path / "test"), split="validation")
    assert (
        open_pairs(str(tmp_path / "test")).fingerprint()
        != open_pairs(str(tmp_path / "test"), split="test").fingerprint()
    )


@pytest.mark.parametrize("make", [lambda own, out: as_table(own, out, "list.csv"), as_saved])
def test_classes_of_a_column(by_class: Path, tmp_path: Path, make: Callable[[Path, Path], Path]) -> None:
    prepare("shards", make(by_class, tmp_path / "own"), tmp_path / "out", "--labels", "kind", "--num_workers", 1)
    assert (tmp_path / "out/classnames.txt").read_text().split() == sorted(COLOURS)
    assert (tmp_path / "out/zeroshot_classification_templates.txt").read_text() == "{c}\n"
    for caption, label, _ in contents(tmp_path / "out"):
        assert label == sorted(COLOURS).index(caption.split()[1])


def test_a_class_that_a_data_set_hides_is_missing(by_class: Path, tmp_path: Path) -> None:
    shown = datasets.load_from_disk(str(as_saved(by_class, tmp_path / "own")))
    hidden = shown.map(lambda row, number: {"kind": -1 if number < 3 else row["kind"]}, with_indices=True)
    hidden.save_to_disk(str(tmp_path / "hidden"))
    prepare("shards", tmp_path / "hidden", tmp_path / "out", "--labels", "kind", "--num_workers", 1)
    assert (tmp_path / "out/classnames.txt").read_text().split() == sorted(COLOURS)
    assert json.loads((tmp_path / "out/report.json").read_text())["left_out"] == {"missing_label": 3}


def test_numbers_as_classes_are_in_their_order(by_class: Path, tmp_path: Path) -> None:
    numbers = [f"{n % 12:0{1 + (n % 5 == 0)}d}" for n in range(len(rows(by_class)))]  # some with a zero in front
    lines = [f"{by_class}/{row['file_name']},{row['text']},{n}" for n, row in zip(numbers, rows(by_class), strict=True)]
    table = tmp_path / "list.csv"
    table.write_text("\n".join(["path,title,label", *lines]))
    assert open_pairs(str(table)).usual_labels == "label"
    prepare("shards", table, tmp_path / "out", "--labels", "label", "--allow_outside", "--num_workers", 1)
    written = (tmp_path / "out/classnames.txt").read_text().split()
    assert written == sorted(set(numbers), key=lambda number: (int(number), number))


def test_a_share_is_held_out(by_class: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(by_class, tmp_path / "own")
    shutil.copytree(tmp_path / "own/red_disc", tmp_path / "own/red_disc/copies")
    options = ("--labels", "folder", "--split", "0.25", "--num_workers", 1)
    prepare("shards", tmp_path / "own", tmp_path / "out", *options)
    train, test = contents(tmp_path / "out/train"), contents(tmp_path / "out/test")
    assert len(train) + len(test) == 136
    assert 20 < len(test) < 50
    assert not {image for _, _, image in train} & {image for _, _, image in test}, "copies are on both sides"
    names = (tmp_path / "out/classnames.txt").read_text().splitlines()
    assert names == sorted([*CLASSES, "copies"])
    assert capsys.readouterr().out.endswith(f" --shards {tmp_path}/out/train --tests {tmp_path}/out\n")
    prepare("tokenizer", tmp_path / "out/train", tmp_path / "words")
    assert capsys.readouterr().out.endswith(f" --tests {tmp_path}/out\n")
    assert all(names[label] == caption for caption, label, _ in train + test if label is not None)
    # By the images alone: the same whatever they are called, in other shards, and by more processes.
    again = ("--labels", "folder", "--split", "0.25", "--num_workers", 2, "--pairs_per_shard", 50)
    shutil.move(tmp_path / "own", tmp_path / "moved")
    prepare("shards", tmp_path / "moved", tmp_path / "again", *again)
    assert sorted(contents(tmp_path / "again/test")) == sorted(test)


def test_captions_on_both_sides_are_counted(by_class: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three photos of one product have one caption and other bytes."""
    flat = as_folder(by_class, tmp_path / "flat", captions=True)
    for number in range(128):
        (flat / f"{number}.txt").write_text(f"product {number // 3 if number < 60 else number}")
    prepare("shards", flat, tmp_path / "out", "--split", "0.25", "--num_workers", 1)
    train, test = ([caption for caption, _, _ in contents(tmp_path / "out" / part)] for part in ("train", "test"))
    shared = 100 * sum(caption in train for caption in test) / len(test)
    assert 0 < shared < 100
    said = f"{shared:.3g} % of the captions of {tmp_path}/out/test are also in {tmp_path}/out/train"
    assert said in capsys.readouterr().out
    for number in range(128):
        (flat / f"{number}.txt").write_text(f"product {number}")
    prepare("shards", flat, tmp_path / "alone", "--split", "0.25", "--num_workers", 1)
    assert "of the captions of" not in capsys.readouterr().out


def test_pictures_without_captions(by_class: Path, tmp_path: Path, refused: Callable) -> None:
    flat = as_folder(by_class, tmp_path / "flat", captions=False)
    (flat / "words.csv").write_text("file_name,text\n")
    assert f"{flat}/words.csv" in refused("prepare", "shards", flat, tmp_path / "out")
    for part in ("train", "test"):
        shutil.copytree(by_class, tmp_path / "parts" / part)
    assert "test and train" in refused("prepare", "shards", tmp_path / "parts", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_labelled_set_leaves_out_pictures_beside_the_class_folders(by_class: Path, tmp_path: Path) -> None:
    """Its shards have the names of CLIP_benchmark's."""
    shutil.copytree(by_class, tmp_path / "own")
    shutil.copy(by_class / "red_disc/0.png", tmp_path / "own/stray.png")
    (tmp_path / "own/___").mkdir()
    shutil.copy(by_class / "red_disc/0.png", tmp_path / "own/___/0.png")
    os.rename(tmp_path / "own/red_bar", os.fsencode(tmp_path) + b"/own/caf\xe9")
    options = ("--labels", "folder", "--pairs_per_shard", "12", "--num_workers", 1)
    prepare("shards", tmp_path / "own", tmp_path / "out", *options)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["left_out"] == {"undecodable_caption": 8, "missing_caption": 2}
    assert (tmp_path / "out/nshards.txt").read_text() == "11\n"
    assert {path.name for path in (tmp_path / "out").glob("*.tar")} == {f"{number}.tar" for number in range(11)}
    assert len(TestSet.open(str(tmp_path / "out"))) == 120


def test_a_name_that_is_no_path_is_not_looked_for(
    tmp_path: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the Hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("./birds", "my/own/birds", "birds.zip", "photos/birds", "~/birds", "birds/"):
        assert f"{name} does not exist; name a folder, a table (.csv" in refused("prepare", "shards", name, "out")
    for name in ("pairs.xlsx", "pairs.ods", "pairs"):
        (tmp_path / name).write_bytes(b"PK")
        assert f"{name} is not a list that flipscale reads; name a folder" in refused("prepare", "shards", name, "out")
    assert "pairs.xls does not exist; name" in refused("prepare", "shards", "pairs.xls", "out")
    asked: list[str] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *_, **__: asked.append(name) or int("x"))
    names = ["cifar10", "org/birds", "laion/laion2B-en-v1.0"]
    for name in names:
        assert "cannot be loaded (invalid literal" in refused("prepare", "shards", name, "out")
    assert asked == names


def test_wrong_classes_and_shares(by_class: Path, tmp_path: Path, refused: Callable) -> None:
    table, out = as_table(by_class, tmp_path / "own", "list.csv"), tmp_path / "out"
    for source, folder, flag, value, words in (
        (by_class, out, "--labels", "kind", "--labels folder"),
        (table, out, "--labels", "sort", "no column sort"),
        (by_class, out, "--split", "test", "--split is 'test'"),
        (by_class, out, "--split", "0.0001", "--split 0.0001 leaves no image for"),
        (by_class, by_class, "--split", "0.1", "name a new folder"),
    ):
        assert words in refused("prepare", "shards", source, folder, flag, value)


@pytest.fixture(scope="module")
def own_shards(by_class: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own_shards") / "own"
    prepare("shards", by_class, folder, "--num_workers", 1)
    return folder


def test_a_tokenizer_of_own_captions(own_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare("tokenizer", own_shards, tmp_path / "words")
    said = capsys.readouterr().out.splitlines()
    tokenizer = load_tokenizer(str(tmp_path / "words"), 8)
    assert f"{len(tokenizer)} entries, from 128 captions, 16 of them different" in said[0]
    assert said[1] == f"next: flipscale init RECIPE.yaml --shards {own_shards} --tokenizer {tmp_path}/words"
    assert tokenizer.unk_token_id not in tokenizer("Red disc blue cross")["input_ids"]
    prepare("tokenizer", own_shards, tmp_path / "again")
    for file in (tmp_path / "words").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_a_tokenizer_that_cannot_be(own_shards: Path, tmp_path: Path, refused: Callable) -> None:
    assert "vocab_size=9" in refused("prepare", "tokenizer", own_shards, tmp_path / "words", "--vocab_size", 9)
    assert not (tmp_path / "words").exists()
    (tmp_path / "empty").mkdir()
    assert "is there already" in refused("prepare", "tokenizer", own_shards, tmp_path / "empty")


def test_a_table_of_right_and_wrong_captions(
    by_class: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(by_class, tmp_path / "own")
    lines = ["image,caption,wrong_1,wrong_2,subset"]
    for n, wrong in enumerate(["a hat", "", "a cup", "a ship", "a cat"]):
        right = " " if n == 3 else f"right {n}"
        lines.append(f"{NAMES[n]}/0.png,{right},wrong {n},{wrong},{('swap', 'add')[n % 2]}")
    (tmp_path / "own/choices.csv").write_text("\n".join(lines))
    columns = ("--caption_column", "caption", "wrong_1", "wrong_2", "--labels", "subset", "--num_workers", 1)
    prepare("shards", tmp_path / "own/choices.csv", tmp_path / "out", *columns)
    assert "captions of caption wrong_1 wrong_2, classes of subset" in capsys.readouterr().out
    test_set = TestSet.open(str(tmp_path / "out"))
    captions = [test_set.captions_of(0, number) for number in range(4)]
    assert captions == [
        ["right 0", "wrong 0", "a hat"], ["right 1", "wrong 1"], ["right 2", "wrong 2", "a cup"],
        ["right 4", "wrong 4", "a cat"],
    ]  # fmt: skip
    (task,) = build_tasks([{"kind": "image_caption_selection", "data": str(tmp_path / "out")}])
    assert [task.truth(test_set)(0, number)[1] for number in range(4)] == [1, 0, 1, 1]
