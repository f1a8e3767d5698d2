"""VQA accuracy of a small model against the answers one question at a time."""

import copy
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import COLOURS, SHAPES, TOWER, TOWERS
from evaluation.made_up_sets import npy, png, write_samples
from evaluation.tiny_model import pixels_of, tiny_embedder
from transformers import AutoTokenizer

from flipscale.data.samples import SampleNumbers
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.vqa import accuracy
from flipscale.evaluation.results import Result
from flipscale.evaluation.suite import build_tasks, run_tasks
from flipscale.model import FlipConfig, FlipForQuestionAnswering

ANSWERS = ["yes", "no", *COLOURS, *SHAPES]


@pytest.fixture(scope="module")
def embedder(tokenizer_dir: Path) -> Embedder:
    config = FlipConfig(
        vision_config=TOWERS["vision_config"],
        text_config={**TOWERS["text_config"], "attend_to_padding": False},
        projection_dim=16,
        answer_config={
            **{name: TOWER[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")},
            **{"num_hidden_layers": 1, "num_answers": len(ANSWERS)},
        },
    )
    torch.manual_seed(0)
    model = FlipForQuestionAnswering(config).eval()
    for parameter in model.parameters():
        parameter.data *= 3
    with torch.no_grad():
        mean = model(torch.randint(2, 12, (64, 4)), torch.randn(64, 3, 32, 32)).logits.mean(dim=0)
        model.fusion.classifier[-1].bias -= mean
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return Embedder(model, tokenizer, Accelerator(cpu=True), batch_size=4, name="runs/vqa")


def write_questions(folder: Path, answers: list[dict[str, bytes]], questions: list[str] | None = None) -> Path:
    """A set of a question for each of `answers`: the other files of its sample, `cls` or `npy`."""
    rng, words = np.random.default_rng(0), [*COLOURS, *SHAPES]

    def sample(number: int) -> dict[str, bytes]:
        image = rng.integers(0, 256, (32, 32, 3), np.uint8)
        question = questions[number] if questions else f"the {rng.choice(words)} a {rng.choice(words)}"
        return {"png": png(image), "txt": question.encode(), **answers[number]}

    write_samples(folder, map(sample, range(len(answers))))
    (folder / "classnames.txt").write_text("".join(f"{answer}\n" for answer in ANSWERS), encoding="utf-8")
    return folder


def answered(embedder: Embedder, folder: Path, images: list[int]) -> list[int]:
    """The answer to each question, one at a time, about the image of another number."""
    source, pixels, found = TarSource(str(folder)), pixels_of(embedder, folder), []
    for where, number in zip(SampleNumbers(source), images, strict=True):
        tokens = embedder.tokenizer([source.read_captions(*where)[0].decode()], return_tensors="pt")
        with torch.no_grad():
            output = embedder.model(pixel_values=pixels[number, None], **tokens)
        found.append(int(output.logits.argmax()))
    return found


def evaluated(embedder: Embedder, folder: Path, **options: object) -> dict[str, Result]:
    tasks = build_tasks([{"kind": "vqa", "data": str(folder), **options}])
    tasks[0].check()
    return {result.metric: result for result in run_tasks(embedder, tasks)}


def plain_accuracy(votes: list[int], answer: int) -> float:
    """VQAv2's: of all subsets of nine of the ten answers."""
    people = [number for number, count in enumerate(votes) for _ in range(count)]
    subsets = list(itertools.combinations(people, len(people) - 1))
    return sum(min(subset.count(answer) / 3, 1) for subset in subsets) / len(subsets)


@pytest.mark.parametrize("votes", [[10], [7, 2, 1], [3, 3, 2, 2], [2, 1]])
def test_accuracy_is_that_of_the_subsets(votes: list[int]) -> None:
    for answer in range(len(votes) + 1):
        expected = plain_accuracy([*votes, 0], answer)
        assert accuracy(dict(enumerate(votes)), answer) == pytest.approx(expected)
    assert [accuracy({4: 1}, 4), accuracy({4: 1}, 3)] == [1.0, 0.0], "of one person, the same answer is right"


@pytest.mark.parametrize("image", ["own", "shuffled"])
def test_accuracy_of_single_answers(tmp_path: Path, embedder: Embedder, image: str) -> None:
    labels = np.random.default_rng(1).integers(0, len(ANSWERS), 22).tolist()
    order = list(range(22)) if image == "own" else np.random.default_rng(0).permutation(22).tolist()
    any_answers = write_questions(tmp_path / "any", [{"cls": b"0"}] * 22)
    said = answered(embedder, any_answers, order)
    assert len(set(said)) > 2
    # The set is such that the model is right about some of each kind.
    labels = [answer if number % 2 else label for number, (answer, label) in enumerate(zip(said, labels, strict=True))]
    write_questions(tmp_path, [{"cls": str(label).encode()} for label in labels])
    hits = np.array([one == other for one, other in zip(said, labels, strict=True)])
    yes_no = np.array([label < 2 for label in labels])
    found = evaluated(embedder, tmp_path, image=image)
    assert found["accuracy"].value == pytest.approx(100 * hits.mean())
    assert found["accuracy_other"].value == pytest.approx(100 * hits[~yes_no].mean())
    if yes_no.any():
        assert found["accuracy_yes_no"].value == pytest.approx(100 * hits[yes_no].mean())
        assert found["accuracy_yes_no"].n == yes_no.sum()
    assert found["accuracy"].low < found["accuracy"].value < found["accuracy"].high  # type: ignore[operator]


def test_accuracy_of_several_answers(tmp_path: Path, embedder: Embedder) -> None:
    rng = np.random.default_rng(2)
    votes = [np.bincount(rng.integers(0, len(ANSWERS) + 1, 10) // 2, minlength=len(ANSWERS) + 1) for _ in range(13)]
    write_questions(tmp_path, [{"npy": npy(some.astype(np.int16))} for some in votes])
    said = answered(embedder, tmp_path, list(range(13)))
    expected = [plain_accuracy(some.tolist(), answer) for some, answer in zip(votes, said, strict=True)]
    found = evaluated(dataclasses.replace(embedder, batch_size=5), tmp_path)
    assert 0 < found["accuracy"].value < 100
    assert found["accuracy"].value == pytest.approx(100 * np.mean(expected))


def test_what_is_wrong_with_a_set_is_told(tmp_path: Path, embedder: Embedder, tokenizer_dir: Path) -> None:
    good = {"cls": b"1"}
    for number, (files, told) in enumerate(
        (
            ({}, "0.tar#1 has no answer"),
            ({"cls": b"10"}, "0.tar#1 has answer 10; 10"),
            ({"npy": npy(np.array([1, 2], np.int16))}, r"0.tar#1 has a KEY.npy of int16 \(2,\); .* 10 answers"),
            ({"npy": npy(np.zeros(11, np.int16))}, "0.tar#1 has no answer"),
        )
    ):
        with pytest.raises(ValueError, match=told):
            evaluated(embedder, write_questions(tmp_path / str(number), [good, files]))
    named = dataclasses.replace(embedder, model=copy.deepcopy(embedder.model))
    named.model.config.id2label = dict(enumerate(reversed(ANSWERS)))
    with pytest.raises(ValueError, match=f"names class 0 {ANSWERS[0]!r}, and the model's head {ANSWERS[-1]!r}"):
        evaluated(named, write_questions(tmp_path / "reversed", [good]))
    with pytest.raises(ValueError, match=r"0.tar#0 has no caption; every image needs a KEY.txt"):
        evaluated(embedder, write_questions(tmp_path / "blank", [good, good], [" ", "a"]))
    other = tiny_embedder(tokenizer_dir, batch_size=4)
    write_questions(tmp_path, [good, good])
    with pytest.raises(ValueError, match=r"vqa is of kind 'vqa'; the model has no list of answers"):
        evaluated(other, tmp_path)
    (tmp_path / "classnames.txt").write_text("yes\nno\n", encoding="utf-8")
    with pytest.raises(ValueError, match="lists 2 answers, and the model chooses among 10; use a test set"):
        evaluated(embedder, tmp_path)
