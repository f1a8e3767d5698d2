"""The answers of VQA: how its evaluation writes them, which of them are a list to choose from, and who gave which.

The steps are those of VQA's evaluation code (Antol et al. 2015), so that a count of equal answers is its count.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import yaml

# METER's, which leaves 3,129 answers of VQAv2's training and validation questions (arXiv 2111.02387).
LEAST_SEEN = 9

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"\d,\d")
# Not one of a decimal number such as .5; the evaluation's code takes away 32 at most.
_PERIOD, _MOST_PERIODS = re.compile(r"\.(?!\d)"), 32
_ARTICLES = {"a", "an", "the"}
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_COUNTED)}}
_CONTRACTIONS: dict[str, str] = yaml.safe_load((Path(__file__).parent / "contractions.yaml").read_text("utf-8"))


@cache
def normalised(answer: str) -> str:
    """Return an answer as VQA's evaluation compares it: in lower case, without articles and most punctuation, numbers
    up to ten in digits, contractions with their apostrophes."""
    text = answer
    for sign in _PUNCTUATION:
        vanishes = f"{sign} " in answer or f" {sign}" in answer or _THOUSANDS.search(answer)
        text = text.replace(sign, "" if vanishes else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", text, count=_MOST_PERIODS).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def answer_list(majors: Iterable[str]) -> list[str]:
    """Return the answers to choose from: those that are the answer of `LEAST_SEEN` questions or more, the commonest
    first.

    Args:
        majors: the answer of each question that most people gave (`multiple_choice_answer`).
    """
    counts = Counter(normalised(major) for major in majors)
    kept = [answer for answer, count in counts.items() if count >= LEAST_SEEN]
    return sorted(kept, key=lambda answer: (-counts[answer], answer))


def votes(given: Sequence[str], numbers: Mapping[str, int]) -> np.ndarray:
    """Return how many people gave each answer of the list and, last, any other: uint8 `(answers + 1,)`. As in VQA's
    evaluation, answers that are all the same are not rewritten.

    Args:
        given: what each said, ten people as a rule.
        numbers: of the answers of the list.
    """
    said = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in given]
    if len(set(said)) > 1:
        said = [normalised(answer) for answer in said]
    counts = np.zeros(len(numbers) + 1, np.uint8)
    for answer in said:
        counts[numbers.get(answer, -1)] += 1
    return counts
