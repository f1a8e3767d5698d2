"""Which names are meant for this machine, and never for the Hub."""

import re
from pathlib import Path


def looks_local(name: str) -> bool:
    """Return whether a name that is not on this machine was meant to be: a path that is misspelled.

    A name of the Hub is NAME or ORG/NAME. So a name that begins with `.`, `/` or `~`, has another slash, ends like a
    file, or begins with a folder that is there, is none.
    """
    return (
        name.startswith((".", "/", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or re.search(r"\.[A-Za-z]{2,7}$", name) is not None
        or ("/" in name and Path(name).parent.is_dir())
    )
