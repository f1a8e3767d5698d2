"""Options and recipe fields: types with ranges of numbers, and checks of their values.

`Annotated[int, Range(at_least=1)]` is an int for Python and mypy. `check_ranges` checks the fields of a recipe.
"""

import dataclasses
import math
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from flipscale.io.errors import UserError


@dataclass(frozen=True)
class Range:
    """Allowed values of a number. NaN and the infinities are never allowed."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        ends = {field.name.replace("_", " "): getattr(self, field.name) for field in dataclasses.fields(self)}
        words = [f"{name} {end:,}" for name, end in ends.items() if end is not None]
        return " and ".join(words) or "finite"

    __repr__ = __str__


# Upper ends are far above all known uses, and below what overflows or exhausts memory.
Count = Annotated[int, Range(at_least=1, at_most=1_000_000_000)]
CountOrZero = Annotated[int, Range(at_least=0, at_most=1_000_000_000)]
Copies = Annotated[int, Range(at_least=1, at_most=1024)]  # of each sample, in memory together
Pairs = Annotated[int, Range(at_least=1, at_most=16_777_216)]  # pairs of a batch
Samples = Annotated[int, Range(at_least=1, at_most=10**15)]
SamplesOrZero = Annotated[int, Range(at_least=0, at_most=10**15)]
Workers = Annotated[int, Range(at_least=0, at_most=1024)]
Threads = Annotated[int, Range(at_least=1, at_most=1024)]
Bytes = Annotated[int, Range(at_least=1, at_most=10**18)]
Seed = Annotated[int, Range(at_least=0, below=2**63)]
Pixels = Annotated[int, Range(at_least=1, at_most=16_384)]
Share = Annotated[float, Range(at_least=0, at_most=1)]
ShareAboveZero = Annotated[float, Range(above=0, at_most=1)]
ShareBelowOne = Annotated[float, Range(at_least=0, below=1)]
OpenShare = Annotated[float, Range(above=0, below=1)]
Positive = Annotated[float, Range(above=0)]
Finite = Annotated[float, Range()]
Repeats = Annotated[float, Range(at_least=1)]
NonNegative = Annotated[float, Range(at_least=0)]
Overhead = Annotated[float, Range(at_least=1, at_most=10)]  # ratio of a whole to its part
Seconds = Annotated[float, Range(above=0, at_most=100_000_000)]  # longer waits overflow
Minutes = Annotated[float, Range(at_least=0, at_most=1_000_000)]
MinutesAboveZero = Annotated[float, Range(above=0, at_most=1_000_000)]

# Words for Python's types in messages.
_KINDS = {
    "int": "a whole number in digits, such as 1000000",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "list": "a list, such as [a, b]",
    "tuple": "a list, such as [a, b]",
}


def check_ranges(value: Any, path: str = "") -> None:
    """Raise UserError if a number in a dataclass, or in nested dataclasses, is out of the range of its type, a required
    field is null, or a text has a control character. `path` names the value, such as `data`; empty for a recipe."""
    for name, number, allowed in _numbers(value, type(value), path):
        if number not in allowed:
            try:
                text = str(number)
            except ValueError:  # Python refuses to write numbers of more than 4,300 digits
                text = "a number of thousands of digits"
            raise UserError(f"{name} is {text if len(text) <= 40 else f'{text[:40]}...'}; it must be {allowed}")


def _numbers(value: Any, hint: Any, path: str) -> Iterator[tuple[str, float, Range]]:
    if dataclasses.is_dataclass(value):
        hints = get_type_hints(type(value), include_extras=True)
        for field in dataclasses.fields(value):
            name = f"{path}.{field.name}" if path else field.name
            if getattr(value, field.name) is None and type(None) not in get_args(hints[field.name]):
                raise UserError(f"{name} is null; leave it out, or give it a value")
            yield from _numbers(getattr(value, field.name), hints[field.name], name)
    elif isinstance(value, str):
        if odd := next((letter for letter in value if letter < " " or "\ud800" <= letter <= "\udfff"), ""):
            raise UserError(f"{path} is {value[:60]!r}; it must be without {odd!r}")
    elif get_origin(hint) is Annotated:
        yield from ((path, value, extra) for extra in hint.__metadata__ if isinstance(extra, Range))
    elif get_origin(hint) in (Union, types.UnionType) and isinstance(value, int | float | dict):
        for option in get_args(hint):
            yield from _numbers(value, option, path)
    elif isinstance(value, dict) and len(get_args(hint)) == 2:
        for key, element in value.items():
            yield from _numbers(element, get_args(hint)[1], f"{path}.{key}")
    elif isinstance(value, list | tuple):
        kinds = [kind for kind in get_args(hint) if kind is not ...]
        for place, element in enumerate(value):
            yield from _numbers(element, kinds[min(place, len(kinds) - 1)] if kinds else None, f"{path}[{place}]")


def check_entries(content: Any, kinds: dict[str, Any], file: Path, remedy: str) -> None:
    """Raise UserError unless a JSON object of a file has entries of these types, numbers in the range of their type."""
    for name, kind in kinds.items():
        base, allowed = get_args(kind) or (kind, "")
        value = content.get(name) if isinstance(content, dict) else None
        is_of = isinstance(value, int | float if base is float else base) and isinstance(value, bool) == (base is bool)
        if not is_of or (allowed and value not in allowed):
            expected = f"{base.__name__} {allowed}".strip()
            raise UserError(f"{file} is damaged: {name} is {value!r:.60}; expected {expected}; {remedy}")


def parser_message(error: Exception) -> str:
    """Return an error of jsonargparse in one line, beginning with the field."""
    message = re.sub(r"Problem with given class_path '[^']*': ", "", " ".join(str(error).split()))
    message = re.sub(r"Does not .* Errors: - (Expected an? [^-]*) - .* Given value: ", r"\1. Got value: ", message)
    message = re.sub(r'Parser key "([^"]+)": ', r"\1: ", message)
    for kind, words in _KINDS.items():
        message = message.replace(f"Expected a <class '{kind}'>", f"Expected {words}")
    return message


def changed_fields(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yield the differences of two recipes as `path: old, now new`. Sections and their lists are compared by field."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old.keys() | new.keys():
            yield from changed_fields(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    elif isinstance(old, list) and isinstance(new, list) and any(isinstance(part, dict) for part in [*old, *new]):
        for number, (before, now) in enumerate(zip_longest(old, new)):
            yield from changed_fields(before, now, f"{path}[{number}]")
    elif old != new:
        yield f"{path}: {old}, now {new}"
