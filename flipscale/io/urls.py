"""URLs as files and screens show them: without passwords, and without the signatures in queries."""

import re
from typing import Any

# A user and a password; at HTTP also a user alone, perhaps a token. A port is not one. `pathlib` leaves one slash.
_USER = re.compile(
    r"(https?:/{1,2})[^/\s?]*@|(\w:/{1,2})(?=[^/\s:@\[?]*:(?!\d*(?:[/?\s]|$)))(?:[^/\s]*|\S{0,200}?)@", re.I
)
_MARKS = "[](){}<>'\"`,;:."  # may follow a URL in a text


def without_password(url: str) -> str:
    return _USER.sub(r"\1\2***@", url)


def without_secrets(value: Any) -> Any:
    """Return a text whose URLs have `***` for a password and no query; also inside lists and mappings."""
    if isinstance(value, dict):
        return {name: without_secrets(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [*map(without_secrets, value)]
    is_url = isinstance(value, str) and ":/" in value
    return re.sub(r"\S+", _without_query, without_password(value)) if is_url else value


def _without_query(word: re.Match[str]) -> str:
    address, slash, rest = word[0].partition(":/")
    place, _, query = rest.partition("?")
    if "http" not in f"{address}{place}".lower() and "=" not in query:
        return word[0]  # `?` is a letter of a glob
    return f"{address}{slash}{place}{query[len(query.rstrip(_MARKS)) :]}"
