"""Count words in captions: languages, words of gender with occupations, and countries."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from flipscale.io.progress import each

if TYPE_CHECKING:
    from lingua import LanguageDetector

UNSURE, NO_LETTERS = "unsure", "no letters"
# Letters from which 96 % of texts of known language were identified (docs/evaluation.md). Shorter ones are apart.
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

# Numbers of captions by ("captions",), ("gender", women, men), ("occupation", name, women, men) and ("country", code);
# `women` and `men` are whether a caption has words of them.
WordCounts = Counter[tuple[Any, ...]]


@cache
def _detector() -> "LanguageDetector":
    """Return the detector of all languages; its models take about 20 s and 1.3 GB, once."""
    from lingua import LanguageDetectorBuilder

    return LanguageDetectorBuilder.from_all_languages().build()


def num_letters(text: str) -> int:
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
    """Return the languages of long and short captions, given with their counts, the commonest first. Shares have
    Wilson's 95 % intervals if `is_sample`, so that these are not all captions."""
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
    return {**figures, "long_letters": LONG_LETTERS}


class Lexicon(NamedTuple):
    """Words that are counted, in lower case, with patterns of the phrases.

    Args:
        occupations: name of an occupation by its singular and plural.
        occupation: pattern of an occupation.
        countries: code of a country by its names.
        country: pattern of a country's name.
        spelling: the only spelling that counts of a country's name that is also another word.
    """

    women: set[str]
    men: set[str]
    occupations: dict[str, str]
    occupation: re.Pattern[str]
    countries: dict[str, str]
    country: re.Pattern[str]
    spelling: dict[str, str]


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
        names = [name for name in plain if name and "," not in name and "(" not in name]
        countries |= {_joined_words(name).lower(): country.alpha_2 for name in names}
    spelling = {name.lower(): name for name in lists["ambiguous"]}
    words = set(lists["women"]), set(lists["men"])
    return Lexicon(*words, occupations, _pattern(occupations), countries, _pattern(countries), spelling)


def _joined_words(text: str) -> str:
    return " ".join(_WORD.findall(text))


def _pattern(phrases: Iterable[str]) -> re.Pattern[str]:
    """Return the pattern of a phrase in joined words, the longest first."""
    choices = "|".join(map(re.escape, sorted(phrases, key=len, reverse=True)))
    return re.compile(rf"(?<!\S)(?:{choices})(?!\S)", re.IGNORECASE)


def count_words(caption: str) -> WordCounts:
    """Count what a caption mentions."""
    words, text = lexicon(), _joined_words(caption)
    present = set(text.lower().split())
    gender = (not words.women.isdisjoint(present), not words.men.isdisjoint(present))
    occupations = {words.occupations[found.lower()] for found in words.occupation.findall(text)}
    named = {name for name in words.country.findall(text) if words.spelling.get(name.lower(), name) == name}
    return Counter(
        [("captions",), ("gender", *gender), *(("occupation", name, *gender) for name in occupations)]
        + [("country", code) for code in {words.countries[name.lower()] for name in named}]
    )


def gender_figures(counts: WordCounts) -> dict[str, Any]:
    """Return the numbers of captions with words of women, of men and of both, and their occupations."""
    rows = []
    for name in sorted({key[1] for key in counts if key[0] == "occupation"}):
        women, men = counts["occupation", name, True, False], counts["occupation", name, False, True]
        total = sum(counts["occupation", name, w, m] for w in (True, False) for m in (True, False))
        rows.append({"occupation": name, "captions": total, "with_women": women, "with_men": men})
    rows.sort(key=lambda row: (-row["with_women"] - row["with_men"], row["occupation"]))
    kinds = {"women": (True, False), "men": (False, True), "both": (True, True), "neither": (False, False)}
    return {**{name: counts[("gender", *kind)] for name, kind in kinds.items()}, "occupations": rows}


def country_figures(counts: WordCounts) -> list[dict[str, Any]]:
    """Return the countries by mentions, the most mentioned first."""
    import pycountry

    names = {country.alpha_2: getattr(country, "common_name", country.name) for country in pycountry.countries}
    mentioned = sorted((-count, key[1]) for key, count in counts.items() if key[0] == "country")
    return [{"code": code, "name": names[code], "captions": -count} for count, code in mentioned]
