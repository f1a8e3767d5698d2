"""The range of every number that somebody sets, written beside its type: a field of a recipe, an option of a verb.

`Annotated[int, Range(at_least=1)]` is an int for Python and mypy. `--help` shows the range, `check_ranges` finds the
field of a recipe that is out of its own, and `number` of `command_line` makes a type for argparse of it.
"""

import dataclasses
import math
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from flipscale.io.errors import UserError


@dataclass(frozen=True)
class Range:
    """What a number may be. NaN and the infinities are in no range."""

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


# Upper ends are far beyond what anybody has trained with, and below what overflows or takes all memory at once.
Count = Annotated[int, Range(at_least=1, at_most=1_000_000_000)]
CountOrNone = Annotated[int, Range(at_least=0, at_most=1_000_000_000)]
Pairs = Annotated[int, Range(at_least=1, at_most=16_777_216)]  # of a batch
Samples = Annotated[int, Range(at_least=1, at_most=10**15)]
SamplesOrNone = Annotated[int, Range(at_least=0, at_most=10**15)]
Workers = Annotated[int, Range(at_least=0, at_most=1024)]
Bytes = Annotated[int, Range(at_least=1, at_most=10**18)]
Seed = Annotated[int, Range(at_least=0, below=2**63)]
Pixels = Annotated[int, Range(at_least=1, at_most=16_384)]
Share = Annotated[float, Range(at_least=0, at_most=1)]
ShareAboveNone = Annotated[float, Range(above=0, at_most=1)]
ShareBelowAll = Annotated[float, Range(at_least=0, below=1)]
ShareBetween = Annotated[float, Range(above=0, below=1)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(at_least=0)]
Overhead = Annotated[float, Range(at_least=1, at_most=10)]  # of a whole over its part
Seconds = Annotated[float, Range(above=0, at_most=100_000_000)]  # waiting longer overflows
Minutes = Annotated[float, Range(at_least=0, at_most=1_000_000)]
MinutesAboveNone = Annotated[float, Range(above=0, at_most=1_000_000)]
Threads = Annotated[int, Range(at_least=1, at_most=1024)]

_KINDS: dict[Any, str] = {
    **{int: "a whole number", float: "a number", str: "a text", bool: "true or false"},
    **{type(None): "null", dict: "a mapping", list: "a list"},
}


def check_ranges(value: Any, path: str = "") -> None:
    """Raise unless each number of a dataclass, and of the dataclasses in it, is in the range of its type.

    Args:
        value: the dataclass, or a list of some.
        path: what it is called: `data`, or nothing for the whole of a recipe.

    Raises:
        ValueError: one is not, or a text has a control character, or a field is null that cannot be; the message names
            the field, its value and what is allowed.
    """
    for name, number, allowed in _numbers(value, type(value), path):
        if number not in allowed:
            raise UserError(f"{name} is {_short(number)}; it must be {allowed}")


def in_our_words(error: Exception, hints: Mapping[str, Any]) -> str:
    """Return what an error of jsonargparse says; of a value of the wrong type, the field, the value and the type.

    Args:
        hints: the types of the fields that it parsed.
    """
    message = " ".join(str(error).split())
    names = [name for key in re.findall(r'Parser key "([^"]+)"', message) for name in key.split(".")]
    value = re.search(r".*(?:Got|Given) value: (.*)", message)
    hint: Any = None
    for name in names:
        hint = hints.get(name)
        part = get_args(hint)[0] if get_origin(hint) is list else hint
        hints = get_type_hints(part, include_extras=True) if dataclasses.is_dataclass(part) else {}
    if value is None or hint is None:
        message = re.sub(r"Problem with given class_path '[^']*': ", "", message)
        return re.sub(r'Parser key "([^"]+)": ', r"\1: ", message)
    return f"{'.'.join(names)} is {value[1]}; it must be {_described(hint)}"


def _described(hint: Any) -> str:
    """Return in words what a value of a type may be: `a whole number, at least 1, or null`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{_described(arguments[0])}, {arguments[1]}"
    if origin in (Union, types.UnionType):
        return ", or ".join(_described(one) for one in arguments)
    if origin is Literal:
        return " or ".join(repr(one) for one in arguments)
    if origin in (list, tuple):
        return f"a list{f' of {len(arguments)}' if origin is tuple else ''}, each {_described(arguments[0])}"
    return _KINDS.get(origin or hint, "a mapping of fields to values")


def _numbers(value: Any, hint: Any, path: str) -> Iterator[tuple[str, float, Range]]:
    """Yield the name of each number that has a range, the number and the range."""
    if dataclasses.is_dataclass(value):
        hints = get_type_hints(type(value), include_extras=True)
        for field in dataclasses.fields(value):
            name = f"{path}.{field.name}" if path else field.name
            if getattr(value, field.name) is None and type(None) not in get_args(hints[field.name]):
                raise UserError(f"{name} is null; leave it out, or give it a value")
            yield from _numbers(getattr(value, field.name), hints[field.name], name)
    elif isinstance(value, str):
        if odd := next((letter for letter in value if letter < " " or "\ud800" <= letter <= "\udfff"), ""):
            raise UserError(f"{path} is {value[:60]!r}; it must be without {odd!r}, which no name has")
    elif get_origin(hint) is Annotated:
        yield from ((path, value, one) for one in hint.__metadata__ if isinstance(one, Range))
    elif get_origin(hint) in (Union, types.UnionType) and isinstance(value, int | float):
        for option in get_args(hint):
            yield from _numbers(value, option, path)
    elif isinstance(value, list | tuple):
        kinds = [kind for kind in get_args(hint) if kind is not ...]
        for place, one in enumerate(value):
            yield from _numbers(one, kinds[min(place, len(kinds) - 1)] if kinds else None, f"{path}[{place}]")


def _short(value: object) -> str:
    try:
        text = str(value)
    except ValueError:  # Python does not write numbers of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 40 else f"{text[:40]}..."
