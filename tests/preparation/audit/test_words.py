"""Words that are counted in captions, and what is computed of the counts."""

import math

import numpy as np
import pytest

from flipscale.preparation.audit.scan import LONGEST, CaptionCounts
from flipscale.preparation.audit.words import WordCounts, country_figures, gender_figures, log_odds


def counted(*captions: str) -> WordCounts:
    counts = WordCounts()
    for caption in captions:
        counts.add(caption)
    return counts


@pytest.mark.parametrize(
    ("caption", "codes"),
    [
        ("Market in Papua New Guinea", {"PG"}),
        ("the coast of Guinea", {"GN"}),
        ("a guinea pig", set()),
        ("fried turkey, TURKEY", set()),
        ("Istanbul, Turkey", {"TR"}),
        ("paris, france and FRANCE", {"FR"}),
        ("join us in the USA", {"US"}),
        ("flag: Bosnia & Herzegovina", {"BA"}),
        ("une plage, Côte d'Ivoire", {"CI"}),
        ("Côte d\u2019Ivoire", set()),
        ("South Korea and North Korea", {"KR", "KP"}),
    ],
)
def test_countries(caption: str, codes: set[str]) -> None:
    assert set(counted(caption).countries) == codes


def test_mentions_per_million_inhabitants() -> None:
    (france, malta) = country_figures(counted("France", "France", "in Malta"))
    assert (france["name"], france["captions"]) == ("France", 2)
    assert 0.02 < france["per_million"] < 0.04  # 68 million
    assert 1 < malta["per_million"] < 3  # half a million


def test_gender_and_occupations() -> None:
    captions = (
        ["she is a nurse"] * 6 + ["nurses and a man"] * 2 + ["a man"] * 4 + ["her"] * 3 + ["boys, girls", "a tree"]
    )
    figures = gender_figures(counted(*captions, "the nurse is not heroic"))
    assert [figures[key] for key in ("women", "men", "both", "neither")] == [9, 6, 1, 2]
    (nurse,) = figures["occupations"]
    assert (nurse["captions"], nurse["with_women"], nurse["with_men"]) == (9, 6, 2)
    assert nurse["log_odds"] == log_odds(6, 2, 3, 4)["log_odds"] > 0


def test_log_odds_by_hand() -> None:
    found = log_odds(6, 2, 3, 4)
    assert found["log_odds"] == pytest.approx(math.log(6.5 * 4.5 / (2.5 * 3.5)))
    half = 1.959964 * math.sqrt(1 / 6.5 + 1 / 2.5 + 1 / 3.5 + 1 / 4.5)
    assert (found["low"], found["high"]) == pytest.approx((found["log_odds"] - half, found["log_odds"] + half))
    assert math.isfinite(log_odds(0, 5, 0, 0)["low"])


def test_lengths() -> None:
    counts, values = CaptionCounts(), [3, 9, 9, 12, 40, 2070]
    for value in values:
        part = CaptionCounts()
        part.add("a" * value, None, is_sampled=False)
        counts.merge(part)
    assert counts.length_figures()["characters"] == {
        **{"min": 3, "median": 9, "p95": LONGEST["characters"], "max": LONGEST["characters"], "mean": np.mean(values)}
    }
    assert set(counts.length_figures()) == {"characters", "words"}
