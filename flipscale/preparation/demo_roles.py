"""The couples of the demo's emoji: a woman and a man in one role, drawn by the same artist."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

WOMAN, MAN = "woman ", "man "
ROLES_FILE = "roles.json"


def role_couples(drawings: Iterable[tuple[str, str]], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return `{role, artist, woman, man}` of each role and artist, the last two being numbers of drawings.

    A role is a name of CLDR such as "firefighter" that has "woman firefighter" and "man firefighter" beside it.
    Activities, whose name without a gender begins with "person", are not roles.

    Args:
        drawings: artist and caption of each drawing, without skin tones.
        labels: all names of CLDR.
    """
    known = set(labels)
    roles = {name for name in labels if WOMAN + name in known and MAN + name in known}
    by_name: dict[tuple[str, str], int] = {}
    for number, (artist, caption) in enumerate(drawings):
        by_name.setdefault((artist, caption), number)
    return [
        {"role": role, "artist": artist, "woman": by_name[artist, WOMAN + role], "man": by_name[artist, MAN + role]}
        for artist in sorted({artist for artist, _ in by_name})
        for role in sorted(roles)
        if (artist, WOMAN + role) in by_name and (artist, MAN + role) in by_name
    ]


def write_roles(folder: Path, couples: list[dict[str, Any]]) -> None:
    """Write `roles.json`, which the evaluation `association` reads, beside the images."""
    (folder / ROLES_FILE).write_text(json.dumps(couples, indent=1) + "\n", encoding="utf-8")
