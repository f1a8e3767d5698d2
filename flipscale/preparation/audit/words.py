"""Words in captions: words of gender and occupations, and how they go together; countries by their inhabitants."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_FOLDER = Path(__file__).parent
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W\d_]+)*")  # an apostrophe belongs to its word: Côte d'Ivoire
_Z95 = 1.959964  # the normal quantile of a two-sided 95 % interval
_MILLION = 1e6
# An occupation with fewer captions that have a gender says nothing.
_LEAST_CAPTIONS = 5


class Phrases:
    """Finds words and phrases in the words of a caption, whole and the longest first.

    Args:
        called: what each phrase is counted as.
    """

    def __init__(self, called: dict[str, str]):
        self.by_first: dict[str, list[tuple[list[str], str]]] = defaultdict(list)
        for phrase, name in called.items():
            words = _WORD.findall(phrase)
            self.by_first[words[0]].append((words, name))
        for choices in self.by_first.values():
            choices.sort(key=lambda choice: -len(choice[0]))

    def found(self, words: list[str]) -> Iterator[tuple[str, slice]]:
        """Yield what is found and where, in order; a word belongs to one phrase."""
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
    """The phrases that the audit counts."""

    women: frozenset[str]
    men: frozenset[str]
    occupations: Phrases
    countries: Phrases  # in lower case
    ambiguous: frozenset[str]  # names of countries that count only as they are written here
    ambiguous_lower: frozenset[str]


@cache
def lexicon() -> Lexicon:
    """Return the words of `words.yaml`, and the countries of pycountry."""
    import pycountry

    lists = yaml.safe_load((_FOLDER / "words.yaml").read_text(encoding="utf-8"))
    occupations = {f"{name}{plural}": name for name in lists["occupations"] for plural in ("", "s")}
    occupations |= {"secretaries": "secretary", "salespeople": "salesperson"}
    countries: dict[str, str] = {}
    for country in pycountry.countries:
        # "Iran, Islamic Republic of" has the common name "Iran"; a name with a comma is in no caption.
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
    """How many captions have the words, `genders` by (has a word of women, has a word of men)."""

    captions: int = 0
    genders: Counter[tuple[bool, bool]] = field(default_factory=Counter)
    occupations: Counter[tuple[str, bool, bool]] = field(default_factory=Counter)
    countries: Counter[str] = field(default_factory=Counter)

    def add(self, caption: str) -> None:
        """Count one caption."""
        lists = lexicon()
        written = _WORD.findall(caption)
        words = [word.lower() for word in written]
        present = set(words)
        gender = (not lists.women.isdisjoint(present), not lists.men.isdisjoint(present))
        self.captions += 1
        self.genders[gender] += 1
        self.occupations.update((name, *gender) for name in {name for name, _ in lists.occupations.found(words)})
        self.countries.update(set(_countries(words, written)))

    def merge(self, other: "WordCounts") -> None:
        """Add the counts of other captions."""
        self.captions += other.captions
        self.genders += other.genders
        self.occupations += other.occupations
        self.countries += other.countries


def _countries(words: list[str], written: list[str]) -> Iterator[str]:
    """Yield the codes of the countries that a caption names; `written` are its words with their capitals."""
    lists = lexicon()
    for code, where in lists.countries.found(words):
        name = " ".join(written[where])
        if name in lists.ambiguous or name.lower() not in lists.ambiguous_lower:
            yield code


def gender_figures(counts: WordCounts) -> dict[str, Any]:
    """Return how many captions have words of women, of men and of both, and the occupations that go with them."""
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
    return {
        "women": only_women,
        "men": only_men,
        "both": counts.genders[True, True],
        "neither": counts.genders[False, False],
        "occupations": rows,
    }


def log_odds(women: int, men: int, other_women: int, other_men: int) -> dict[str, float]:
    """Return the log of the odds ratio with its 95 % interval: above 0, the occupation goes with words of women.

    Half a caption is added to each of the four counts (Haldane and Anscombe), so that none is zero; the interval is
    Woolf's.

    Args:
        women: captions with the occupation and only words of women; `men` likewise.
        other_women: captions without the occupation and with only words of women; `other_men` likewise.
    """
    cells = [count + 0.5 for count in (women, men, other_women, other_men)]
    value = math.log(cells[0] * cells[3] / (cells[1] * cells[2]))
    half = _Z95 * math.sqrt(sum(1 / cell for cell in cells))
    return {"log_odds": value, "low": value - half, "high": value + half}


def country_figures(counts: WordCounts) -> list[dict[str, Any]]:
    """Return the countries that captions mention, the most mentioned first, with mentions per million inhabitants where
    their number is known."""
    import pycountry

    inhabitants = yaml.safe_load((_FOLDER / "populations.yaml").read_text(encoding="utf-8"))
    rows = []
    for code, mentions in sorted(counts.countries.items(), key=lambda item: (-item[1], item[0])):
        country = pycountry.countries.get(alpha_2=code)
        name = getattr(country, "common_name", None) or getattr(country, "name", code)
        row = {"code": code, "name": name, "captions": mentions}
        if inhabitants.get(code):
            row["per_million"] = mentions / inhabitants[code] * _MILLION
        rows.append(row)
    return rows
