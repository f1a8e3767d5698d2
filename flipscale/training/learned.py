"""What of a recipe decides what is learned: all fields but those that their dataclass marks `{"learned": False}`."""

import dataclasses
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import yaml

from flipscale.training.recipe import Recipe, to_yaml


def deciding_part(
    saved: dict[str, Any], kind: type = Recipe, name_of: Callable[[str], str] | None = None
) -> dict[str, Any]:
    """Return the fields of a saved recipe that decide what is learned.

    A field that the recipe lacks has its default: it was saved by a version without that field. A field that `kind`
    does not know is kept.

    Args:
        saved: what `recipe.yaml` holds, or a section of it.
        kind: its dataclass.
        name_of: how to write fields that are marked `{"place": True}`, which hold a path or a name; None leaves them.
    """
    known, types = {f.name: f for f in dataclasses.fields(kind)}, get_type_hints(kind)
    kept = {}
    for name in dict.fromkeys([*known, *saved]):
        if name not in known:
            kept[name] = saved[name]
        elif known[name].metadata.get("learned", True):
            value = saved[name] if name in saved else _default(known[name])
            if known[name].metadata.get("place") and isinstance(value, str) and name_of is not None:
                value = name_of(value)
            kept[name] = _deciding_value(value, types[name], name_of)
    return kept


def differences(recipe: Recipe, saved: dict[str, Any]) -> list[str]:
    """Return the fields that decide what is learned and differ from a saved recipe's: `section.field: saved, now`."""
    before, now = deciding_part(saved), deciding_part(yaml.safe_load(to_yaml(recipe)))
    found = []
    for section in now.keys() | before.keys():
        old, new = before.get(section), now.get(section)
        if isinstance(old, dict) and isinstance(new, dict):
            pairs = {f"{section}.{name}": (old.get(name), new.get(name)) for name in old.keys() | new.keys()}
        else:
            pairs = {section: (old, new)}
        found += [f"{name}: {was}, now {is_now}" for name, (was, is_now) in pairs.items() if was != is_now]
    return sorted(found)


def _deciding_value(value: Any, hint: Any, name_of: Callable[[str], str] | None) -> Any:
    """Return a value with what does not decide left out of the dataclasses in it."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return deciding_part(value, hint, name_of)
    elements = get_args(hint)
    if isinstance(value, list) and elements and dataclasses.is_dataclass(elements[0]):
        return [_deciding_value(one, elements[0], name_of) for one in value]
    return value


def _default(field: dataclasses.Field) -> Any:
    """Return a field's default as YAML holds it, None where it has none."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return list(value) if isinstance(value, tuple) else None if value is dataclasses.MISSING else value
