"""The words of captions as COCO's evaluation counts them: the Penn Treebank's, in lower case, without punctuation.

COCO's own tools (pycocoevalcap) have Stanford's PTBTokenizer 3.4.1 find the words, which needs Java. This is the same
for captions, in Python.
"""

import re

# What COCO's tools leave out of PTBTokenizer's tokens. Brackets stay: they come in lower case, and are listed there in
# upper case.
_LEFT_OUT = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_WRITTEN = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "£": "#", "€": "$"},
    **{
        "½": "1/2",
        "¼": "1/4",
        "¾": "3/4",
        "&amp;": "&",
        "&lt;": "<",
        "&gt;": ">",
        "…": "...",
        "—": "--",
        "\u2013": "--",
    },
    **dict.fromkeys('"“”', "''"),
    **dict.fromkeys("\u2018\u2019", "'"),
}
# With a full stop, which belongs to the word.
_ABBREVIATIONS = (
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thur|thurs|fri|sat|sun|mr|mrs|ms|miss|dr|drs|"
    "prof|st|ste|jr|sr|bros|inc|ltd|co|corp|cos|dept|est|etc|vs|v|al|ave|blvd|rd|mt|ft|hwy|gen|col|capt|cpl|lt|sgt|maj|"
    "gov|sen|rep|reps|rev|hon|pres|supt|ph\\.d|esq|assn|univ|al|ed|eds|fig|figs"
)
_FAR = re.compile(r"[\U00010000-\U0010FFFF]")  # such as emoji, which PTBTokenizer leaves out
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
    """Return the words of a caption, as pycocoevalcap has them."""
    return [word for word in ptb_tokens(caption) if word not in _LEFT_OUT]


def ptb_tokens(caption: str) -> list[str]:
    """Return the tokens of a caption, punctuation among them, in lower case."""
    found = (match[0].lower() for match in _TOKEN.finditer(_FAR.sub(" ", caption)))
    return [_WRITTEN.get(token, token) for token in found]
