"""Rows of text as a table whose columns are aligned, for a terminal or as Markdown. The first row is the head."""

import re
from collections.abc import Collection, Sequence

Rows = Sequence[Sequence[str]]

# What a terminal obeys, ends a line at, or turns around, but for the ends of lines and tabs that a text has on purpose;
# and what cannot be written at all.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return a text in which no character moves a terminal's cursor, sets its title or hides what follows: each is
    written out, such as `\\x1b`. Names of files, captions and class names are other people's."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def rounded(value: float) -> str:
    """Return a number with two decimals, or none from a hundred on; small ones with two digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"


def plain_table(rows: Rows, numbers: Collection[int]) -> str:
    """Return rows of equal length as lines of text; the columns `numbers` end at one place, the others begin at one."""
    return "\n".join("  ".join(row).rstrip() for row in _aligned(rows, numbers, 0))


def markdown_table(rows: Rows, num_names: int) -> str:
    """Return rows of equal length as Markdown that is also aligned as plain text; columns from `num_names` on are
    numbers."""
    numbers = range(num_names, len(rows[0]))
    head, *lines = _aligned([[_in_cell(cell) for cell in row] for row in rows], numbers, 3)
    rule = ["-" * (len(cell) - 1) + ":" if column in numbers else "-" * len(cell) for column, cell in enumerate(head)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def in_markdown(text: str) -> str:
    """Return a text that somebody chose so that Markdown shows it as it is, in a line or a cell of a table: it makes no
    table, tag or link of its own."""
    return re.sub(r"[\[\]]", r"\\\g<0>", _in_cell(text))


def as_code(text: str) -> str:
    """Return such a text between backticks."""
    return f"`{visible(' '.join(text.split())).replace('`', chr(39))}`"


def _in_cell(text: str) -> str:
    return visible(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")


def _aligned(rows: Rows, numbers: Collection[int], least: int) -> list[list[str]]:
    """Return the cells padded to the widths of their columns, at least `least`."""
    widths = [max(least, *map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
