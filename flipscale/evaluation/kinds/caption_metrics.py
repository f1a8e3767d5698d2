"""Caption metrics: words as COCO's evaluation counts them, and CIDEr, BLEU-4 and ROUGE-L (pycocoevalcap 1.2).

They are written anew because COCO's tools come with 100 MB of Java programs, have had no release since 2020, and carry
a BLEU whose header forbids commercial use. Tests compare the two. The words are those of Stanford's PTBTokenizer 3.4.1:
the Penn Treebank's, in lower case, without punctuation. A candidate is a list of words; each image has one candidate
and one reference or more.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from flipscale.evaluation.intervals import Estimate, bootstrapped

Words = list[str]
Gram = tuple[str, ...]

_LONGEST = 4  # words in an n-gram
_SIGMA = 6.0  # width of CIDEr's length penalty, in bigrams
_BETA = 1.2  # ROUGE-L's weight of recall
_SMALL, _TINY = 1e-9, 1e-15  # COCO's BLEU adds them to avoid a division by 0 and a score of 0


def cider(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """Return the CIDEr of each image, fp64 `(images,)` in [0, 10] (Vedantam et al., arXiv 1411.5726).

    It is CIDEr-D, the form of COCO's server, with clipped counts and a length penalty. The inverse document frequencies
    come from all given references, so a part of a set has other scores."""
    documents = Counter(gram for image in references for gram in {gram for words in image for gram in _ngrams(words)})
    most = math.log(max(len(references), 1))

    def vectors(words: Words) -> tuple[list[dict[Gram, float]], list[float], int]:
        by_length: list[dict[Gram, float]] = [{} for _ in range(_LONGEST)]
        for gram, count in _ngrams(words).items():
            by_length[len(gram) - 1][gram] = count * (most - math.log(max(documents[gram], 1)))
        norms = [math.sqrt(sum(value * value for value in vector.values())) for vector in by_length]
        return by_length, norms, max(len(words) - 1, 0)

    scores = []
    for candidate, image in zip(candidates, references, strict=True):
        mine, my_norms, my_length = vectors(candidate)
        total = 0.0
        for words in image:
            other, norms, length = vectors(words)
            products = [
                sum(min(value, theirs[gram]) * theirs[gram] for gram, value in ours.items() if gram in theirs)
                / (my_norm * norm if my_norm and norm else 1.0)
                for ours, theirs, my_norm, norm in zip(mine, other, my_norms, norms, strict=True)
            ]
            total += sum(products) / _LONGEST * math.exp(-((my_length - length) ** 2) / (2 * _SIGMA**2))
        scores.append(10.0 * total / len(image))
    return np.array(scores)


def bleu_4(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> Estimate:
    """Return the BLEU-4 of the whole set, in [0, 1], with a bootstrap interval over images (Papineni et al. 2002).

    The reference length is the nearest to each candidate's, and the shorter of two equally near ones."""
    pairs = zip(candidates, references, strict=True)
    counts = np.array([_bleu_counts(candidate, image) for candidate, image in pairs], np.float64)

    def measure(times: np.ndarray) -> float:
        total = times @ counts
        right, tried, (length, reference) = total[:_LONGEST], total[_LONGEST : 2 * _LONGEST], total[2 * _LONGEST :]
        precision = float(np.prod((right + _TINY) / (tried + _SMALL))) ** (1 / _LONGEST)
        ratio = (length + _TINY) / (reference + _SMALL)
        return precision * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)

    return bootstrapped(measure, len(counts))


def rouge_l(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """Return the ROUGE-L of each image, fp64 `(images,)` in [0, 1] (Lin 2004).

    It combines the best precision and the best recall of the longest common subsequence over the references."""
    scores = []
    for candidate, image in zip(candidates, references, strict=True):
        # COCO's tools treat an empty caption as one empty word.
        shared = [(_common(candidate or [""], words or [""]), len(words or [""])) for words in image]
        precision = max(length for length, _ in shared) / len(candidate or [""])
        recall = max(length / words for length, words in shared)
        both = recall + _BETA**2 * precision
        scores.append((1 + _BETA**2) * precision * recall / both if both else 0.0)
    return np.array(scores)


def _ngrams(words: Words) -> Counter[Gram]:
    return Counter(
        tuple(words[first : first + length])
        for length in range(1, _LONGEST + 1)
        for first in range(len(words) - length + 1)
    )


def _bleu_counts(candidate: Words, references: Sequence[Words]) -> list[int]:
    """Return the numbers of right n-grams and of all n-grams for each n, then the lengths of the candidate and of the
    nearest reference."""
    most: Counter[Gram] = Counter()
    for words in references:
        most |= _ngrams(words)
    right = [0] * _LONGEST
    for gram, count in (_ngrams(candidate) & most).items():
        right[len(gram) - 1] += count
    length = len(candidate)
    nearest = min((abs(len(words) - length), len(words)) for words in references)[1]
    return [*right, *(max(length - longer, 0) for longer in range(_LONGEST)), length, nearest]


def _common(one: Words, other: Words) -> int:
    before = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for place, theirs in enumerate(other):
            row.append(before[place] + 1 if word == theirs else max(before[place + 1], row[place]))
        before = row
    return before[-1]


# Tokens that COCO's tools drop. They keep brackets by mistake: their list has them in upper case.
_LEFT_OUT = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_WRITTEN = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "£": "#", "€": "$"},
    **{"½": "1/2", "¼": "1/4", "¾": "3/4", "&amp;": "&", "&lt;": "<", "&gt;": ">", "…": "...", "—": "--"},
    "\u2013": "--",
    **dict.fromkeys('"“”', "''"),
    **dict.fromkeys("\u2018\u2019", "'"),
}
# Abbreviations, whose full stop belongs to the word.
_ABBREVIATIONS = (
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thur|thurs|fri|sat|sun|mr|mrs|ms|miss|dr|drs|"
    "prof|st|ste|jr|sr|bros|inc|ltd|co|corp|cos|dept|est|etc|vs|v|al|ave|blvd|rd|mt|ft|hwy|gen|col|capt|cpl|lt|sgt|maj|"
    "gov|sen|rep|reps|rev|hon|pres|supt|ph\\.d|esq|assn|univ|al|ed|eds|fig|figs"
)
_FAR = re.compile(r"[\U00010000-\U0010FFFF]")  # such as emoji, which PTBTokenizer drops
_WORD = r"[^\W_]+"
_TOKEN = re.compile(
    rf"""
    (?P<link> https?://[^\s"<>|()]*[^\s"<>|().?!,:;'-] | [\w.+-]+@[\w-]+(?:\.[\w-]+)+ | www\.[^\s"<>|()]*\w )
    | (?P<tag> </?[a-z][\w]*\ ?/?> )
    | (?P<entity> &(?:amp|lt|gt); )
    | (?P<of_two> (?:can)(?=not\b) | (?:gon|wan)(?=na\b) | (?:got)(?=ta\b) | (?:gim|lem)(?=me\b) | 't(?=is\b|was\b) )
    | (?P<negated> [a-z]+?(?=n['\u2019]t\b) | n['\u2019]t\b )
    | (?P<clitic> ['\u2019](?:s|m|d|re|ve|ll)\b )
    | (?P<year> (?<!\d)'\d\ds?\b | 'n' | y'(?=all\b) )
    | (?P<dotted> [a-z](?:\.[a-z])+\.? (?!\w) )
    | (?P<initial> (?-i:[A-Z])\.(?!\w) )
    | (?P<short> (?:{_ABBREVIATIONS})\.(?!\w) )
    | (?P<number> [+-]?\d+(?:[.,:/-]\d+)*(?![^\W_]|[-/]{_WORD}) )
    | (?P<word> (?:o|d|l)['\u2019]{_WORD} | ma'am | (?:\#(?=[a-z]))?{_WORD}(?:[-/_.]{_WORD})* )
    | (?P<quote> ``|''|"|“|” )
    | (?P<sign> \.{{2,}} | [!?]+ | -{{2,}} | \S )
    """,
    re.VERBOSE | re.IGNORECASE,
)


def caption_words(caption: str) -> list[str]:
    tokens = (match[0].lower() for match in _TOKEN.finditer(_FAR.sub(" ", caption)))
    words = (_WRITTEN.get(token, token) for token in tokens)
    return [word for word in words if word not in _LEFT_OUT]
