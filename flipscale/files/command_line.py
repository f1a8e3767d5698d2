"""The parser of the verbs: its errors are a user's mistake, as all others are, and its numbers have ranges."""

import argparse
import re
from collections.abc import Callable
from typing import Any, NoReturn, get_args


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse has to say.

        Raises:
            ValueError: always.
        """
        words = re.sub(r"^argument ([^:]+): is ", r"\1 is ", message)
        raise ValueError(f"{words}; see {self.prog} --help")


def number(kind: Any) -> Callable[[str], Any]:
    """Return what argparse takes as the type of an option: it reads an int or a float in its range.

    Args:
        kind: of `flipscale.files.ranges`, such as `Count`.
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
