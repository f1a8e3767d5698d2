"""Reading of a user's YAML, with limits of depth and size, and without tags, duplicate keys or octal numbers."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from flipscale.io.errors import UserError

MAX_BYTES = 262_144
_MAX_DEPTH = 32
_MAX_VALUES = 100_000
_MAX_DIGITS = 100
# YAML 1.1 reads 010 as 8 and 1:30 as 90.
_SURPRISE = re.compile(r"[-+]?(0[0-9_]+|[1-9][0-9_]*(:[0-5]?[0-9])+)")


def read_outline(file: Path) -> Any:
    """Return the content of a YAML file with every value as text. Raise UserError if it is not, or as `check_yaml`."""
    if not file.is_file():
        what = "a folder" if file.is_dir() else "no plain file"
        raise UserError(f"{file} is {what}; name a YAML file")
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{file} has {size:,} bytes; at most {MAX_BYTES:,} of YAML are read")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    try:
        check_yaml(text, str(file), refuses_surprises=True)
        return yaml.load(text, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    except yaml.YAMLError as error:
        raise UserError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from None


def read_saved_recipe(file: Path) -> dict[str, Any]:
    """Return the fields of a recipe that flipscale saved. Raise UserError if the file is missing or damaged."""
    try:
        if not file.is_file() or file.stat().st_size > MAX_BYTES:
            raise UserError("no file of a recipe's size")
        text = file.read_text(encoding="utf-8")
        check_yaml(text, str(file))
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(
            f"{file} is not the recipe that the run began with, it is damaged; copy the one of a checkpoint there "
            f"({file.parent}/checkpoints/step-*/recipe.yaml)"
        )
    return content


def check_yaml(text: str, where: str, refuses_surprises: bool = False) -> None:
    """Raise if YAML is nested too deep, grows too large, gives a key twice, or has a tag such as `!!python/object`.

    Args:
        text: YAML, which is parsed without making objects.
        where: start of the messages.
        refuses_surprises: whether to refuse numbers that YAML reads differently from people, such as 010.

    Raises:
        YAMLError: the text is not YAML.
    """
    sizes: dict[str, int] = {}  # number of values below each anchor
    opened = [_Collection(None, False)]

    def refuse(event: yaml.Event, what: str) -> NoReturn:
        assert event.start_mark is not None
        raise UserError(f"{where} {what} (line {event.start_mark.line + 1})")

    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        size, anchor, key = 1, None, None
        if isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent) and event.tag not in (None, "!"):
            refuse(event, f"has the tag {event.tag:.60}; use plain values")
        if isinstance(event, yaml.CollectionStartEvent):
            if len(opened) > _MAX_DEPTH:
                refuse(event, f"is nested deeper than {_MAX_DEPTH} levels")
            opened.append(_Collection(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            closed = opened.pop()
            size, anchor = closed.size + 1, closed.anchor
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                refuse(event, f"uses *{event.anchor:.40}, which is not defined before it")
            size = sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            if refuses_surprises and not event.style and _SURPRISE.fullmatch(event.value):
                refuse(event, f"has {event.value:.40}, which is another number to YAML; quote it or write it out")
            if len(event.value) > _MAX_DIGITS and event.value.lstrip("+-").isdecimal():
                refuse(event, f"has a number of {len(event.value)} digits")
            anchor, key = event.anchor, event.value
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        parent = opened[-1]
        parent.size += size
        if parent.size > _MAX_VALUES:
            refuse(event, f"has more than {_MAX_VALUES:,} values, its aliases written out")
        if parent.is_mapping and parent.is_key and key is not None:
            if key in parent.keys:
                refuse(event, f"gives {key:.60} twice; leave one of them out")
            parent.keys.add(key)
        parent.is_key = not parent.is_key


@dataclass
class _Collection:
    """An open list or mapping, with the number of its values and, in a mapping, the keys so far."""

    anchor: str | None
    is_mapping: bool
    size: int = 0
    is_key: bool = True
    keys: set[str] = field(default_factory=set)
