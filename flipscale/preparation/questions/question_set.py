"""Sets of questions about images, written as shards: a labelled set whose samples have a question as their text."""

import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flipscale.data.sources.tar_file import add_member
from flipscale.io.atomic import write_text

QUESTIONS_PER_SHARD = 5000


@dataclass(frozen=True)
class Question:
    """A question about an image.

    Args:
        image: encoded.
        extension: of its kind, such as `png`.
        text: the question.
        answer: the number of its answer in the list of all.
    """

    image: bytes
    extension: str
    text: str
    answer: int


def write_questions(directory: Path, part: str, questions: Iterable[Question]) -> int:
    """Write `directory/PART/N.tar` with KEY.png (or another kind), KEY.txt, the question, and KEY.cls, the number of
    the answer, and PART's `nshards.txt`. Return how many questions there are."""
    (directory / part).mkdir(parents=True)
    every = list(questions)
    firsts = range(0, len(every), QUESTIONS_PER_SHARD)
    for shard, first in enumerate(firsts):
        with tarfile.open(directory / part / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, one in enumerate(every[first : first + QUESTIONS_PER_SHARD], first):
                add_member(tar, f"q{number:08d}.{one.extension}", one.image)
                add_member(tar, f"q{number:08d}.txt", one.text.encode())
                add_member(tar, f"q{number:08d}.cls", str(one.answer).encode())
    write_text(directory / part / "nshards.txt", str(len(firsts)))
    return len(every)


def write_answers(directory: Path, answers: Sequence[str]) -> None:
    """Write the list of all answers, in the order of their numbers, as the class names of a labelled set."""
    write_text(directory / "classnames.txt", "".join(f"{answer}\n" for answer in answers))
