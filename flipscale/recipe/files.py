"""Recipe files: found by their names, checked field by field, and merged into the recipes that they extend."""

import dataclasses
import difflib
from collections.abc import Sequence
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from flipscale.io.errors import UserError
from flipscale.io.yaml_text import outline, read_yaml

RECIPES = Path(__file__).parent.parent / "recipes"


def recipe_names() -> str:
    return ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def read_recipes(names: Sequence[str], kind: type) -> str:
    """Return the text of recipes, each merged into those before it, see `_read`."""
    return yaml.serialize(reduce(_merged, (_read(name, kind) for name in names)))


def _read(name: str, kind: type) -> yaml.Node:
    """Return a recipe, merged into the recipe that it extends.

    `extends: icons.yaml` names a file in the recipe's folder or a recipe of the package. Mappings are merged field by
    field; lists and other values replace those of the extended recipe. Raise UserError if a file is missing, no recipe,
    or extends itself.

    Args:
        name: file, or name of a recipe of the package.
        kind: dataclass of a recipe.
    """
    files: list[Path] = []
    merged: yaml.Node | None = None
    extended: Any = name
    while extended is not None:
        files.append(_find(extended, files))
        fields = read_yaml(files[-1])
        content = outline(fields)
        extended = content.pop("extends", None) if isinstance(content, dict) else None
        check_fields(content, kind, "", str(files[-1]))
        assert isinstance(fields, yaml.MappingNode)
        fields.value = [(key, value) for key, value in fields.value if key.value != "extends"]
        merged = fields if merged is None else _merged(fields, merged)
    assert merged is not None
    return merged


def _find(name: Any, extending: list[Path]) -> Path:
    """Return the file of a recipe, or of the recipe that the last of `extending` extends."""
    start = f"{extending[-1]}: extends" if extending else "recipe"
    if not isinstance(name, str):
        raise UserError(f"{start} is {name!r:.200}; name one recipe, such as icons.yaml")
    is_file = is_circle = False
    file = extending[-1].parent / name if extending else Path(name)
    with suppress(OSError, ValueError):  # too long for a name, or a NUL byte in it
        if not file.exists() and "/" not in name:
            file = RECIPES / f"{name}.yaml"
        is_file = file.exists()
        is_circle = is_file and any(file.samefile(other) for other in extending)
    if is_circle:
        raise UserError(f"{start} is {name!r:.200}, which extends {extending[-1].name} itself; leave one of them out")
    if not is_file:
        raise UserError(f"{start} {name[:200]!r} is neither a file nor one of {recipe_names()}")
    return file


def _merged(base: yaml.Node, top: yaml.Node) -> yaml.Node:
    """Return `top` with the fields of `base` that it lacks, if both are mappings."""
    if not isinstance(base, yaml.MappingNode) or not isinstance(top, yaml.MappingNode):
        return top
    for node in (base, top):
        yaml.SafeLoader("").flatten_mapping(node)  # puts the fields of `<<` in its place
    fields, changes = ({key.value: (key, value) for key, value in node.value} for node in (base, top))
    for name, (key, value) in changes.items():
        fields[name] = (key, _merged(fields[name][1], value) if name in fields else value)
    return yaml.MappingNode(base.tag, [*fields.values()])


def check_fields(content: Any, hint: Any, path: str, file: str) -> None:
    """Raise UserError unless a recipe file, or its part at a field `path`, has mappings for sections, with known fields
    of the type `hint` only."""
    if get_origin(hint) is list and isinstance(content, list):
        for number, element in enumerate(content):
            check_fields(element, get_args(hint)[0], f"{path}[{number}]", file)
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
            fix = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(hints)}"
            raise UserError(f"{file}: {inner} is not a field of a recipe; {fix}")
        check_fields(value, hints.get(name), inner, file)
