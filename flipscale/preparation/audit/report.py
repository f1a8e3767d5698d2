"""The page of an audit, and its summary at the console."""

import textwrap
from collections.abc import Sequence
from typing import Any

from flipscale.preparation.audit.captions import LONGEST
from flipscale.preparation.audit.languages import NO_LETTERS, UNSURE

_MOST_ROWS = 20


def audit_page(figures: dict[str, Any], pictures: list[str]) -> str:
    """Return the page `audit.md`, with those of its pictures that were drawn."""
    blocks = [
        f"# Audit of `{figures['shards']}`",
        "Made by `flipscale prepare audit`; every number is in `audit.json`.",
        _table([("", ""), *_summary(figures)], "lr"),
        f"![Lengths, languages, occupations and countries of the captions]({pictures[0]})",
        *_captions(figures["captions"]),
        *_languages(figures["languages"]),
        *_gender(figures["gender"]),
        *_countries(figures["countries"]),
        *_images(figures["images"], "near_duplicates.png" in pictures),
        *_tests(figures["tests"], "overlap.png" in pictures),
        *_unusable(figures["unusable"]),
        _NOT_LOOKED_AT,
    ]
    return "\n\n".join(blocks) + "\n"


def audit_table(figures: dict[str, Any]) -> str:
    """Return the summary as text to print."""
    return "\n".join(f"{name:<52}{value:>16}" for name, value in _summary(figures))


_NOT_LOOKED_AT = """## What this does not look at

- No classifier looks at the images: neither at faces nor at what gender, age, skin or origin people in them seem to
  have. What is said of people is what captions say.
- Nothing is said of harmful, illegal or private content of images or captions. That has to be looked for by other means
  before data is used or shared.
- The words of gender and the occupations are English ones. Captions in other languages are counted as having none.
  Names of persons are not looked at. Words are counted without their meaning: "him" may be a dog, "cook" a verb.
- Countries are counted by their English names, not by their people, cities, languages or flags.
- Copies are found that were encoded again, resized or stretched, not those that were cropped, mirrored, turned, or had
  something written on them."""


def _summary(figures: dict[str, Any]) -> list[tuple[str, str]]:
    captions, images = figures["captions"], figures["images"]
    long = figures["languages"]["long"]
    rows = [
        ("samples", f"{figures['samples']:,}"),
        ("of them unusable, for what they lack or are", f"{sum(o['count'] for o in figures['unusable'].values()):,}"),
        ("captions", f"{captions['captions']:,}"),
        ("different captions", f"{captions['distinct']:,}"),
        ("images with the bytes of an earlier one", f"{images['exact_copies']:,}"),
        ("other images that are nearly like an earlier one", f"{images['near_copies']:,}"),
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
        "Lengths above these count as these: " + ", ".join(f"{most:,} {kind}" for kind, most in LONGEST.items()) + ".",
        f"The {len(commonest) - 1} commonest captions:",
        _table(commonest, "lrr"),
    ]


def _languages(languages: dict[str, Any]) -> list[str]:
    are_all = "drawn at random; the intervals are of 95 %" if languages["is_sample"] else "which are all"
    said = (
        f"By lingua, which tells 75 languages apart, of {languages['checked']:,} captions, {are_all}; "
        f"{languages['distinct']:,} of them are different."
    )
    unsure = (
        f"`unsure` are those whose likeliest language is not {languages['least_ratio']:g} times as likely as the "
        f"next. From {languages['long_letters']} letters on, 99 % of those that are not `unsure` were right where the "
        "language is known; shorter ones are apart, because more of them are wrong. Norwegian's two languages are one "
        "here, and so are Indonesian and Malay, and Bosnian, Croatian and Serbian."
    )
    blocks = ["## Languages", said, unsure]
    for key, name in (("long", f"{languages['long_letters']} letters and more"), ("short", "fewer letters")):
        part = languages[key]
        if part["captions"]:
            rows = [(f"{name}: {part['captions']:,} captions", "captions", "share", "95 % interval")]
            rows += [
                (row["language"], f"{row['count']:,}", f"{row['share']:.2%}", _interval(row))
                for row in part["languages"][:_MOST_ROWS]
            ]
            blocks.append(_table(rows, "lrrr"))
    return blocks


def _interval(row: dict[str, Any]) -> str:
    return f"{row['low']:.2%} to {row['high']:.2%}" if "low" in row else ""


def _gender(gender: dict[str, Any]) -> list[str]:
    rows = [("occupation", "captions", "with words of women", "of men", "log odds ratio", "95 % interval")]
    for row in gender["occupations"][:_MOST_ROWS]:
        odds = (f"{row['log_odds']:+.2f}", f"{row['low']:+.2f} to {row['high']:+.2f}") if "low" in row else ("", "")
        counts = (f"{row[key]:,}" for key in ("captions", "with_women", "with_men"))
        rows.append((row["occupation"], *counts, *odds))
    said = (
        f"{gender['women']:,} captions have words of women only (woman, she, mother ...), {gender['men']:,} of men "
        f"only, {gender['both']:,} of both, {gender['neither']:,} neither."
    )
    if len(rows) == 1:
        return ["## Words of gender", said, "No caption names one of the occupations that are looked for."]
    about = (
        "The log of the odds ratio is above 0 where the occupation goes with words of women more than captions do "
        "otherwise, below 0 where with those of men; it is left out where fewer than 5 captions have such words."
    )
    return ["## Words of gender", said, about, _table(rows, "lrrrrr")]


def _countries(countries: dict[str, Any]) -> list[str]:
    if not countries["rows"]:
        return ["## Countries", "No caption names a country."]
    rows = [("country", "captions", "per million inhabitants")]
    for row in countries["rows"][:_MOST_ROWS]:
        per_million = f"{row['per_million']:,.3g}" if "per_million" in row else "not known"
        rows.append((row["name"], f"{row['captions']:,}", per_million))
    said = (
        f"{len(countries['rows'])} countries are named by ISO 3166-1's names or a common form. Inhabitants are CLDR's. "
        f"Some names are other words too, and count only with their capitals: {', '.join(countries['ambiguous'])}."
    )
    return ["## Countries", said, _table(rows, "lrr")]


def _images(images: dict[str, Any], drawn: bool) -> list[str]:
    said = (
        f"Of {images['decoded']:,} images, {images['exact_copies']:,} have the same bytes as an earlier one, and "
        f"{images['near_copies']:,} more are nearly like an earlier one ({images['near_pairs']:,} pairs): 64-bit DCT "
        f"hashes that differ in at most {images['most_bits']} bits, thumbnails whose pixels agree by at least "
        f"{images['least_likeness']} of 1 and whose sixteenths each differ by at most {images['most_difference']:g} of "
        f"255 in the mean. {images['nearly_blank']:,} images have too little in them to be compared so; only their "
        "bytes are."
    )
    return ["## Copies", said, *(["![Pairs of near duplicates](near_duplicates.png)"] if drawn else [])]


def _tests(tests: list[dict[str, Any]], drawn: bool) -> list[str]:
    if not tests:
        return ["## Test sets", "None was compared; `--tests DIR` names them."]
    rows = [("test set", "images", "the same bytes in training", "nearly the same", "share")]
    for test in tests:
        share = f"{(test['exact'] + test['near']) / max(test['images'], 1):.2%}"
        rows.append((test["name"], *(f"{test[key]:,}" for key in ("images", "exact", "near")), share))
    said = (
        "`overlap/NAME.json` lists these images; `flipscale evaluate MODEL ... --without` this folder gives each "
        "figure again without them."
    )
    picture = ["![Test images with their matches in the training data](overlap.png)"] if drawn else []
    return ["## Test sets", _table(rows, "lrrrr"), said, *picture]


def _unusable(unusable: dict[str, Any]) -> list[str]:
    if not unusable:
        return []
    rows = [("cause", "samples", "such as")]
    rows += [(cause, f"{one['count']:,}", _cell(one["examples"][0])) for cause, one in unusable.items()]
    return ["## What cannot be used", _table(rows, "lrl")]


def _cell(text: str) -> str:
    """Return text as a cell of a table, at most 100 characters."""
    plain = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return "".join(textwrap.wrap(plain, 100, max_lines=1, placeholder=" …"))


def _table(rows: Sequence[tuple[str, ...]], align: str) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    rule = "|".join({"l": "---", "r": "---:"}[side] for side in align)
    return "\n".join([head, f"|{rule}|", *body])
