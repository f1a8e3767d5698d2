"""Count words in captions: languages, words of gender with occupations, and countries."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flipscale.io.progress import each

if TYPE_CHECKING:
    from lingua import LanguageDetector

UNSURE, NO_LETTERS = "unsure", "no letters"
# Letters from which 96 % of texts of known language were identified correctly (docs/evaluation.md). Shorter captions
# are reported apart.
LONG_LETTERS = 25
LEAST_RATIO = 2.0  # likelihood of the language over the next one, below which it is unsure
_TEXTS_AT_ONCE = 1000
# Languages that short texts do not tell apart, under a common name.
_TOGETHER = {
    **dict.fromkeys(("BOKMAL", "NYNORSK"), "Norwegian"),
    **dict.fromkeys(("BOSNIAN", "CROATIAN", "SERBIAN"), "Bosnian, Croatian or Serbian"),
    **dict.fromkeys(("INDONESIAN", "MALAY"), "Indonesian or Malay"),
}
_FOLDER = Path(__file__).parent
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W\d_]+)*")  # an apostrophe belongs to its word: Côte d'Ivoire
_Z95 = 1.959964  # the normal quantile of a two-sided 95 % interval
_LEAST_CAPTIONS = 5  # captions with a gender that an occupation needs for a ratio


@cache
def _detector() -> "LanguageDetector":
    """Return the detector of all languages; its models take about 20 s and 1.3 GB, once."""
    from lingua import LanguageDetectorBuilder

    return LanguageDetectorBuilder.from_all_languages().build()


def num_letters(text: str) -> int:
    """Return the number of letters."""
    return sum(map(str.isalpha, text))


def languages_of(texts: Sequence[str]) -> Iterator[str]:
    """Yield the language of each text, `unsure` or `no letters`, with all cores; 60 characters take 4 ms of a core."""
    for first in range(0, len(texts), _TEXTS_AT_ONCE):
        some = list(texts[first : first + _TEXTS_AT_ONCE])
        for text, values in zip(some, _detector().compute_language_confidence_values_in_parallel(some), strict=True):
            confidence: dict[str, float] = defaultdict(float)
            for value in values:
                name = value.language.name
                confidence[_TOGETHER.get(name, name.title())] += value.value
            (best, likeliest), (_, next_best) = sorted(confidence.items(), key=lambda item: -item[1])[:2]
            if not num_letters(text):
                yield NO_LETTERS
            else:
                yield best if likeliest >= LEAST_RATIO * next_best and likeliest > 0 else UNSURE


def language_figures(captions: Mapping[str, int], is_sample: bool) -> dict[str, Any]:
    """Return the languages of long and short captions, the commonest first.

    Args:
        captions: number of times of each caption.
        is_sample: whether these are not all captions; then shares have Wilson's 95 % intervals.
    """
    from scipy.stats import binomtest

    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    texts = list(captions)
    for text, language in each(zip(texts, languages_of(texts), strict=True), "languages", "captions", len(texts)):
        counts[num_letters(text) >= LONG_LETTERS][language] += captions[text]
    figures: dict[str, Any] = {"checked": sum(captions.values()), "distinct": len(texts), "is_sample": is_sample}
    for key, is_long in (("long", True), ("short", False)):
        total, rows = counts[is_long].total(), []
        for language, count in counts[is_long].most_common():
            row = {"language": language, "count": count, "share": count / total}
            if is_sample:
                interval = binomtest(count, total).proportion_ci(method="wilson")
                row |= {"low": float(interval.low), "high": float(interval.high)}
            rows.append(row)
        figures[key] = {"captions": total, "languages": rows}
    return figures


class Phrases:
    """Phrases with their names, found in the words of a caption, the longest first."""

    def __init__(self, names: dict[str, str]):
        self.by_first: dict[str, list[tuple[list[str], str]]] = defaultdict(list)
        for phrase, name in names.items():
            words = _WORD.findall(phrase)
            self.by_first[words[0]].append((words, name))
        for choices in self.by_first.values():
            choices.sort(key=lambda choice: -len(choice[0]))

    def find(self, words: list[str]) -> Iterator[tuple[str, slice]]:
        """Yield the name and place of each phrase in order; a word belongs to one phrase."""
        at = 0
        while at < len(words):
            step = 1
            for phrase, name in self.by_first.get(words[at], ()):
                if words[at : at + len(phrase)] == phrase:
                    yield name, slice(at, at + len(phrase))
                    step = len(phrase)
                    break
            at += step


@dataclass(frozen=True)
class Lexicon:
    """Words and phrases that are counted; `ambiguous` names of countries count only in this spelling."""

    women: frozenset[str]
    men: frozenset[str]
    occupations: Phrases
    countries: Phrases  # in lower case
    ambiguous: frozenset[str]
    ambiguous_lower: frozenset[str]


@cache
def lexicon() -> Lexicon:
    """Return the words of `words.yaml` and the countries of pycountry."""
    import pycountry

    lists = yaml.safe_load((_FOLDER / "words.yaml").read_text(encoding="utf-8"))
    occupations = {f"{name}{plural}": name for name in lists["occupations"] for plural in ("", "s")}
    occupations |= {"secretaries": "secretary", "salespeople": "salesperson"}
    countries: dict[str, str] = {}
    for country in pycountry.countries:
        # "Iran, Islamic Republic of" has the common name "Iran"; no caption has a name with a comma.
        plain = [getattr(country, "common_name", ""), country.name, *lists["countries"].get(country.alpha_2, [])]
        countries |= {name: country.alpha_2 for name in plain if name and "," not in name and "(" not in name}
    return Lexicon(
        frozenset(lists["women"]),
        frozenset(lists["men"]),
        Phrases(occupations),
        Phrases({name.lower(): code for name, code in countries.items()}),
        frozenset(lists["ambiguous"]),
        frozenset(name.lower() for name in lists["ambiguous"]),
    )


@dataclass
class WordCounts:
    """Numbers of captions with the words; `genders` by (has a word of women, has a word of men)."""

    captions: int = 0
    genders: Counter[tuple[bool, bool]] = field(default_factory=Counter)
    occupations: Counter[tuple[str, bool, bool]] = field(default_factory=Counter)
    countries: Counter[str] = field(default_factory=Counter)

    def add(self, caption: str) -> None:
        """Count a caption."""
        lists = lexicon()
        written = _WORD.findall(caption)
        words = [word.lower() for word in written]
        present = set(words)
        gender = (not lists.women.isdisjoint(present), not lists.men.isdisjoint(present))
        self.captions += 1
        self.genders[gender] += 1
        self.occupations.update((name, *gender) for name in {name for name, _ in lists.occupations.find(words)})
        codes = set()
        for code, where in lists.countries.find(words):
            name = " ".join(written[where])
            if name in lists.ambiguous or name.lower() not in lists.ambiguous_lower:
                codes.add(code)
        self.countries.update(codes)

    def merge(self, other: "WordCounts") -> None:
        """Add the counts of other captions."""
        self.captions += other.captions
        self.genders += other.genders
        self.occupations += other.occupations
        self.countries += other.countries


def gender_figures(counts: WordCounts) -> dict[str, Any]:
    """Return the numbers of captions with words of women, of men and of both, and their occupations."""
    only_women, only_men = counts.genders[True, False], counts.genders[False, True]
    rows = []
    for name in sorted({name for name, _, _ in counts.occupations}):
        women, men = counts.occupations[name, True, False], counts.occupations[name, False, True]
        total = sum(counts.occupations[name, w, m] for w in (True, False) for m in (True, False))
        row: dict[str, Any] = {"occupation": name, "captions": total, "with_women": women, "with_men": men}
        if women + men >= _LEAST_CAPTIONS:
            row |= log_odds(women, men, only_women - women, only_men - men)
        rows.append(row)
    rows.sort(key=lambda row: (-row["with_women"] - row["with_men"], row["occupation"]))
    both, neither = counts.genders[True, True], counts.genders[False, False]
    return {"women": only_women, "men": only_men, "both": both, "neither": neither, "occupations": rows}


def log_odds(women: int, men: int, other_women: int, other_men: int) -> dict[str, float]:
    """Return the log of the odds ratio with Woolf's 95 % interval: above 0, the occupation goes with words of women.

    Half a caption is added to each count (Haldane and Anscombe), so that none is zero.

    Args:
        women: captions with the occupation and only words of women.
        men: captions with the occupation and only words of men.
        other_women: captions without the occupation and with only words of women.
        other_men: captions without the occupation and with only words of men.
    """
    cells = [count + 0.5 for count in (women, men, other_women, other_men)]
    value = math.log(cells[0] * cells[3] / (cells[1] * cells[2]))
    half = _Z95 * math.sqrt(sum(1 / cell for cell in cells))
    return {"log_odds": value, "low": value - half, "high": value + half}


def country_figures(counts: WordCounts) -> list[dict[str, Any]]:
    """Return the countries by mentions, the most mentioned first, with mentions per million inhabitants if known."""
    import pycountry

    inhabitants = yaml.safe_load((_FOLDER / "populations.yaml").read_text(encoding="utf-8"))
    rows = []
    for code, mentions in sorted(counts.countries.items(), key=lambda item: (-item[1], item[0])):
        country = pycountry.countries.get(alpha_2=code)
        name = getattr(country, "common_name", None) or getattr(country, "name", code)
        row = {"code": code, "name": name, "captions": mentions}
        if inhabitants.get(code):
            row["per_million"] = mentions / inhabitants[code] * 1e6
        rows.append(row)
    return rows
