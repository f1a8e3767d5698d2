"""The page of an audit, and its summary at the console."""

import textwrap
from collections.abc import Sequence
from typing import Any

from flipscale.preparation.audit.scan import LONGEST
from flipscale.preparation.audit.words import NO_LETTERS, UNSURE

_MAX_ROWS = 20


def audit_page(figures: dict[str, Any], has_pairs: bool, has_overlap: bool) -> str:
    """Return the page `audit.md`.

    Args:
        figures: figures of the audit.
        has_pairs: whether there is a picture of near duplicates.
        has_overlap: whether there is a picture of the overlap with test sets.
    """
    blocks = [
        f"# Audit of `{figures['shards']}`",
        "Made by `flipscale prepare audit`; every number is in `audit.json`.",
        _table([("", ""), *_summary(figures)], "lr"),
        *_captions(figures["captions"]),
        *_languages(figures["languages"]),
        *_gender(figures["gender"]),
        *_countries(figures["countries"]),
        *_images(figures["images"], has_pairs),
        *_tests(figures["tests"], has_overlap),
        *_unusable(figures["unusable"]),
        _NOT_LOOKED_AT,
    ]
    return "\n\n".join(blocks) + "\n"


def audit_table(figures: dict[str, Any]) -> str:
    """Return the summary as text to print."""
    return "\n".join(f"{name:<52}{value:>16}" for name, value in _summary(figures))


_NOT_LOOKED_AT = """## What this does not look at

- No classifier looks at the images, neither at faces nor at the gender, age, skin or origin of people. What the audit
  reports about people comes from captions.
- The audit does not look for harmful, illegal or private content. Look for it by other means before you use or share
  the data.
- The words of gender and the occupations are English. Captions in other languages count as having none. Names of
  persons are not looked at. Words count without their meaning: "him" may be a dog, "cook" a verb.
- Countries are counted by their English names, not by their people, cities, languages or flags.
- Copies are found if they were encoded again, resized or stretched, not if they were cropped, mirrored or turned, or if
  something was written on them."""


def _summary(figures: dict[str, Any]) -> list[tuple[str, str]]:
    captions, images = figures["captions"], figures["images"]
    long = figures["languages"]["long"]
    rows = [
        ("samples", f"{figures['samples']:,}"),
        ("unusable samples", f"{sum(o['count'] for o in figures['unusable'].values()):,}"),
        ("captions", f"{captions['captions']:,}"),
        ("different captions", f"{captions['distinct']:,}"),
        ("images with the bytes of an earlier one", f"{images['exact_copies']:,}"),
        ("other images that are nearly an earlier one", f"{images['near_copies']:,}"),
        ("nearly blank images", f"{images['nearly_blank']:,}"),
    ]
    named = [row for row in long["languages"] if row["language"] not in (UNSURE, NO_LETTERS)]
    if named:
        first = named[0]
        rows.append((f"{first['language']}, of captions of 25 letters and more", f"{first['share']:.1%}"))
    rows += [
        (f"images of {test['name']} that are in the data, of {test['images']:,}", f"{test['exact'] + test['near']:,}")
        for test in figures["tests"]
    ]
    return rows


def _captions(captions: dict[str, Any]) -> list[str]:
    names = ("min", "median", "p95", "max", "mean")
    lengths = [("length in", *names)]
    lengths += [
        (kind, *(f"{row[name]:,.1f}".removesuffix(".0") for name in names)) for kind, row in captions["lengths"].items()
    ]
    commonest = [("caption", "times", "share")]
    commonest += [(_cell(row["caption"]), f"{row['count']:,}", f"{row['share']:.2%}") for row in captions["commonest"]]
    return [
        "## Captions",
        _table(lengths, "lrrrrr"),
        "Longer captions count as: " + ", ".join(f"{most:,} {kind}" for kind, most in LONGEST.items()) + ".",
        f"The {len(commonest) - 1} commonest captions:",
        _table(commonest, "lrr"),
    ]


def _languages(languages: dict[str, Any]) -> list[str]:
    which = "drawn at random; the intervals are of 95 %" if languages["is_sample"] else "which are all"
    text = (
        f"The detector lingua tells 75 languages apart. It looked at {languages['checked']:,} captions, {which}; "
        f"{languages['distinct']:,} of them are different."
    )
    unsure = (
        f"A caption is `unsure` if its likeliest language is less than {languages['least_ratio']:g} times as likely as "
        f"the next one. From {languages['long_letters']} letters on, 99 % of the others were right where the language "
        "is known. Shorter captions are listed apart, because more of them are wrong. Norwegian's two languages count "
        "as one, and so do Indonesian and Malay, and Bosnian, Croatian and Serbian."
    )
    blocks = ["## Languages", text, unsure]
    for key, name in (("long", f"{languages['long_letters']} letters and more"), ("short", "fewer letters")):
        part = languages[key]
        if part["captions"]:
            rows = [(f"{name}: {part['captions']:,} captions", "captions", "share", "95 % interval")]
            rows += [
                (row["language"], f"{row['count']:,}", f"{row['share']:.2%}", _interval(row))
                for row in part["languages"][:_MAX_ROWS]
            ]
            blocks.append(_table(rows, "lrrr"))
    return blocks


def _interval(row: dict[str, Any]) -> str:
    return f"{row['low']:.2%} to {row['high']:.2%}" if "low" in row else ""


def _gender(gender: dict[str, Any]) -> list[str]:
    rows = [("occupation", "captions", "with words of women", "of men", "log odds ratio", "95 % interval")]
    for row in gender["occupations"][:_MAX_ROWS]:
        odds = (f"{row['log_odds']:+.2f}", f"{row['low']:+.2f} to {row['high']:+.2f}") if "low" in row else ("", "")
        counts = (f"{row[key]:,}" for key in ("captions", "with_women", "with_men"))
        rows.append((row["occupation"], *counts, *odds))
    text = (
        f"{gender['women']:,} captions have words of women only (woman, she, mother ...), {gender['men']:,} of men "
        f"only, {gender['both']:,} of both, {gender['neither']:,} neither."
    )
    if len(rows) == 1:
        return ["## Words of gender", text, "No caption names an occupation of the list."]
    about = (
        "The log of the odds ratio is above 0 if words of women are commoner beside the occupation than elsewhere, and "
        "below 0 if words of men are. It is left out if fewer than 5 captions have such words."
    )
    return ["## Words of gender", text, about, _table(rows, "lrrrrr")]


def _countries(countries: dict[str, Any]) -> list[str]:
    if not countries["rows"]:
        return ["## Countries", "No caption names a country."]
    rows = [("country", "captions", "per million inhabitants")]
    for row in countries["rows"][:_MAX_ROWS]:
        per_million = f"{row['per_million']:,.3g}" if "per_million" in row else "not known"
        rows.append((row["name"], f"{row['captions']:,}", per_million))
    text = (
        f"Captions name {len(countries['rows'])} countries, by ISO 3166-1's names or a common form. Inhabitants are "
        f"CLDR's. Names that are also other words count only with capitals: {', '.join(countries['ambiguous'])}."
    )
    return ["## Countries", text, _table(rows, "lrr")]


def _images(images: dict[str, Any], has_pairs: bool) -> list[str]:
    text = (
        f"Of {images['decoded']:,} images, {images['exact_copies']:,} have the same bytes as an earlier one, and "
        f"{images['near_copies']:,} more are nearly an earlier one ({images['near_pairs']:,} pairs). Near duplicates "
        f"have 64-bit DCT hashes that differ in at most {images['most_bits']} bits, and thumbnails with a likeness of "
        f"at least {images['least_likeness']}, whose sixteenths differ by at most {images['most_difference']:g} of 255 "
        f"in the mean. {images['nearly_blank']:,} images are nearly blank; only their bytes are compared."
    )
    return ["## Copies", text, *(["![Pairs of near duplicates](near_duplicates.png)"] if has_pairs else [])]


def _tests(tests: list[dict[str, Any]], has_overlap: bool) -> list[str]:
    if not tests:
        return ["## Test sets", "None was compared; `--tests DIR` names test sets."]
    rows = [("test set", "images", "the same bytes in training", "nearly the same", "share")]
    for test in tests:
        share = f"{(test['exact'] + test['near']) / max(test['images'], 1):.2%}"
        rows.append((test["name"], *(f"{test[key]:,}" for key in ("images", "exact", "near")), share))
    text = (
        "`overlap/NAME.json` lists these images. `flipscale evaluate MODEL ... --without` this folder also gives each "
        "figure without these images."
    )
    picture = ["![Test images with their matches in the training data](overlap.png)"] if has_overlap else []
    return ["## Test sets", _table(rows, "lrrrr"), text, *picture]


def _unusable(unusable: dict[str, Any]) -> list[str]:
    if not unusable:
        return []
    rows = [("cause", "samples", "such as")]
    rows += [(cause, f"{one['count']:,}", _cell(one["examples"][0])) for cause, one in unusable.items()]
    return ["## What cannot be used", _table(rows, "lrl")]


def _cell(text: str) -> str:
    """Return at most 100 characters of a text as a cell of a table."""
    plain = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return "".join(textwrap.wrap(plain, 100, max_lines=1, placeholder=" …"))


def _table(rows: Sequence[tuple[str, ...]], align: str) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    rule = "|".join({"l": "---", "r": "---:"}[side] for side in align)
    return "\n".join([head, f"|{rule}|", *body])
