"""Tables of text for a terminal or Markdown, and escapes for other people's text. The first row is the head."""

import re
from collections.abc import Collection, Sequence

Rows = Sequence[Sequence[str]]

# Control characters that a terminal obeys, except line ends and tabs; then line separators and bidirectional marks;
# then surrogates, which cannot be encoded.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str) -> str:
    """Return a text whose control characters are written out, such as `\\x1b`.

    Names of files, captions and class names come from other people. Unescaped, they could move a terminal's cursor.
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def rounded(value: float) -> str:
    """Return a number with two decimals; from 100 on without decimals, below 0.1 with two significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"


def hours_text(hours: float) -> str:
    """Return a number of hours with its unit, or `under a minute`."""
    return "under a minute" if hours < 1 / 60 else f"{rounded(hours)} h"


def duration(seconds: float) -> str:
    """Return a time span in its two largest units: `3 d 4 h`, `12 min 5 s`, `8 s`; `0 s` for a negative one."""
    left = max(round(seconds), 0)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def plain_table(rows: Rows, numbers: Collection[int]) -> str:
    """Return rows of equal length as aligned lines of text; the columns `numbers` are aligned to the right."""
    return "\n".join("  ".join(row).rstrip() for row in _aligned(rows, numbers, 0))


def markdown_table(rows: Rows, num_names: int) -> str:
    """Return rows of equal length as an aligned Markdown table; columns from `num_names` on are numbers."""
    numbers = range(num_names, len(rows[0]))
    head, *lines = _aligned([[_cell(cell) for cell in row] for row in rows], numbers, 3)
    rule = ["-" * (len(cell) - 1) + ":" if column in numbers else "-" * len(cell) for column, cell in enumerate(head)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def escape_markdown(text: str) -> str:
    """Return a text that Markdown shows as it is, in a line or a table cell, without tables, tags or links."""
    return re.sub(r"[\[\]]", r"\\\g<0>", _cell(text))


def markdown_code(text: str) -> str:
    return f"`{escape_controls(' '.join(text.split())).replace('`', chr(39))}`"


def _cell(text: str) -> str:
    return escape_controls(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")


def _aligned(rows: Rows, numbers: Collection[int], least: int) -> list[list[str]]:
    columns = []
    for index, cells in enumerate(zip(*rows, strict=True)):
        width = max(least, *map(len, cells))
        columns.append([cell.rjust(width) if index in numbers else cell.ljust(width) for cell in cells])
    return [list(row) for row in zip(*columns, strict=True)]


def headed_rows(head: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return a heading, and below it a line for each row of a name and a value."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([head, *(f"  {name:<{width}}  {value}" for name, value in rows)])
