"""Facts that only describe a process and its machine. A fact that cannot be found is left out, and ends no command."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

_GIT_SECONDS = 10.0

T = TypeVar("T")


def known(fact: Callable[[], T]) -> T | None:
    """Return the result of `fact`, or None if it raises an error."""
    try:
        return fact()
    except Exception:  # programs, packages and files of a machine fail in any way
        return None


def versions(modules: Iterable[str]) -> dict[str, str]:
    """Return the versions that the modules state, of those that are imported and state one."""
    stated = {name: getattr(sys.modules.get(name), "__version__", None) for name in modules}
    return {name: str(version) for name, version in stated.items() if version}


def own_commit(package: Path) -> str | None:
    """Return the commit of a package's own repository: its top folder has the package and names it in setup.cfg.

    None without such a repository or without git. A repository around an installed package is not the package's.
    """
    # Variables of a git hook would name another repository.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    # The last word fails if the commit lacks the package.
    command = ["git", "-C", str(package), "rev-parse", "--show-prefix", "HEAD", "HEAD:./__init__.py"]

    def commit() -> str | None:
        ended = subprocess.run(command, env=variables, capture_output=True, timeout=_GIT_SECONDS, check=True)
        prefix, head, _ = ended.stdout.decode().split()
        lines = (package.parent / "setup.cfg").read_text(encoding="utf-8").splitlines()
        return head if prefix == f"{package.name}/" and f"name = {package.name}" in lines else None

    return known(commit)
