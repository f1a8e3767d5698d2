"""The fields of a dataclass and of those in it: what `--help` says of them, whether a file has no others, what differs.

The first two are read from types and docstrings: no field is made, and nothing is imported that its own check needs.
"""

import argparse
import dataclasses
import difflib
import inspect
import re
import types
from collections.abc import Iterator
from itertools import zip_longest
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from flipscale.io.errors import UserError
from flipscale.io.ranges import Range

_METAVARS = {int: "N", float: "X", str: "TEXT", bool: "{true,false}", list: "LIST", tuple: "LIST", dict: "MAPPING"}
_WORDS = {None: "null", True: "true", False: "false", "": "empty"}


def add_fields(parser: argparse.ArgumentParser, kind: type) -> None:
    """Add the fields of a dataclass to a parser whose help is printed: those of each section in a group of their own.

    Args:
        parser: parses nothing, since a field of a listed dataclass is no flag: it is written into the list.
        kind: has sections, each a dataclass, and fields, each with its meaning in the docstring's `Args:`.
    """
    hints, texts = get_type_hints(kind, include_extras=True), _meanings(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            _add_section(parser, hint, field.name, texts[field.name])
        elif listed := _listed(hint):
            group = _add_section(parser, listed, f"{field.name}[]", texts[field.name])
            group.add_argument(f"--{field.name}", metavar="LIST", help=_as_help(texts[field.name]))
        else:
            _add_field(parser, field, hint, field.name, texts[field.name])


def _add_section(parser: argparse.ArgumentParser, kind: type, path: str, text: str) -> argparse._ArgumentGroup:
    group = parser.add_argument_group(path, _as_help(text))
    hints, texts = get_type_hints(kind, include_extras=True), _meanings(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            _add_section(parser, hints[field.name], f"{path}.{field.name}", texts[field.name])
            continue
        _add_field(group, field, hints[field.name], f"{path}.{field.name}", texts[field.name])
        if listed := _listed(hints[field.name]):
            _add_section(parser, listed, f"{path}.{field.name}[]", texts[field.name])
    return group


def _add_field(group: argparse._ActionsContainer, field: dataclasses.Field, hint: Any, path: str, text: str) -> None:
    base, allowed = _type_of(hint)
    metavar = f"{{{','.join(get_args(base))}}}" if get_origin(base) is Literal else _METAVARS[get_origin(base) or base]
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    extent = f" {str(allowed).capitalize()}." if allowed else ""
    said = "" if default is dataclasses.MISSING else f" Default: {_written(default)}."
    # A path with brackets is an argument without a flag for argparse, which prints its name as it is.
    name = path if "[]" in path else f"--{path}"
    group.add_argument(name, metavar=path if "[]" in path else metavar, help=_as_help(text + extent + said))


def _listed(hint: Any) -> Any:
    """Return the dataclass that a list is of, None for any other type."""
    inner = get_args(hint)[0] if get_origin(hint) is list else None
    return inner if dataclasses.is_dataclass(inner) else None


def _type_of(hint: Any) -> tuple[Any, Range | None]:
    """Return the type of a field without null, and the range of its numbers."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(one for one in get_args(hint) if one is not type(None))
    if get_origin(hint) is tuple:
        return tuple, _type_of(get_args(hint)[0])[1]
    if get_origin(hint) is Annotated:
        base, *extras = get_args(hint)
        return base, next((one for one in extras if isinstance(one, Range)), None)
    return hint, None


def _written(value: Any) -> str:
    """Return a default as a recipe has it."""
    if value is None or isinstance(value, bool | str):
        return _WORDS.get(value, str(value))
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _meanings(kind: type) -> dict[str, str]:
    """Return what the `Args:` of a dataclass's docstring says of each field."""
    section = re.search(r"^Args:\n((?:(?: .*)?\n?)*)", inspect.getdoc(kind) or "", re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _as_help(text: str) -> str:
    return text.replace("%", "%%")


def check_fields(content: Any, hint: Any, path: str, file: str) -> None:
    """Raise unless a recipe's file has mappings where sections are, and in them the fields that there are.

    Args:
        content: of the file, or of a part of it.
        hint: its type.
        path: of the part.
        file: begins the messages.

    Raises:
        ValueError: it has others.
    """
    if get_origin(hint) is list and isinstance(content, list):
        for number, one in enumerate(content):
            check_fields(one, get_args(hint)[0], f"{path}[{number}]", file)
    if not dataclasses.is_dataclass(hint) or not isinstance(hint, type):
        return
    if not isinstance(content, dict):
        what = f"{content!r:.60}" if content else "empty"
        raise UserError(f"{file}: {path or 'the recipe'} is {what}; it must have fields, such as name: value")
    hints = get_type_hints(hint)
    for name, value in content.items():
        inner = f"{path}.{name:.60}" if path else f"{name:.60}"
        if name not in hints and name != "<<":
            near = difflib.get_close_matches(name, hints, 1)
            has = f"did you mean {near[0]}?" if near else f"there are {', '.join(hints)}"
            raise UserError(f"{file}: {inner} is no field of a recipe; {has}")
        check_fields(value, hints.get(name), inner, file)


def fields_that_differ(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yield what differs between two values of a recipe, as `path: old, now new`; of sections it is their fields, of
    lists of sections their elements."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old.keys() | new.keys():
            yield from fields_that_differ(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    elif isinstance(old, list) and isinstance(new, list) and any(isinstance(one, dict) for one in [*old, *new]):
        for number, (was, now) in enumerate(zip_longest(old, new)):
            yield from fields_that_differ(was, now, f"{path}[{number}]")
    elif old != new:
        yield f"{path}: {old}, now {new}"
