"""VQAv2: questions about COCO's images, each answered by ten people, and the answers that a model chooses from."""

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flipscale.io.errors import UserError
from flipscale.preparation.coco.answers import answer_list, votes
from flipscale.preparation.coco.images import CocoList, image_file, read_entries, write_parts
from flipscale.preparation.lists.files import digest_of
from flipscale.preparation.questions.question_set import write_answers

# Of the validation questions where the others are learned, as METER holds out.
HELD_OUT_IMAGES = 1000
_WHERE = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_{}_{}_mscoco.zip"


@dataclass(frozen=True)
class Asked:
    """A question: its number, its image, the answer that most people gave, and what each of them said."""

    number: int
    image: int
    text: str
    major: str
    said: tuple[str, ...]


@dataclass(frozen=True)
class QuestionList(CocoList):
    """Images of COCO with a question.

    Args:
        said: what people answered to each.
        answers: that are counted.
    """

    said: tuple[tuple[str, ...], ...]
    answers: tuple[str, ...]

    def votes(self, number: int) -> np.ndarray:
        return votes(self.said[number], self._numbers)

    def fingerprint(self) -> str:
        return digest_of([super().fingerprint(), self.said, self.answers])

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {answer: number for number, answer in enumerate(self.answers)}


def prepare_vqa_v2(
    coco: Path, out_dir: Path, with_val: bool, short_side: int, processes: int
) -> tuple[dict[Path, dict[str, Any]], int, int]:
    """Write VQAv2 as shards to train/ and test/ in `out_dir`, a sample for each question, and the answers to
    classnames.txt. Return the report of each part, the number of answers, and of the training questions that are left
    out because nobody gave an answer of the list. The same command goes on after an interruption.

    Args:
        coco: the folder with the four JSON files of questions and annotations, train2014/ and val2014/.
        with_val: learn the validation questions too, but for those of `HELD_OUT_IMAGES` images, which are the test set
            then.
        short_side: to which larger images are shrunk.

    Raises:
        ValueError: a file of `coco` is missing or another one, or as `write_shards`.
        OSError: as `write_shards`.
    """
    asked = {folder: _asked(coco, folder, name) for folder, name in (("train2014", "Train"), ("val2014", "Val"))}
    answers = answer_list(one.major for some in asked.values() for one in some)
    if not answers:
        raise UserError(f"the files of {coco} have no answer that is seen often; they are not whole: unpack them again")
    train = [("train2014", one) for one in asked["train2014"]]
    test = [("val2014", one) for one in asked["val2014"]]
    if with_val:
        held_out = set(sorted({one.image for _, one in test})[-HELD_OUT_IMAGES:])
        train += [(folder, one) for folder, one in test if one.image not in held_out]
        test = [(folder, one) for folder, one in test if one.image in held_out]
    numbers = {answer: number for number, answer in enumerate(answers)}
    learned = [(folder, one) for folder, one in train if votes(one.said, numbers)[:-1].any()]
    parts = {"train": learned, "test": test}
    pairs = {part: _pairs(coco, some, tuple(answers)) for part, some in parts.items()}
    reports = write_parts(pairs, out_dir, short_side, processes)
    write_answers(out_dir, answers)
    return reports, len(answers), len(train) - len(learned)


def _pairs(coco: Path, asked: list[tuple[str, Asked]], answers: tuple[str, ...]) -> QuestionList:
    return QuestionList(
        coco,
        keys=tuple(str(one.number) for _, one in asked),
        files=tuple(image_file(folder, f"COCO_{folder}_{one.image:012d}.jpg") for folder, one in asked),
        texts=tuple((one.text,) for _, one in asked),
        said=tuple(one.said for _, one in asked),
        answers=answers,
    )


def _asked(coco: Path, folder: str, name: str) -> list[Asked]:
    """Return the questions about the images of a folder, in the order of their file.

    Args:
        name: of the folder's part, as the files to download are called.

    Raises:
        ValueError: a file is missing or another one, or the two do not belong together.
    """
    questions = coco / f"v2_OpenEnded_mscoco_{folder}_questions.json"
    annotations = coco / f"v2_mscoco_{folder}_annotations.json"
    where = _WHERE.format("Annotations", name)
    answered: dict[int, tuple[str, tuple[str, ...]]] = {}
    for number, entry in enumerate(read_entries(annotations, "annotations", where, _answer_alone)):
        try:
            said = tuple(sys.intern(answer) for answer in entry["answers"])
            answered[int(entry["question_id"])] = sys.intern(entry["multiple_choice_answer"]), said
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{annotations}: annotations[{number}] is not as in {where} ({error!r}); unpack it again"
            ) from error
    found = []
    where = _WHERE.format("Questions", name)
    for number, entry in enumerate(read_entries(questions, "questions", where)):
        try:
            about = int(entry["question_id"]), int(entry["image_id"]), " ".join(entry["question"].split())
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"{questions}: questions[{number}] is not as in {where} ({error!r}); unpack it again"
            ) from error
        if not about[2] or not (of_it := answered.get(about[0])) or not of_it[1]:
            missing = "text" if not about[2] else f"answers in {annotations.name}"
            raise UserError(f"{questions}: question {about[0]} has no {missing}; unpack both files of VQA v2.0 again")
        found.append(Asked(*about, *of_it))
    return found


def _answer_alone(entry: dict[str, Any]) -> Any:
    """Return what one of ten people answered without the rest of it; another object as it is."""
    return entry["answer"] if "answer_confidence" in entry and "answer" in entry else entry
