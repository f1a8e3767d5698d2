"""Write VQAv2 as shards: questions about COCO's images with ten answers each, and the list of answers to choose from.

    python examples/questions/vqa_v2.py data/coco data/vqa_v2

Answers are compared as in VQA's evaluation code (Antol et al. 2015).
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.captioning.coco import CocoList, CocoOptions, image_file, print_reports, read_entries, write_parts
from flipscale.io.atomic import write_text
from flipscale.io.command_line import parse_command
from flipscale.io.errors import UserError
from flipscale.preparation.lists import list_digest
from flipscale.process.console import report_user_errors, start_logging

LEAST_SEEN = 9  # questions that must share an answer of the list: METER's (arXiv 2111.02387)
HELD_OUT_IMAGES = 1000  # images whose questions stay the test set when the validation questions are learned: METER's
_URL = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_{}_{}_mscoco.zip"

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"\d,\d")
_PERIOD, _MAX_PERIODS = re.compile(r"\.(?!\d)"), 32  # .5 keeps its period; the evaluation code removes 32 at most
_ARTICLES = {"a", "an", "the"}
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_COUNTED)}}
_CONTRACTIONS: dict[str, str] = yaml.safe_load((Path(__file__).parent / "contractions.yaml").read_text("utf-8"))


@cache
def normalised(answer: str) -> str:
    """Return an answer as VQA's evaluation compares it.

    It is in lower case, without articles and most punctuation, with numbers up to ten in digits and with the
    apostrophes of contractions.
    """
    text = answer
    for sign in _PUNCTUATION:
        vanishes = f"{sign} " in answer or f" {sign}" in answer or _THOUSANDS.search(answer)
        text = text.replace(sign, "" if vanishes else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", text, count=_MAX_PERIODS).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def answer_list(majors: Iterable[str]) -> list[str]:
    """Return the answers to choose from, the commonest first: those of at least `LEAST_SEEN` questions.

    An answer that normalisation leaves blank, as "a", is none of them.

    Args:
        majors: the commonest answer to each question (`multiple_choice_answer`).
    """
    counts = Counter(normalised(major) for major in majors)
    kept = [answer for answer, count in counts.items() if answer and count >= LEAST_SEEN]
    return sorted(kept, key=lambda answer: (-counts[answer], answer))


def count_votes(given: Sequence[str], numbers: Mapping[str, int]) -> np.ndarray:
    """Return how many people gave each answer of the list and, last, any other: uint8 `(answers + 1,)`.

    As in VQA's evaluation, equal answers are not normalised.

    Args:
        given: answer of each person, ten as a rule.
        numbers: number of each answer in the list.
    """
    answers = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in given]
    if len(set(answers)) > 1:
        answers = [normalised(answer) for answer in answers]
    counts = np.zeros(len(numbers) + 1, np.uint8)
    for answer in answers:
        counts[numbers.get(answer, -1)] += 1
    return counts


@dataclass(frozen=True)
class Question:
    """A question: its number, its image, its text, the commonest answer and all answers."""

    number: int
    folder: str
    image: int
    text: str
    major: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class QuestionList(CocoList):
    """Images of COCO with a question.

    Args:
        given: people's answers to each question.
        answers: answers of the list.
    """

    given: tuple[tuple[str, ...], ...] = ()
    answers: tuple[str, ...] = ()

    def votes(self, number: int) -> np.ndarray:
        return count_votes(self.given[number], self._numbers)

    def fingerprint(self) -> str:
        return list_digest([super().fingerprint(), self.given, self.answers])

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {answer: number for number, answer in enumerate(self.answers)}


def prepare_vqa_v2(
    coco: Path, out_dir: Path, with_val: bool, short_side: int, processes: int
) -> tuple[dict[Path, dict[str, Any]], int, int]:
    """Write the shards of train/ and test/, a sample for each question, and the answers to classnames.txt.

    The same call continues after a kill.

    Args:
        coco: folder with the four JSON files of questions and annotations, train2014/ and val2014/.
        out_dir: folder to write.
        with_val: whether to learn the validation questions too, except those of `HELD_OUT_IMAGES` images.
        short_side: short side in pixels to which larger images are shrunk.
        processes: number of processes that write.

    Returns:
        The report of each part, the number of answers, and the number of training questions that are left out because
        no answer of theirs is in the list.

    Raises:
        UserError: a file of `coco` is missing or damaged, or an error of `write_shards`.
        OSError: a worker died, or the disk is full.
    """
    train, test = read_questions(coco, "train2014", "Train"), read_questions(coco, "val2014", "Val")
    answers = answer_list(question.major for question in (*train, *test))
    if not answers:
        raise UserError(f"the files of {coco} have no answer that is seen often; they are not whole: unpack them again")
    if with_val:
        held_out = set(sorted({question.image for question in test})[-HELD_OUT_IMAGES:])
        train += [question for question in test if question.image not in held_out]
        test = [question for question in test if question.image in held_out]
    numbers = {answer: number for number, answer in enumerate(answers)}
    learned = [question for question in train if count_votes(question.answers, numbers)[:-1].any()]
    pairs = {"train": _pairs(coco, learned, answers), "test": _pairs(coco, test, answers)}
    reports = write_parts(pairs, out_dir, short_side, processes)
    write_text(out_dir / "classnames.txt", "".join(f"{answer}\n" for answer in answers))
    return reports, len(answers), len(train) - len(learned)


def _pairs(coco: Path, questions: Sequence[Question], answers: Sequence[str]) -> QuestionList:
    return QuestionList(
        coco,
        keys=tuple(str(one.number) for one in questions),
        files=tuple(image_file(one.folder, f"COCO_{one.folder}_{one.image:012d}.jpg") for one in questions),
        texts=tuple((one.text,) for one in questions),
        given=tuple(one.answers for one in questions),
        answers=tuple(answers),
    )


def read_questions(coco: Path, folder: str, name: str) -> list[Question]:
    """Return the questions about the images of a folder, in the order of their file.

    Args:
        coco: folder of the JSON files.
        folder: `train2014` or `val2014`.
        name: name of the part in the URLs: `Train` or `Val`.

    Raises:
        UserError: a file is missing or damaged, or the two files do not belong together.
    """
    path = coco / f"v2_mscoco_{folder}_annotations.json"
    url = _URL.format("Annotations", name)
    answered: dict[int, tuple[str, tuple[str, ...]]] = {}
    for at, entry in enumerate(read_entries(path, "annotations", url, _keep_answer)):
        try:
            answers = tuple(sys.intern(answer) for answer in entry["answers"])
            answered[int(entry["question_id"])] = sys.intern(entry["multiple_choice_answer"]), answers
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: annotations[{at}] is not as in {url} ({error!r}); unpack it again") from error
    questions = []
    path, url = coco / f"v2_OpenEnded_mscoco_{folder}_questions.json", _URL.format("Questions", name)
    for at, entry in enumerate(read_entries(path, "questions", url)):
        try:
            number, image, text = int(entry["question_id"]), int(entry["image_id"]), " ".join(entry["question"].split())
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path}: questions[{at}] is not as in {url} ({error!r}); unpack it again") from error
        major, answers = answered.get(number, ("", ()))
        if not text or not answers:
            missing = f"answers in v2_mscoco_{folder}_annotations.json" if text else "text"
            raise UserError(f"{path}: question {number} has no {missing}; unpack both files of VQA v2.0 again")
        questions.append(Question(number, folder, image, text, major, answers))
    return questions


def _keep_answer(entry: dict[str, Any]) -> Any:
    """Return a person's answer alone, because 4.4 million dictionaries would not fit; other objects unchanged."""
    return entry["answer"] if "answer_confidence" in entry and "answer" in entry else entry


@dataclass(frozen=True)
class VqaOptions(CocoOptions):
    """Write VQAv2 as shards: questions about COCO's images, and their answers.

    Args:
        source: Folder with the four JSON files of VQA v2.0's training and validation questions, and COCO's images of
            2014 in train2014/ and val2014/.
        with_val: Learn the validation questions too, except those of the last 1,000 images, the test set then. By
            default, all validation questions are the test set.
    """

    with_val: bool = field(default=False, kw_only=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the questions that the command line names."""
    with report_user_errors():
        start_logging()
        given = parse_command(VqaOptions, arguments)
        reports, num_answers, unlearned = prepare_vqa_v2(
            given.source, given.directory, given.with_val, given.short_side, given.num_workers
        )
        print_reports(reports)
        print(
            f"{given.directory / 'classnames.txt'}: {num_answers:,} answers, for loss.options.num_answers; "
            f"{unlearned:,} training questions have none of them and are left out"
        )


if __name__ == "__main__":
    main()
