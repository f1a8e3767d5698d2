"""Reading of a user's YAML, with limits of depth and size, and without tags, duplicate keys or octal numbers."""

import re
from pathlib import Path
from typing import Any

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
    walk = _Walk(where, refuses_surprises)
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        walk.take(event)


class _Walk:
    """A walk over the parser's events, with the sizes and keys of all open lists and mappings."""

    def __init__(self, where: str, refuses_surprises: bool):
        self._where, self._refuses_surprises = where, refuses_surprises
        self._open: list[_Open] = [_Open(None, False)]
        self._sizes: dict[str | None, int] = {}

    def take(self, event: yaml.Event) -> None:
        """Check the next event."""
        if isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent) and event.tag not in (None, "!"):
            self._refuse(event, f"has the tag {event.tag:.60}; use plain values")
        if isinstance(event, yaml.CollectionStartEvent):
            if len(self._open) > _MAX_DEPTH:
                self._refuse(event, f"is nested deeper than {_MAX_DEPTH} levels")
            self._open.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = self._open.pop()
            self._add(event, closed.size + 1, closed.anchor)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._sizes:
                self._refuse(event, f"uses *{event.anchor:.40}, which is not defined before it")
            self._add(event, self._sizes[event.anchor])
        elif isinstance(event, yaml.ScalarEvent):
            if self._refuses_surprises and not event.style and _SURPRISE.fullmatch(event.value):
                self._refuse(event, f"has {event.value:.40}, which is another number to YAML; quote it or write it out")
            if len(event.value) > _MAX_DIGITS and event.value.lstrip("+-").isdecimal():
                self._refuse(event, f"has a number of {len(event.value)} digits")
            self._add(event, 1, event.anchor, event.value)

    def _add(self, event: yaml.Event, size: int, anchor: str | None = None, text: str | None = None) -> None:
        """Add a finished value to its list or mapping."""
        if anchor is not None:
            self._sizes[anchor] = size
        parent = self._open[-1]
        parent.size += size
        if parent.size > _MAX_VALUES:
            self._refuse(event, f"has more than {_MAX_VALUES:,} values, its aliases written out")
        if parent.is_mapping:
            if parent.is_key and text is not None:
                if text in parent.keys:
                    self._refuse(event, f"gives {text:.60} twice; leave one of them out")
                parent.keys.add(text)
            parent.is_key = not parent.is_key

    def _refuse(self, event: yaml.Event, what: str) -> None:
        assert event.start_mark is not None
        raise UserError(f"{self._where} {what} (line {event.start_mark.line + 1})")


class _Open:
    def __init__(self, anchor: str | None, is_mapping: bool):
        self.anchor, self.is_mapping = anchor, is_mapping
        self.size, self.is_key = 0, True
        self.keys: set[str] = set()
