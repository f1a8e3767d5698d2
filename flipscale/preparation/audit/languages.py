"""The languages of captions, by lingua."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from flipscale.preparation.audit.shares import share_row

if TYPE_CHECKING:
    from lingua import LanguageDetector

UNSURE, NO_LETTERS = "unsure", "no letters"
# Letters from which 96 % of texts of known language were told rightly (docs/evaluation.md); shorter ones are reported
# apart.
LONG_LETTERS = 25
# How many times as likely as the next language the likeliest has to be; else a caption's language counts as unsure.
LEAST_RATIO = 2.0
_AT_ONCE = 1000
# Languages that short texts do not tell apart, under their macrolanguages' names.
_TOGETHER = {
    "BOKMAL": "Norwegian",
    "NYNORSK": "Norwegian",
    "BOSNIAN": "Bosnian, Croatian or Serbian",
    "CROATIAN": "Bosnian, Croatian or Serbian",
    "SERBIAN": "Bosnian, Croatian or Serbian",
    "INDONESIAN": "Indonesian or Malay",
    "MALAY": "Indonesian or Malay",
}


@cache
def _detector() -> "LanguageDetector":
    """Return the detector of all languages. Its models load with the first captions: about 20 s and 1.3 GB, once."""
    from lingua import LanguageDetectorBuilder

    return LanguageDetectorBuilder.from_all_languages().build()


def language_name(name: str) -> str:
    """Return what reports call lingua's language `name`, such as `ENGLISH`."""
    return _TOGETHER.get(name, name.title())


def num_letters(text: str) -> int:
    """Return how many letters a text has, which decides how sure its language is."""
    return sum(map(str.isalpha, text))


def languages_of(texts: Sequence[str]) -> Iterator[str]:
    """Yield the language of each text, `unsure` where the detector is, or `no letters`.

    All cores work. A caption of 60 characters takes 4 ms of one.
    """
    for first in range(0, len(texts), _AT_ONCE):
        some = list(texts[first : first + _AT_ONCE])
        for text, values in zip(some, _detector().compute_language_confidence_values_in_parallel(some), strict=True):
            confidence: dict[str, float] = defaultdict(float)
            for value in values:
                confidence[language_name(value.language.name)] += value.value
            (best, likeliest), (_, next_best) = sorted(confidence.items(), key=lambda item: -item[1])[:2]
            if not num_letters(text):
                yield NO_LETTERS
            else:
                yield best if likeliest >= LEAST_RATIO * next_best and likeliest > 0 else UNSURE


def language_figures(captions: Mapping[str, int], is_sample: bool) -> dict[str, Any]:
    """Return the languages of captions, those of at least 25 letters and shorter ones apart, the commonest first.

    Args:
        captions: each with how often it occurs; a repeated one is looked at once.
        is_sample: whether these are not all captions of the data: then shares have 95 % intervals.
    """
    found: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    texts = list(captions)
    with tqdm(total=len(texts), desc="languages", unit=" captions", disable=None) as bar:
        for text, language in zip(texts, languages_of(texts), strict=True):
            found[num_letters(text) >= LONG_LETTERS][language] += captions[text]
            bar.update()
    figures: dict[str, Any] = {"checked": sum(captions.values()), "distinct": len(texts), "is_sample": is_sample}
    for key, is_long in (("long", True), ("short", False)):
        total = found[is_long].total()
        rows = [share_row("language", name, n, total, is_sample) for name, n in found[is_long].most_common()]
        figures[key] = {"captions": total, "languages": rows}
    return figures
