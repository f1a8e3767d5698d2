"""easy-VQA as shards: from a package that pip finds in a folder, whole or not there, or a clear word why not."""

import hashlib
import json
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from examples.questions.easy_vqa import prepare_easy_vqa
from flipscale.data.sources.tar import TarSource
from flipscale.data.tokenizers import load_tokenizer
from flipscale.evaluation.test_set import TestSet

QUESTIONS = {
    "train": [["what is the red shape?", "triangle", 0], ["is there a circle?", "no", 0], ["is it teal?", "yes", 1]],
    "test": [["what is the colour?", "red", 0]],
}


def drawing(number: int) -> bytes:
    return cv2.imencode(".png", np.full((64, 64, 3), 40 * number, np.uint8))[1].tobytes()


@pytest.fixture
def digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small package of that name, in a folder that pip takes for all there is; returns its digest."""
    wheel = tmp_path / "index/easy_vqa-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as package:
        package.writestr("easy_vqa/data/answers.txt", "no\nred\ntriangle\nyes\n")
        for part, questions in QUESTIONS.items():
            package.writestr(f"easy_vqa/data/{part}/questions.json", json.dumps(questions))
            for number in (0, 1):
                package.writestr(f"easy_vqa/data/{part}/images/{number}.png", drawing(number))
        about = "easy_vqa-1.0.dist-info"
        package.writestr(f"{about}/LICENSE", "MIT License")
        package.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: easy-vqa\nVersion: 1.0\n")
        package.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        package.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_every_question_is_a_sample(tmp_path: Path, digest: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "easy_vqa"
    prepare_easy_vqa(out, digest)
    assert capsys.readouterr().out.endswith(f"{out}/train: 3 questions\n{out}/test: 1 questions\n")
    source = TarSource(str(out / "train"))
    samples = [source.read(0, number) for number in range(len(source))]
    assert [sample.image for sample in samples] == [drawing(0), drawing(0), drawing(1)]
    assert [sample.captions for sample in samples] == [(text.encode(),) for text, _, _ in QUESTIONS["train"]]
    assert [sample.label for sample in samples] == [2, 0, 3]
    test_set = TestSet.open(str(out))
    assert test_set.class_names() == ["no", "red", "triangle", "yes"]
    assert [len(test_set), test_set.label(4, 0, 0)] == [1, 1]
    assert load_tokenizer(str(out / "tokenizer"), 16).tokenize("is it red?")
    assert "MIT License" in (out / "LICENSES.txt").read_text(encoding="utf-8")
    prepare_easy_vqa(out, "another")
    assert capsys.readouterr().out == f"{out} is complete: nothing to do\n"


def test_another_package_of_that_name_is_not_believed(tmp_path: Path, digest: str) -> None:
    with pytest.raises(OSError, match=r"pip downloaded another package for easy-vqa==1.0; check its index"):
        prepare_easy_vqa(tmp_path / "out")
    assert not (tmp_path / "out").exists()
