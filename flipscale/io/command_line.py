"""The parser of the verbs: its errors are a user's mistake, as all others are, and its numbers have ranges."""

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, get_args

from flipscale.io.errors import UserError
from flipscale.io.ranges import Threads
from flipscale.io.room import usable_cores

_LONGEST_NAME = 255  # of a file, on all usual file systems


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse has to say.

        Raises:
            ValueError: always.
        """
        words = re.sub(r"^argument ([^:]+): is ", r"\1 is ", message)
        raise UserError(f"{words}; see {self.prog} --help")


def output_folder(text: str) -> Path:
    """Return a folder that can be written; a type for argparse."""
    if reason := unwritable(text):
        raise argparse.ArgumentTypeError(f"is {text[:60]!r}; {reason}")
    return Path(text)


def unwritable(name: str) -> str | None:
    """Return why a folder cannot be written and what to do, before anything is made there; None if it can."""
    if not name or name.startswith("~"):
        return "name a folder, and in place of ~ the whole path"
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(name).parts):
        return f"use names of at most {_LONGEST_NAME} bytes"
    there = next(one for one in (Path(name), *Path(name).absolute().parents) if one.exists() or one.is_symlink())
    if not there.exists():
        return f"{there} is a link to {os.readlink(there)}, which is not there: name another folder"
    if not there.is_dir():
        return f"{there} is a file: name another folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} cannot be written: change its permissions, or name another folder"
    return None


def number(kind: Any) -> Callable[[str], Any]:
    """Return what argparse takes as the type of an option: it reads an int or a float in its range.

    Args:
        kind: of `flipscale.io.ranges`, such as `Count`.
    """
    base, allowed = get_args(kind)
    what = "a whole number" if base is int else "a number"

    def read(text: str) -> Any:
        try:
            value = base(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text[:40]!r}; it must be {what}, {allowed}") from None
        if value not in allowed:
            raise argparse.ArgumentTypeError(f"is {text[:40]}; it must be {allowed}")
        return value

    return read


def add_num_workers(parser: argparse.ArgumentParser) -> None:
    """Add `--num_workers`, of a verb that works in several processes."""
    parser.add_argument(
        "--num_workers",
        type=number(Threads),
        default=usable_cores(),
        help="How many processes work; by default one for each core.",
    )
