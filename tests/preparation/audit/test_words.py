"""Words that are counted in captions, and what is computed of the counts."""

from collections import Counter

import pytest

from flipscale.preparation.audit.words import WordCounts, count_words, country_figures, gender_figures


def counted(*captions: str) -> WordCounts:
    return sum(map(count_words, captions), Counter())


@pytest.mark.parametrize(
    ("caption", "codes"),
    [
        ("Market in Papua New Guinea", {"PG"}),
        ("a guinea pig", set()),
        ("fried turkey, TURKEY", set()),
        ("paris, france and FRANCE", {"FR"}),
        ("flag: Bosnia & Herzegovina", {"BA"}),
        ("une plage, Côte d'Ivoire", {"CI"}),
        ("Côte d\u2019Ivoire", set()),
        ("South Korea and North Korea", {"KR", "KP"}),
    ],
)
def test_countries(caption: str, codes: set[str]) -> None:
    assert {key[1] for key in counted(caption) if key[0] == "country"} == codes


def test_figures_of_counts() -> None:
    captions = (
        ["she is a nurse"] * 6 + ["nurses and a man"] * 2 + ["a man"] * 4 + ["her"] * 3 + ["boys, girls", "a tree"]
    )
    figures = gender_figures(counted(*captions, "the nurse is not heroic"))
    assert [figures[key] for key in ("women", "men", "both", "neither")] == [9, 6, 1, 2]
    rows = country_figures(counted("France", "France", "in Malta"))
    assert [tuple(row.values()) for row in rows] == [("FR", "France", 2), ("MT", "Malta", 1)]
    (nurse,) = figures["occupations"]
    assert (nurse["captions"], nurse["with_women"], nurse["with_men"]) == (9, 6, 2)
