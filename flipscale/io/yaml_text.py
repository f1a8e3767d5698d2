"""Reading of a user's YAML, with limits of depth and size, and without tags, duplicate keys or octal numbers."""

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from flipscale.io.errors import UserError

MAX_BYTES = 262_144
_MAX_DEPTH = 32
_MAX_VALUES = 100_000
_MAX_DIGITS = 100
_KINDS = ("str", "int", "float", "bool", "null", "seq", "map", "merge", "timestamp", "value")
# YAML 1.1 reads 010 as 8 and 1:30 as 90.
_SURPRISE = re.compile(r"[-+]?(0[0-9_]+|[1-9][0-9_]*(:[0-5]?[0-9])+)")


def read_yaml(file: Path) -> yaml.Node | None:
    """Return the content of a YAML file; None if it is empty. Raise UserError if it is not YAML, or as `check_yaml`."""
    if not file.is_file():
        what = "a folder" if file.is_dir() else "not a plain file"
        raise UserError(f"{file} is {what}; name a YAML file")
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{file} has {size:,} bytes; at most {MAX_BYTES:,} of YAML are read")
    try:
        return check_yaml(file.read_bytes().decode("utf-8-sig"), str(file), refuses_surprises=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        fix = "; indent with spaces" if "'\\t'" in reason else ""
        raise UserError(f"{file} cannot be read as YAML: {reason}{fix}") from None


def outline(node: yaml.Node | None) -> Any:
    """Return the content of YAML with every value as text."""
    return "" if node is None else yaml.BaseLoader("").construct_document(node)


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
            f"{file} is damaged; copy the one of a checkpoint there ({file.parent}/checkpoints/step-*/recipe.yaml)"
        )
    return content


def check_yaml(text: str, where: str, refuses_surprises: bool = False) -> yaml.Node | None:
    """Return the content of YAML; None if it is empty. Raise UserError if it is nested too deep, grows too large by its
    aliases, gives a key twice, or has a tag such as `!!python/object`. Raise YAMLError if the text is not YAML.

    Args:
        text: YAML, which is parsed without making objects.
        where: start of the messages.
        refuses_surprises: whether to refuse numbers that YAML reads differently from people, such as 010.
    """
    sizes: dict[yaml.Node, int] = {}  # number of values in each node; 0 while its values are counted

    def refuse(node: yaml.Node, what: str) -> NoReturn:
        raise UserError(f"{where} {what} (line {node.start_mark.line + 1})")

    def count(node: yaml.Node, depth: int) -> int:
        if node in sizes:
            return sizes[node] or refuse(node, "has a value that contains itself by an alias")
        sizes[node] = 0
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _KINDS:
            refuse(node, f"has the tag {node.tag:.60}; use plain values")
        if depth > _MAX_DEPTH:
            refuse(node, f"is nested deeper than {_MAX_DEPTH} levels")
        children: list[yaml.Node] = []
        keys: set[str] = set()
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    refuse(key, "has a list or a mapping for a key; use a name")
                if key.value in keys:
                    refuse(key, f"gives {key.value:.60} twice; leave one of them out")
                keys.add(key.value)
                children += [key, value]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        elif (
            refuses_surprises
            and isinstance(node, yaml.ScalarNode)
            and not node.style
            and _SURPRISE.fullmatch(node.value)
        ):
            refuse(node, f"has {node.value:.40}, which is another number to YAML; quote it or write it out")
        elif len(node.value) > _MAX_DIGITS and node.value.lstrip("+-").isdecimal():
            refuse(node, f"has a number of {len(node.value)} digits")
        sizes[node] = 1 + sum(count(child, depth + 1) for child in children)
        if sizes[node] > _MAX_VALUES:
            refuse(node, f"has more than {_MAX_VALUES:,} values, its aliases written out")
        return sizes[node]

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise UserError(f"{where} is nested deeper than {_MAX_DEPTH} levels") from None
    if node is not None:
        count(node, 0)
    return node
