"""COCO's captions and VQAv2 as shards, from small files in the official layouts."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from examples.captioning import coco as captions_script
from examples.questions import vqa_v2
from examples.questions.vqa_v2 import answer_list, count_votes, normalised
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.test_set import TestSet

# The split of each image of the small COCO, and its folder.
IMAGES = {9: ("train", "train2014"), 42: ("restval", "val2014"), 73: ("val", "val2014"), 74: ("test", "val2014")}


SAID = [
    ["yes"] * 10, ["no"] * 9 + ["yes"], ["two"] * 4 + ["A cat."] * 6, ["2"] * 3 + ["3"] * 7, ["owl"] * 10,
]  # fmt: skip


def name(number: int) -> str:
    return f"COCO_{IMAGES[number][1]}_{number:012d}.jpg"


def jpeg(number: int) -> bytes:
    return cv2.imencode(".jpg", np.full((48, 64, 3), number, np.uint8))[1].tobytes()


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A folder as the zips of COCO 2014, of Karpathy's split and of VQA v2.0 unpack into it."""
    folder = tmp_path / "coco"
    images, parts = [], {"train2014": ([], []), "val2014": ([], [])}  # type: ignore[var-annotated]
    for number, (split, of) in IMAGES.items():
        (folder / of).mkdir(parents=True, exist_ok=True)
        (folder / of / name(number)).write_bytes(jpeg(number))
        sentences = [
            {"tokens": ["a", "dog"], "raw": f"A dog\n of  {number}, said {i}.", "imgid": number, "sentid": i}
            for i in range(5)
        ]
        entry = {"filepath": of, "sentids": list(range(5)), "filename": name(number), "imgid": number, "split": split}
        images.append({**entry, "sentences": sentences, "cocoid": number})
        for question in range(5):
            _ask(parts[of], number, 1000 * number + question, SAID[question])
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    for of, (questions, annotations) in parts.items():
        about = {"info": {}, "data_type": "mscoco", "data_subtype": of, "license": {}}
        asked = {**about, "task_type": "Open-Ended", "questions": questions}
        (folder / f"v2_OpenEnded_mscoco_{of}_questions.json").write_text(json.dumps(asked))
        (folder / f"v2_mscoco_{of}_annotations.json").write_text(json.dumps({**about, "annotations": annotations}))
    return folder


def _ask(part: tuple[list[Any], list[Any]], image: int, question: int, said: list[str]) -> None:
    part[0].append({"image_id": image, "question": f"What is {question}?", "question_id": question})
    answers = [{"answer": one, "answer_confidence": "yes", "answer_id": i + 1} for i, one in enumerate(said)]
    common = max(set(said), key=said.count)
    about = {"question_type": "what is", "answer_type": "other", "image_id": image, "question_id": question}
    part[1].append({**about, "multiple_choice_answer": common, "answers": answers})


def test_captions_of_the_split(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [str(coco), str(out), "--short_side", "24", "--num_workers", "1"]
    captions_script.main(command)
    assert "written                              2  in 1 shard" in capsys.readouterr().out
    train = TarSource(str(out / "train"))
    assert [train.read(0, number).captions for number in range(len(train))] == [
        tuple(f"A dog of {image}, said {i}.".encode() for i in range(5)) for image in (9, 42)
    ]
    assert cv2.imdecode(np.frombuffer(train.read(0, 0).image, np.uint8), 1).shape == (24, 32, 3)
    test = TestSet.open(str(out))
    assert len(test) == 1
    assert test.captions_of(0, 0) == [f"A dog of 74, said {i}." for i in range(5)]
    shard = (out / "train/00000.tar").read_bytes()
    captions_script.main(command)
    assert (out / "train/00000.tar").read_bytes() == shard
    capsys.readouterr()
    with pytest.raises(SystemExit):
        captions_script.main([*command, "--short_side", "32"])
    assert "was begun with short_side 24 (now 32)" in capsys.readouterr().err


def test_questions_with_all_votes(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vqa_v2, "LEAST_SEEN", 4)
    monkeypatch.setattr(vqa_v2, "answer_list", lambda majors: answer_list(majors)[:3])
    out = tmp_path / "out"
    vqa_v2.main([str(coco), str(out), "--num_workers", "1"])
    said = capsys.readouterr().out
    assert "classnames.txt: 3 answers, for loss.options.num_answers; 2 training questions have none of them" in said
    test = TestSet.open(str(out))
    assert test.class_names() == ["3", "cat", "no"]
    assert len(test) == 15, "questions that nobody answers by the list are asked all the same"
    assert test.captions_of(0, 0) == ["What is 42000?"]
    columns = [*test.class_names(), "other"]
    assert [test.array(columns, 0, number).tolist() for number in range(5)] == [
        *([0, 0, 0, 10], [0, 0, 9, 1], [0, 6, 0, 4], [7, 0, 0, 3], [0, 0, 0, 10])
    ]
    train = TarSource(str(out / "train"))
    asked = [train.read(0, number).captions for number in range(len(train))]
    assert asked == [(b"What is 9001?",), (b"What is 9002?",), (b"What is 9003?",)]
    assert train.read(0, 0).image == jpeg(9)
    counts = train.read(0, 0).read_array()
    assert counts is not None
    assert (counts.dtype, counts.tolist()) == (np.uint8, [0, 0, 9, 1])


def test_answers_are_written_as_vqa_s_evaluation_does() -> None:
    # What its code makes of them.
    expected = {
        "A dog.": "dog", "Two": "2", "none": "0", "isnt": "isn't", "couldn'tve": "couldn't've", "1,000": "1000",
        "somebody'd": "somebodyd", "red,blue": "red blue", "red, blue": "red blue", "black/white": "black white",
        "t-shirt!": "t shirt", "5.5": "5.5", "the end.": "end", "an": "",
    }  # fmt: skip
    assert {answer: normalised(answer) for answer in expected} == expected


def test_a_blank_answer_is_not_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vqa_v2, "LEAST_SEEN", 2)
    assert answer_list(["a", "The", "yes", "Yes.", "no"]) == ["yes"]


def test_equal_answers_are_not_rewritten() -> None:
    numbers = {"2": 0, "two": 1}
    assert count_votes(["two"] * 10, numbers).tolist() == [0, 10, 0]
    assert count_votes(["two"] * 9 + ["2"], numbers).tolist() == [10, 0, 0]
    assert count_votes(["two\n"] * 9 + ["owl"], numbers).tolist() == [9, 0, 1]
