"""A recipe as a person would write it: YAML with a reason beside a field, and a few lines above them all."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

_WIDTH = 120


def commented_yaml(head: list[str], fields: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    """Return fields as YAML.

    Args:
        head: sentences, each of which begins a line of comment.
        reasons: by the path of the field, such as `data.tokenizer`.
    """
    lines = [f"# {line}" for sentence in head for line in textwrap.wrap(sentence, _WIDTH - 2, break_long_words=False)]
    return "\n".join([*lines, *_mapping(fields, reasons, "", "")]) + "\n"


def _mapping(fields: Mapping[str, Any], reasons: Mapping[str, str], path: str, indent: str) -> Iterator[str]:
    for name, value in fields.items():
        place = f"{path}.{name}" if path else name
        reason = f" # {reasons[place]}" if place in reasons else ""
        if isinstance(value, Mapping):
            yield f"{indent}{name}:{reason}"
            yield from _mapping(value, reasons, place, indent + "  ")
        elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            yield f"{indent}{name}:{reason}"
            for number, one in enumerate(value):
                first, *others = _mapping(one, reasons, f"{place}[{number}]", "")
                yield f"{indent}  - {first}"
                yield from (f"{indent}    {line}" for line in others)
        else:
            yield f"{indent}{name}: {_flat(value)}{reason}"


def _flat(value: Any) -> str:
    """Return a value in one line, large numbers with their thousands apart."""
    if type(value) is int and value >= 10_000:
        return f"{value:_}"
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("\n").removesuffix("\n...")
